"""Run a file of tests once more in a process where Triton interprets kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.launch import interpreted

in_interpreter = pytest.mark.skipif(
    not interpreted(), reason="run by test_kernel_equals_reference_in_the_interpreter"
)


def assert_passes_in_the_interpreter(file: str) -> None:
    """All tests of a file that are marked for the interpreter pass in it.

    Triton reads TRITON_INTERPRET when it is first imported, so it needs a process of its own.
    """
    if interpreted():
        pytest.skip("this process interprets already")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
