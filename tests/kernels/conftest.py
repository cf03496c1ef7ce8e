"""What the tests of all ops share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Read when CUDA is first used: without it cuBLAS refuses references in deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill fresh tensors with NaN, so that a value that a kernel left out is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
