"""The network as a program: what Python would compute, to the bit, with whoever's weights."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from realfill.base import Base
from service.engine import program
from service.engine.fused import FusedWeights
from service.engine.layers import Exact
from service.engine.program import Given, GivenLayer, JoinedLayers, PartedNetwork, Programs
from service.engine.weights import Part
from tests.products import PRODUCTS
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def base() -> Base:
    """A base whose deepest pictures have four pixels, fewer rows than are computed at once."""
    return tiny_base()


def _inputs(base: Base, samples: int, *, side: int = 4, length: int = 77) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(samples)
    width = int(base.unet.config.cross_attention_dim)
    channels = int(base.unet.config.in_channels)
    return (
        torch.randn(samples, channels, side, side, generator=generator),
        torch.randint(1000, (samples,), generator=generator),
        torch.randn(samples, length, width, generator=generator),
    )


def _network(base: Base) -> PartedNetwork:
    network = vars(base.unet)["forward"]
    assert isinstance(network, PartedNetwork)
    return network


@torch.no_grad()
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("length", [3, 77])
@pytest.mark.parametrize("side", [4, 8, 32])
def test_a_program_computes_what_python_does_for_any_number_of_samples(
    base: Base, side: int, length: int, products: torch.dtype
) -> None:
    """To the bit, with one scene's weights and then with another's; prompts may be short."""
    weights = FusedWeights(base.unet, base.adapter_modules, budget_bytes=2**30, products=products)
    plain = base.unet.__class__.forward
    try:
        network = _network(base)
        digests = ["a" * 64, "b" * 64]
        for seed, digest in enumerate(digests):
            weights.take(digest, tiny_adapter(base, seed=seed))
        for samples in (3, 1, 4, 2):
            x, timesteps, prompts = _inputs(base, samples, side=side, length=length)
            of_scenes = []
            for digest in digests:
                weights.apply([Part(digest, samples)])
                outcome = base.unet(x, timesteps, prompts, return_dict=False)[0]
                chosen = network.parting.parts.weights[0]
                told = network.conditioned(timesteps, prompts, chosen)
                assert told is not None
                by_python = network.programs.by_python(
                    x, *told, *network.weights_of(chosen, samples)
                )
                assert torch.equal(outcome, by_python)
                assert torch.equal(
                    base.unet(x[:1], timesteps[:1], prompts[:1]).sample[0], outcome[0]
                )
                of_scenes.append(outcome)
            assert not torch.allclose(*of_scenes)
    finally:
        weights.release()
    assert base.unet.forward.__func__ is plain


@torch.no_grad()
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("side", [4, 8, 32])
@pytest.mark.parametrize("told", [False, True])
def test_scenes_in_one_call_get_what_they_get_alone(
    base: Base, side: int, told: bool, products: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """To the bit, with one sample or several of each scene, the base alone among them."""
    weights = FusedWeights(base.unet, base.adapter_modules, budget_bytes=2**30, products=products)
    try:
        network = _network(base)
        digests = [letter * 64 for letter in "abc"]
        for seed, digest in enumerate(digests):
            weights.take(digest, tiny_adapter(base, seed=seed))
        owners = [*digests, None]
        for sizes in ((1, 1, 1, 1), (2, 1), (1, 1, 2), (3, 1), (2, 2)):
            parts = [Part(owner, size) for owner, size in zip(owners, sizes, strict=False)]
            x, timesteps, prompts = _inputs(base, sum(sizes), side=side)
            told_alone, alone = [], []
            start = 0
            for part in parts:
                of_part = slice(start, start := start + part.count)
                weights.apply([part])
                chosen = network.parting.parts.weights[0]
                made = network.conditioned(timesteps[of_part], prompts[of_part], chosen)
                assert made is not None
                told_alone.append(made)
                alone += [network(x[k][None], timesteps[k][None], prompts[k][None]).sample
                          for k in range(of_part.start, of_part.stop)]  # fmt: skip
            weights.apply(parts)
            given = (timesteps, prompts)
            if told:
                times = torch.cat([one.times for one in told_alone])
                given = (times, [prompt for one in told_alone for prompt in one.prompts])
            outcome = network(x, *given).sample
            assert torch.equal(outcome, torch.cat(alone))
            assert torch.equal(network(x, *given).sample, outcome)
        assert not caplog.records, "the network was not made a program"
    finally:
        weights.release()


@torch.no_grad()
def test_the_base_by_itself_is_diffusers_within_rounding(base: Base) -> None:
    """With several pieces, a timestep that is one for all, and joined layers."""
    x, _, prompts = _inputs(base, 7)
    timestep = torch.tensor(500)
    expected = base.unet(x, timestep, encoder_hidden_states=prompts).sample
    weights = FusedWeights(base.unet, base.adapter_modules, budget_bytes=2**30)
    try:
        outcome = base.unet(x, timestep, encoder_hidden_states=prompts).sample
        layers = weights._layers
    finally:
        weights.release()
    torch.testing.assert_close(outcome, expected, rtol=1e-4, atol=1e-5)
    joined = [len(layer.modules) for layer in layers if len(layer.modules) > 1]
    attentions = sum(name.endswith("attn1") for name, _ in base.unet.named_modules())
    # Queries, keys and values; all keys and values of prompts; the timestep for every block.
    assert sorted(joined) == sorted([*[3] * attentions, 2 * attentions, len(_residual(base))])
    assert torch.equal(base.unet(x, timestep, encoder_hidden_states=prompts).sample, expected)


def _residual(base: Base) -> list[str]:
    return [name for name, _ in base.unet.named_modules() if name.endswith("time_emb_proj")]


class Doubling:
    """A network of one layer that counts its calls."""

    def __init__(self, given: Given) -> None:
        self.layer = GivenLayer(Exact(nn.Linear(8, 8)), given, 0)
        self.calls = 0

    def __call__(self, x: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        """Of rows. [N, 8]"""
        self.calls += 1
        outcome: Tensor = self.layer(x)
        return outcome


def _of_ones(layer: GivenLayer, samples: int) -> Sequence[Tensor]:
    return [layer.exact.pack(torch.ones(8, 8)).for_samples(samples)]


@torch.no_grad()
def test_threads_that_ask_at_once_get_one_program() -> None:
    """Python is run for it twice: to see the sizes, and to write it down."""
    given = Given()
    network = Doubling(given)
    programs = Programs(network, given)
    barrier = threading.Barrier(4)
    outcomes = []

    def ask() -> None:
        x = torch.ones(2, 8)
        barrier.wait()
        with torch.no_grad():
            run = programs.run(x, x, x, [(len(x), partial(_of_ones, network.layer))])
        outcomes.append(run)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert network.calls == 2
    bias = network.layer.exact.module.bias
    assert bias is not None
    for outcome in outcomes:
        torch.testing.assert_close(outcome, 8 + bias.expand(2, 8))


@torch.no_grad()
def test_sizes_beyond_the_most_are_run_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed all the same."""
    monkeypatch.setattr(program, "MOST_PROGRAMS", 1)
    given = Given()
    network = Doubling(given)
    programs = Programs(network, given)
    for length, calls in ((1, 2), (1, 2), (2, 3), (2, 4), (1, 4)):
        x = torch.ones(1, length, 8)
        programs.run(x, x, x, [(len(x), partial(_of_ones, network.layer))])
        assert network.calls == calls


