"""Kernels run on CUDA or in the interpreter, and importing the package costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kernels.launch import interpreted, kernels_run_on


def test_cpu_runs_kernels_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TRITON_INTERPRET the CPU runs the references."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not interpreted()
    assert not kernels_run_on(torch.device("cpu"))
    assert kernels_run_on(torch.device("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert interpreted()
    assert kernels_run_on(torch.device("cpu"))


def test_packages_import_neither_torch_nor_triton_before_they_need_to() -> None:
    """`import kernels` imports nothing, and importing an op leaves Triton alone."""
    program = (
        "import sys, kernels; assert not {'torch', 'triton'} & set(sys.modules); "
        "import torch; before = 'triton' in sys.modules; import kernels.merge_lora; "
        "assert before or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
