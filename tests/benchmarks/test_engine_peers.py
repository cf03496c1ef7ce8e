"""The engine's peers on a tiny base: each computes what ours does, and leaves the base plain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.engine.peers import (
    INFER_STEPS,
    checked_difference,
    extrapolated,
    measure_hotswap,
    measure_infer,
    measure_mixed,
)
from benchmarks.engine.rates import job_of, loop
from realfill.base import Base
from tests.tiny import tiny_base

# diffusers' scheduler hands a tensor to numpy.
NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def plain_again(base: Base, work: Callable[[], object]) -> None:
    """Do something with a base, and hold its U-Net against what it was."""
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    work()
    after = base.unet.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_hotswap_predicts_what_ours_does() -> None:
    """Five timed swaps after two that warm up."""
    base = tiny_base()
    measured = []
    plain_again(base, lambda: measured.append(measure_hotswap(base, rank=2, repeats=5)))
    assert len(measured[0].peer_s) == 5
    assert min(measured[0].peer_s) > 0
    assert measured[0].difference < 0.01


# PEFT warns of what is meant here: several adapters in one model.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_a_mixed_batch_predicts_each_sample_with_its_own_adapter() -> None:
    """Four scenes in one batch by PEFT are what each alone is by ours."""
    base = tiny_base()
    measured = []
    plain_again(base, lambda: measured.append(measure_mixed(base, batch=4, rank=2, repeats=3)))
    [steps] = measured
    assert [len(steps.mixed_s), len(steps.single_s), len(steps.fused_s)] == [3, 3, 3]
    assert steps.difference < 0.01


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    """A hundredth of what the adapter changes is allowed, two are not; nor is no change at all."""
    base, plain = tiny_base(), torch.zeros(4)
    ours = torch.tensor([0.0, 1.0, -2.0, 0.5])
    assert checked_difference(base, plain, ours, ours + 0.018, "peer") == pytest.approx(0.009)
    with pytest.raises(RuntimeError, match=r"peer: .* differ by 0\.02 of what"):
        checked_difference(base, plain, ours, ours + 0.04, "peer")
    with pytest.raises(RuntimeError, match="peer: "):
        checked_difference(base, plain, plain, plain, "peer")


@NUMPY
def test_the_public_settings_are_extrapolated_and_say_so() -> None:
    """Sixteen images of 200 steps, from 1 and 2 steps of one: the whole is far above its parts."""
    base = tiny_base()
    found = measure_infer(base, images=16, repeats=1, measured=(1, 2))
    assert len(found.seconds) == 1
    assert min(found.seconds) > 0
    for words in ("float32", "DDPM", f"{INFER_STEPS} steps", "extrapolated from 1 and 2 steps"):
        assert words in found.peer
    with pytest.raises(ValueError, match="two rising numbers"):
        measure_infer(base, images=1, repeats=1, measured=(3, 3))


def test_the_extrapolation_is_a_straight_line() -> None:
    """With 1 s for encoding and decoding and 0.5 s a step, 200 steps take 101 s."""
    assert extrapolated(200, (2, 2.0), (8, 5.0)) == pytest.approx(101)
    assert extrapolated(200, (2, 2.0), (8, 1.9)) == 2.0


@NUMPY
def test_the_loop_takes_ddpm_and_draws_its_noise_from_the_seed() -> None:
    """Twice the same image, and another than DPM-Solver++ gives."""
    base = tiny_base()
    job = job_of(base, samples=1, steps=3)
    one, again = (loop(base, job, batch=1, scheduler=base.scheduler) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, loop(base, job, batch=1), atol=1e-3)
