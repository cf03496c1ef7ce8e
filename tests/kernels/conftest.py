"""What the tests of all ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill fresh tensors with NaN, so that a value that a kernel left out is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
