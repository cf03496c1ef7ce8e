"""Virtual environments for what must never meet the project's own dependencies."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INSTALL_S = 1800
IMPORT_S = 120


def environment(folder: Path, packages: Sequence[str], module: str) -> Path:
    """The interpreter of an environment with these packages, which is made where it is missing.

    Args:
        packages: Requirements as pip reads them.
        module: What can be imported when they are there.

    Raises:
        RuntimeError: It cannot be made.
    """
    python = folder / "bin" / "python"
    if not python.exists() or run([str(python), "-c", f"import {module}"], IMPORT_S).returncode:
        commands = (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *packages],
        )
        for command in commands:
            done = run(command, INSTALL_S)
            if done.returncode:
                raise RuntimeError(
                    f"The environment for {module} cannot be made in {folder} "
                    f"({done.stderr.strip()[-300:]}): check the package index."
                )
    return python


def run(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """A command with what it printed; its status is the caller's to judge.

    Raises:
        RuntimeError: It took too long.
    """
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"{Path(command[0]).name} took longer than {timeout_s:.0f} s: try again, when the "
            "machine and the package index have less to do."
        ) from error
