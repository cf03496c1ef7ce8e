"""Outcomes are channels-last where features are that and nothing else."""

from __future__ import annotations

import torch

from kernels.memory_format import format_of


def test_only_features_that_are_not_contiguous_are_channels_last() -> None:
    """One channel or one pixel is both, a slice neither: such outcomes are contiguous."""
    x = torch.zeros(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert format_of(x) == torch.contiguous_format
    assert format_of(last) == torch.channels_last
    assert format_of(last[:, :2]) == torch.contiguous_format
    assert format_of(last[:, :1].contiguous(memory_format=torch.channels_last)) == (
        torch.contiguous_format
    )
    assert format_of(torch.zeros(2, 3, 1, 1)) == torch.contiguous_format
