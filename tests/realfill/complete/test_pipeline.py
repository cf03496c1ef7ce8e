"""The reference road."""

from __future__ import annotations

import torch

from realfill.complete.pipeline import complete, conditions
from service.engine import Job
from service.engine.runner import Runner
from tests.tiny import tiny_base


def window() -> tuple[torch.Tensor, torch.Tensor]:
    """A target and its mask."""
    mask = torch.zeros(32, 32)
    mask[8:20, 10:30] = 1
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)), mask


def test_seed_gives_the_same_sample_at_every_batch_position() -> None:
    """A sample depends on its seed, not on its neighbours."""
    base, (target, mask) = tiny_base(), window()
    prompt = base.embed()
    first = complete(base, target, mask, prompt, [3, 4, 5], steps=4, sampler_name="ddpm")
    second = complete(base, target, mask, prompt, [5, 3, 9], steps=4, sampler_name="ddpm")
    assert torch.equal(first[0], second[1])
    assert torch.equal(first[2], second[0])


def test_engine_draws_what_the_reference_road_draws() -> None:
    """The runner and the pipeline give equal samples for equal seeds, within rounding."""
    base, (target, mask) = tiny_base(), window()
    prompt = base.embed()
    expected = complete(base, target, mask, prompt, [1, 2], steps=5)
    job = Job(None, None, prompt, target, mask, (1, 2), 5, "dpm++2m")
    torch.testing.assert_close(Runner(base).run(job).samples, expected, rtol=0, atol=1e-4)


def test_hole_content_is_never_seen() -> None:
    """Two targets that differ in the hole alone give equal conditions."""
    base, (target, mask) = tiny_base(), window()
    other = torch.where(mask.bool(), 0.123, target)
    assert torch.equal(conditions(base, target, mask), conditions(base, other, mask))