@torch.no_grad()
def test_a_network_that_cannot_be_traced_is_run_by_python(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And the log says why."""
    given = Given()
    network = Doubling(given)

    def untraceable(x: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError("no program of this")
        return network(x, timesteps, prompts)

    programs = Programs(untraceable, given)
    x = torch.ones(1, 8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            programs.run(x, x, x, [(len(x), partial(_of_ones, network.layer))])
    assert network.calls == 3
    assert [record.message for record in caplog.records] == [
        "the U-Net cannot be made a program, Python runs it: no program of this"
    ]


@torch.no_grad()
@pytest.mark.parametrize("most", [0, 1])
def test_several_scenes_have_a_program_or_python_computes_them(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Each sample by its own scene's weights either way, with fewer parts than there may be."""
    monkeypatch.setattr(program, "MOST_PROGRAMS", most)
    given = Given()
    network = Doubling(given)
    programs = Programs(network, given)
    layer, bias = network.layer.exact, network.layer.exact.module.bias
    assert bias is not None
    x = torch.ones(3, 8)

    def of(value: float) -> Callable[[int], Sequence[Tensor]]:
        return lambda samples: [layer.pack(torch.full((8, 8), value)).for_samples(samples)]

    for sizes, values in (((1, 2), (1.0, 2.0)), ((2, 1), (3.0, 1.0)), ((1, 1, 1), (1.0, 2.0, 3.0))):
        parts = [(size, of(value)) for size, value in zip(sizes, values, strict=True)]
        factors = torch.tensor(
            [v for v, size in zip(values, sizes, strict=True) for _ in range(size)]
        )
        outcome = programs.run(x, x, x, parts)
        torch.testing.assert_close(outcome, 8 * factors[:, None] + bias.expand(3, 8))
    assert network.calls == (3 if most == 0 else 2)


@torch.no_grad()
def test_weights_that_a_step_packs_anew_are_sound_at_the_next(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where convolutions want other forms for other numbers of samples, as without AVX-512."""
    monkeypatch.setattr(Exact, "form", lambda _, samples: b"odd" if samples % 2 else b"even")
    weights = FusedWeights(base.unet, base.adapter_modules, budget_bytes=2**30)
    try:
        weights.take("a", tiny_adapter(base, seed=1))
        x, timesteps, prompts = _inputs(base, 2)
        outcomes = []
        for count in (1, 2, 1):
            weights.apply([Part("a", count)])
            outcomes.append(base.unet(x[:count], timesteps[:count], prompts[:count]).sample[0])
        assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)
    finally:
        weights.release()


@torch.no_grad()
def test_layers_that_read_alike_are_computed_once_and_others_for_themselves() -> None:
    """Which they are says the tensor, not its values; nothing is kept from call to call."""
    layers = [nn.Linear(8, size) for size in (4, 6)]
    exact = Exact(*layers)
    asked: list[Tensor] = []

    def computed(x: Tensor) -> Tensor:
        asked.append(x)
        return exact(x)

    joined = JoinedLayers(computed, exact.out_sizes)
    x, other = torch.randn(2, 8), torch.randn(2, 8)
    for place, layer in enumerate(layers):
        torch.testing.assert_close(joined.outcome(place, x), layer(x))
    assert len(asked) == 1
    torch.testing.assert_close(joined.outcome(1, other), layers[1](other))
    torch.testing.assert_close(joined.outcome(0, x), layers[0](x))
    assert len(asked) == 3
    joined.forget()
    joined.outcome(0, x)
    assert len(asked) == 4
