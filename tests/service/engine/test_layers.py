"""Layers whose outcome for a sample is its own, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from service.engine.layers import Exact, PartedLayer, Parting, Parts, PiecewiseBlock

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (5, 24)),
    "of few rows": (lambda: nn.Linear(24, 40, bias=False), (24,)),
    "convolution": (lambda: nn.Conv2d(24, 40, 3, padding=1), (24, 6, 6)),
    "of single pixels": (lambda: nn.Conv2d(24, 40, 1), (24, 6, 6)),
    "of single pixels, strided": (lambda: nn.Conv2d(24, 40, 1, stride=2), (24, 6, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_every_part_is_computed_with_its_own_weight(kind: str) -> None:
    """As the plain layer would with that weight; and to the bit as it would be alone."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layers = [make() for _ in range(3)]
    for layer in layers[1:]:
        layer.load_state_dict({**layers[0].state_dict(), "weight": layer.weight})
    exact = Exact(layers[0])
    x = torch.randn(6, *shape)
    exact.own(x)
    prepared = [[exact.prepare(layer.weight)] for layer in layers]
    parting = Parting()
    layer = PartedLayer(exact, parting, 0)
    with parting.by(Parts((1, 4, 6), (prepared[1], None, prepared[2]))):
        mixed = layer(x)
    for start, stop, of in ((0, 1, 1), (1, 4, 0), (4, 6, 2)):
        torch.testing.assert_close(mixed[start:stop], layers[of](x[start:stop]))
        for k in range(start, stop):
            with parting.by(Parts(weights=(prepared[of],))):
                assert torch.equal(layer(x[k : k + 1])[0], mixed[k])
    torch.testing.assert_close(layer(x), layers[0](x))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_a_share_of_a_batch_keeps_every_samples_weights(
    sizes: list[int], data: st.DataObject
) -> None:
    """Wherever it is cut, and however small the pieces."""
    weights = tuple([torch.tensor(float(k))] for k in range(len(sizes)))
    ends = tuple(sum(sizes[: k + 1]) for k in range(len(sizes)))
    parts = Parts(ends, weights)
    whole = [k for k, size in enumerate(sizes) for _ in range(size)]
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    share = parts.between(start, stop)
    assert _owners(share, stop - start) == whole[start:stop]
    pieces = list(share.pieces(stop - start, 2))
    assert [k for first, last, _ in pieces for k in range(first, last)] == list(range(stop - start))
    assert all(last - first <= 2 and len(piece.weights) == 1 for first, last, piece in pieces)
    assert [
        owner for first, last, piece in pieces for owner in _owners(piece, last - first)
    ] == whole[start:stop]


def _owners(parts: Parts, count: int) -> list[int]:
    owners = []
    for size, weights in zip(parts.sizes(count), parts.weights, strict=True):
        assert weights is not None
        owners += [int(weights[0])] * size
    return owners


def test_a_block_in_pieces_is_the_block() -> None:
    """Its layers see the weights of the piece, and the parting is afterwards what it was."""
    parting = Parting()
    seen: list[tuple[int, object]] = []

    def double(x: Tensor) -> Tensor:
        seen.append((len(x), parting.parts.weights[0]))
        return 2 * x

    block = PiecewiseBlock(double, parting, 2)
    first, second = [torch.ones(1)], [torch.zeros(1)]
    parts = Parts((3, 4), (first, second))
    x = torch.arange(4.0)[:, None]
    with parting.by(parts):
        assert torch.equal(block(x), 2 * x)
        assert parting.parts is parts
    assert seen == [(2, first), (1, first), (1, second)]
    assert torch.equal(block(x[:1]), 2 * x[:1])
