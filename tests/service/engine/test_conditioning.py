"""What timesteps and prompts become is made once a job, and to the bit what steps would make."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from realfill.base import Base
from service.engine.conditioning import Together
from service.engine.fused import FusedWeights
from service.engine.program import PartedNetwork
from service.engine.runner import Runner
from service.engine.weights import Part, SpoiltWeights
from tests.service.engine.test_mixing import begun, drawn, job_for
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As the engine runs."""
    with torch.no_grad():
        yield


@pytest.fixture
def base() -> Base:
    """A tiny base of its own for each test."""
    return tiny_base()


def network_of(base: Base) -> PartedNetwork:
    """What fused weights put in the place of the U-Net's forward."""
    network = vars(base.unet)["forward"]
    assert isinstance(network, PartedNetwork)
    return network


class Counting:
    """Goes a layer's own way and counts the rows of each call."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self.rows: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's outcome."""
        self.rows.append(x.shape[:-1].numel())
        outcome: Tensor = self.own(x)
        return outcome


def test_the_network_predicts_the_same_from_what_was_made_before(base: Base) -> None:
    """To the bit, for every number of steps and whether or not samples share a prompt."""
    weights = FusedWeights(base.unet, base.adapter_modules, budget_bytes=2**30)
    try:
        weights.take("a", tiny_adapter(base, seed=1))
        weights.apply([Part("a", 3)])
        x, prompt = torch.randn(3, 9, 4, 4), torch.randn(77, 16)
        for steps in (3, 15, 16, 50):
            timesteps = torch.randint(1000, (steps,))
            made = weights.conditioned("a", timesteps, prompt)
            assert made is not None
            assert made.times.shape[0] == steps
            plain = base.unet(x, timesteps[:3], prompt.expand(3, -1, -1)).sample
            for prompts in ([made.prompts] * 3, [made.prompts.clone() for _ in range(3)]):
                assert torch.equal(base.unet(x, made.times[:3], prompts).sample, plain)
        other = network_of(base).conditioned(timesteps, prompt[None], None)
        assert other is not None
        assert not torch.allclose(other.prompts[0], made.prompts)
    finally:
        weights.release()
    assert "get_time_embed" not in vars(base.unet)


def test_steps_make_nothing_of_timesteps_and_prompts(base: Base) -> None:
    """Only a job's beginning does, all its steps in one product."""
    runner = Runner(base)
    conditioning = network_of(base).conditioning
    assert conditioning is not None
    times, prompts = Counting(conditioning._times.layer), Counting(conditioning._prompts.layer)
    object.__setattr__(conditioning._times, "layer", times)
    object.__setattr__(conditioning._prompts, "layer", prompts)
    samples = begun(runner, job_for(base, "a", 1, steps=5))
    for _ in range(5):
        runner.step(samples)
    assert (times.rows, prompts.rows) == ([5], [77])


def test_spoilt_weights_condition_no_job(base: Base) -> None:
    """A write that came before the job is noticed when it begins, and mended."""
    runner = Runner(base)
    expected = drawn(runner, [job_for(base, None, 1)])[0]
    with torch.no_grad():
        next(m for m in base.unet.modules() if isinstance(m, Attention)).to_k.weight.add_(1)
    with pytest.raises(SpoiltWeights):
        runner.begin(job_for(base, None, 1))
    assert torch.equal(drawn(runner, [job_for(base, None, 1)])[0], expected)


@pytest.mark.parametrize("reader", ["prompts", "timesteps"])
def test_what_something_else_reads_is_left_to_the_steps(base: Base, reader: str) -> None:
    """And drawn all the same."""
    if reader == "prompts":
        block = next(m for m in base.unet.modules() if isinstance(m, BasicTransformerBlock))
        block.norm2 = nn.Identity()
    else:
        base.unet.time_embed_act = nn.SiLU()
    x, timesteps, prompts = torch.randn(2, 9, 4, 4), torch.tensor([500, 3]), torch.randn(2, 77, 16)
    expected = base.unet(x, timesteps, prompts).sample
    weights = FusedWeights(base.unet, base.adapter_modules, budget_bytes=2**30)
    try:
        assert weights.conditioned(None, timesteps, prompts[0]) is None
        outcome = base.unet(x, timesteps, prompts).sample
    finally:
        weights.release()
    torch.testing.assert_close(outcome, expected, rtol=1e-4, atol=1e-5)
    runner = Runner(base)
    one = drawn(runner, [job_for(base, "a", 1)])[0]
    together = drawn(runner, [job_for(base, "a", 1), job_for(base, "b", 2)])[0]
    assert torch.equal(one, together)


def test_prompts_are_brought_together_once_for_the_same_samples() -> None:
    """The next step finds them; other samples, or the same in another order, get their own."""
    together = Together()
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    first = together.of([one, other])
    assert torch.equal(first, torch.stack([one, other]))
    assert together.of([one, other]) is first
    assert torch.equal(together.of([other, one]), torch.stack([other, one]))
    assert together.of([one, other]) is first
    assert torch.equal(together.of([one, other, other]), torch.stack([one, other, other]))
    assert torch.equal(together.of([one, one.clone()]), torch.ones(2, 2, 3))
    assert together.of([one, one]).data_ptr() == one.data_ptr()


def test_prompts_that_were_brought_together_go_with_the_first_ones_job() -> None:
    """Nothing of a scene that was forgotten stays behind, and none is taken for another."""
    together = Together()
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    made = weakref.ref(together.of([one, other]))
    assert made() is not None
    del other
    assert torch.equal(together.of([one, torch.full((2, 3), 5.0)])[1], torch.full((2, 3), 5.0))
    assert made() is None
    made = weakref.ref(together.of([one, torch.zeros(2, 3)]))
    del one
    assert made() is None
