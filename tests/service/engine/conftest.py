"""What tests of the engine ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def one_core() -> Iterator[None]:
    """Engines compute with one core, so that every batch is one call of the U-Net."""
    yield from _with_cores(1)


@pytest.fixture
def two_cores() -> Iterator[None]:
    """Engines compute with two cores, whether or not the machine has them."""
    yield from _with_cores(2)


def _with_cores(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)
