"""What tests of the engine ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def one_core() -> Iterator[None]:
    """Engines compute with one core, so that every batch is one call of the U-Net."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_cores() -> Iterator[None]:
    """Engines compute with two cores, whether or not the machine has them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
