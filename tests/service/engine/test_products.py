"""On a CPU layers may multiply in bfloat16: quicker, in half the memory, and the same pictures."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.engine.adapters import random_adapter
from benchmarks.engine.rates import job_of
from realfill.base import Base, load_base
from service.engine.runner import Runner
from tests.products import MULTIPLIES_BFLOAT16

pytestmark = pytest.mark.skipif(
    not MULTIPLIES_BFLOAT16, reason="this CPU does not multiply in bfloat16"
)


def _drawn(base: Base) -> tuple[torch.Tensor, int]:
    """Pictures of an adapted scene, and what its weights take. [N, 3, S, S]"""
    adapter = random_adapter(base, rank=8, seed=1)
    job = dataclasses.replace(
        job_of(base, samples=2, steps=4), digest="a" * 64, adapter=adapter, sampler="ddim"
    )
    runner = Runner(base)
    try:
        return runner.run(job).samples, runner.weights.tiers()["device"].held_bytes
    finally:
        runner.release()


def test_pictures_are_those_of_float32_and_weights_take_half() -> None:
    """Nobody sees the difference: 50 dB is less than one level of eight bits."""
    base = load_base("nano")
    exact, exact_bytes = _drawn(base)
    rough, rough_bytes = _drawn(dataclasses.replace(base, products=torch.bfloat16))
    assert not torch.equal(exact, rough)
    assert -10 * torch.log10((exact - rough).square().mean()) > 50
    assert rough_bytes == exact_bytes / 2
