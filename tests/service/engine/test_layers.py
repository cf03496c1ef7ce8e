"""Layers whose outcome for a sample is its own, whatever stands beside it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from service.engine.layers import Exact
from service.engine.parts import Parts
from tests.products import PRODUCTS

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (5, 24)),
    "of few rows": (lambda: nn.Linear(24, 40, bias=False), (24,)),
    "convolution": (lambda: nn.Conv2d(24, 40, 3, padding=1), (24, 6, 6)),
    "of single pixels": (lambda: nn.Conv2d(24, 40, 1), (24, 6, 6)),
    "of single pixels, strided": (lambda: nn.Conv2d(24, 40, 1, stride=2), (24, 6, 6)),
}


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_layer_computes_with_any_weight_and_each_sample_as_if_it_were_alone(
    kind: str, products: torch.dtype
) -> None:
    """As the plain layer would with that weight; the samples to the bit."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layers = [make() for _ in range(3)]
    for layer in layers[1:]:
        layer.load_state_dict({**layers[0].state_dict(), "weight": layer.weight})
    exact = Exact(layers[0], products=products)
    x = torch.randn(6, *shape)
    assert torch.equal(exact(x), exact.compute(x, exact.own(x).for_samples(6)))
    for layer in layers:
        packed = exact.pack(layer.weight)
        together = exact.compute(x, packed.for_samples(6))
        assert together.dtype == x.dtype
        _assert_close(together, layer, x, products)
        for k in range(6):
            alone = exact.compute(x[k : k + 1], packed.for_samples(1))
            assert torch.equal(alone[0], together[k])


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_layers_side_by_side_are_each_of_them(bias: bool, products: torch.dtype) -> None:
    """Also after one of them was written to."""
    torch.manual_seed(0)
    layers = [nn.Linear(24, out, bias=bias) for out in (40, 8, 24)]
    exact = Exact(*layers, products=products)
    x = torch.randn(2, 20, 24)
    for _ in range(2):
        outcomes = exact(x).split(exact.out_sizes, dim=-1)
        for layer, outcome in zip(layers, outcomes, strict=True):
            _assert_close(outcome, layer, x, products)
        layers[1].weight.add_(1)


@pytest.mark.parametrize("products", PRODUCTS)
@torch.no_grad()
def test_a_weight_is_packed_once_for_each_form_that_is_wanted(
    monkeypatch: pytest.MonkeyPatch, products: torch.dtype
) -> None:
    """Whichever forms this processor's library has: here even and odd numbers of samples differ."""
    layer = nn.Conv2d(24, 40, 3, padding=1)
    exact = Exact(layer, products=products)
    x = torch.randn(4, 24, 6, 6)
    exact.own(x)
    monkeypatch.setattr(exact, "form", lambda samples: b"odd" if samples % 2 else b"even")
    weight = exact.pack(layer.weight)
    odd, even = weight.for_samples(1), weight.for_samples(2)
    assert odd is weight.first
    assert even is not odd
    assert weight.for_samples(4) is even
    assert weight.for_samples(3) is odd
    assert torch.equal(even.to_dense(), layer.weight.to(products))
    _assert_close(exact.compute(x, weight.for_samples(4)), layer, x, products)
    assert weight.versions == 0


def _assert_close(
    outcome: torch.Tensor, layer: nn.Module, x: torch.Tensor, products: torch.dtype
) -> None:
    """What the plain layer gives for inputs and weights that are rounded first."""
    rounded = copy.deepcopy(layer).to(products).float()
    # The outcome is rounded once more.
    close = {} if products == torch.float32 else {"rtol": 2**-8, "atol": 1e-4}
    torch.testing.assert_close(outcome, rounded(x.to(products).float()), **close)


CONVERSIONS = """
import sys
import torch
from benchmarks.engine.adapters import random_adapter
from benchmarks.engine.rates import job_of
from dataclasses import replace
from realfill.base import load_base
from service.engine import Runner

torch.set_num_threads(2)
base = load_base("nano", products=getattr(torch, sys.argv[1]))
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
@pytest.mark.parametrize("products", PRODUCTS)
def test_no_weight_is_converted_while_steps_are_made(products: torch.dtype) -> None:
    """A scene's weights fit alone on all cores, and shared among scenes with a core each.

    oneDNN says what it does. On processors without AVX-512 it wants them in different forms.
    """
    says = subprocess.run(
        [sys.executable, "-c", CONVERSIONS, str(products).removeprefix("torch.")],
        env={**os.environ, "ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    second = says[says.index("turn second") :]
    assert ",convolution," in second
    assert [line for line in second.splitlines() if ",reorder," in line] == []


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_layer_computes_parts_as_it_would_compute_each(kind: str, products: torch.dtype) -> None:
    """To the bit, each with its own weight; a part of no samples is none."""
    make, shape = LAYERS[kind]
    layer = Exact(make(), products=products)
    x = torch.randn(4, *shape)
    layer(x[:1])
    weights = [layer.pack(torch.randn_like(layer.module.weight)) for _ in range(3)]
    sizes = (1, 2, 1, 0)
    fitting = [packed.for_samples(size) for packed, size in zip(weights, sizes, strict=False)]
    outcome = layer.compute_parts(
        x, [torch.empty(size, 0) for size in sizes], [*fitting, fitting[0]]
    )
    alone = map(layer.compute, x.split(sizes[:3]), fitting)
    assert outcome.dtype == torch.float32
    assert torch.equal(outcome, torch.cat(list(alone)))


@pytest.mark.parametrize(
    ("sizes", "pieces"),
    [
        ([4], [(0, 4)]),
        ([9], [(0, 4), (4, 8), (8, 9)]),
        ([1, 1, 1, 1, 1], [(0, 4), (4, 5)]),
        ([3, 3, 1], [(0, 3), (3, 7)]),
        ([1, 5, 2], [(0, 1), (1, 5), (5, 8)]),
    ],
)
def test_scenes_share_a_piece_where_none_of_them_is_cut_for_it(
    sizes: list[int], pieces: list[tuple[int, int]]
) -> None:
    """A cut would be one more part to compute; only scenes too large for a piece are cut."""
    ends = tuple(sum(sizes[: k + 1]) for k in range(len(sizes)))
    assert list(Parts(ends, (None,) * len(sizes)).pieces(sum(sizes), 4)) == pieces


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
    pieces = list(share.pieces(stop - start, 4))
    assert [k for first, last in pieces for k in range(first, last)] == list(range(stop - start))
    assert all(last - first <= 4 for first, last in pieces)
    owners = [
        owner
        for first, last in pieces
        for owner in _owners(share.between(first, last), last - first)
    ]
    assert owners == whole[start:stop]


def _owners(parts: Parts, count: int) -> list[int]:
    owners = []
    for size, weights in zip(parts.sizes(count), parts.weights, strict=True):
        assert weights is not None
        owners += [int(weights[0])] * size
    return owners
