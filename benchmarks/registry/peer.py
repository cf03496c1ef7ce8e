"""MLflow in a virtual environment of its own, so that its dependencies never meet ours."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# What the client needs for a registry on SQLite; the full package adds only servers and plots.
PACKAGES = ("mlflow-skinny>=3.5,<4", "sqlalchemy>=2,<3", "alembic>=1.10,<2")
SCRIPT = Path(__file__).parent / "mlflow_client.py"
INSTALL_S = 1800
RUN_S = 1800


@dataclass(frozen=True)
class Peer:
    """What MLflow took: seconds of each call, by what it does."""

    name: str
    seconds: dict[str, list[float]]


def environment(folder: Path) -> Path:
    """The interpreter of the environment, which is made where it is missing.

    Raises:
        RuntimeError: It cannot be made.
    """
    python = folder / "bin" / "python"
    if not python.exists() or _run([str(python), "-c", "import mlflow"], 120).returncode:
        commands = (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *PACKAGES],
        )
        for command in commands:
            done = _run(command, INSTALL_S)
            if done.returncode:
                raise RuntimeError(
                    f"The environment for MLflow cannot be made ({done.stderr.strip()[-300:]}): "
                    "check the package index, or measure without it by --no-peer."
                )
    return python


def measure(folder: Path, database: Path, repeats: int) -> Peer:
    """Let MLflow's client register, alias and resolve that many times on a new SQLite file.

    Raises:
        RuntimeError: It failed.
    """
    done = _run([str(environment(folder)), str(SCRIPT), str(database), str(repeats)], RUN_S)
    if done.returncode:
        raise RuntimeError(
            f"MLflow's client failed ({done.stderr.strip()[-300:]}): remove {folder} to install "
            "it anew, or measure without it by --no-peer."
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    versions = answer["versions"]
    name = f"MLflow {versions['mlflow-skinny']} client, SQLite file"
    return Peer(name, answer["seconds"])


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
