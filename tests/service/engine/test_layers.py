"""Layers whose outcome for a sample is its own, whatever stands beside it."""

from __future__ import annotations

import os
import subprocess
import sys

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
    prepared = [[exact.pack(layer.weight)] for layer in layers]
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


@torch.no_grad()
def test_a_weight_is_packed_once_for_each_form_that_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever forms this processor's library has: here even and odd numbers of samples differ."""
    layer = nn.Conv2d(24, 40, 3, padding=1)
    exact = Exact(layer)
    x = torch.randn(4, 24, 6, 6)
    exact.own(x)
    monkeypatch.setattr(exact, "form", lambda samples: b"odd" if samples % 2 else b"even")
    weight = exact.pack(layer.weight)
    odd, even = weight.for_samples(1), weight.for_samples(2)
    assert odd is weight.first
    assert even is not odd
    assert weight.for_samples(4) is even
    assert weight.for_samples(3) is odd
    assert torch.equal(even.to_dense(), layer.weight)
    torch.testing.assert_close(exact.compute(x, weight), layer(x))
    assert weight.versions == 0


CONVERSIONS = """
import torch
from benchmarks.engine.adapters import random_adapter
from benchmarks.engine.rates import job_of
from dataclasses import replace
from realfill.base import load_base
from service.engine import Runner

torch.set_num_threads(2)
base = load_base("nano")
runner = Runner(base, max_samples=4)
samples = []
for k in range(2):
    adapter = random_adapter(base, rank=4, seed=k)
    job = replace(job_of(base, samples=2, steps=2), digest=f"{k:064d}", adapter=adapter)
    runner.weights.take(job.digest, adapter)
    samples += runner.begin(job)
ways = [samples[:1], samples[:2], samples[:3], samples]
for turn in ("first", "second"):
    print("turn", turn, flush=True)
    for way in ways:
        for sample in way:
            sample.index = 0
        runner.step(way)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_no_weight_is_converted_while_steps_are_made() -> None:
    """A scene's weights fit alone on all cores, and shared among scenes with a core each.

    oneDNN says what it does. On processors without AVX-512 it wants them in different forms.
    """
    says = subprocess.run(
        [sys.executable, "-c", CONVERSIONS],
        env={**os.environ, "ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    second = says[says.index("turn second") :]
    assert ",convolution," in second
    assert [line for line in second.splitlines() if ",reorder," in line] == []


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
