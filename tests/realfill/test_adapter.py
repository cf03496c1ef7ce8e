"""Adapters, whose factors may lie in one piece."""

from __future__ import annotations

import torch

from realfill.adapter import Adapter


def test_factors_that_lie_in_one_piece_are_not_copied() -> None:
    """All values in the order of the factors; views of one memory are that memory itself."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"mid.0.to_q": ((4, 5), (7, 4)), "up.1.to_out.0": ((2, 6), (3, 2))}
    factors = {
        path: (torch.randn(*a, generator=generator), torch.randn(*b, generator=generator))
        for path, (a, b) in shapes.items()
    }
    adapter = Adapter(factors, scale=2.0)
    values = [factor.flatten() for pair in adapter.factors.values() for factor in pair]
    flat = adapter.in_one_piece()
    assert torch.equal(flat, torch.cat(values))
    packed = adapter.over(flat)
    assert packed.in_one_piece().data_ptr() == flat.data_ptr()
    assert torch.equal(packed.in_one_piece(), flat)
    assert all(
        torch.equal(one, other)
        for path, pair in adapter.factors.items()
        for one, other in zip(pair, packed.factors[path], strict=True)
    )
    # In another order, or with a gap, they are put together.
    turned = Adapter(dict(reversed(packed.factors.items())), packed.scale)
    few = Adapter(dict(list(packed.factors.items())[1:]), packed.scale)
    for other in (turned, few):
        whole = torch.cat([f.flatten() for pair in other.factors.values() for f in pair])
        assert torch.equal(other.in_one_piece(), whole)
