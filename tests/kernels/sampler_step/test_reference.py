"""sampler_step on the CPU: the samplers' own arithmetic, bit by bit, and the packed input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.sampler_step import sampler_step, sampler_step_
from realfill.complete.samplers import advance, sampler

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
SCHEDULER |= {"beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(*steps: tuple[str, int]) -> Tensor:
    """The rows of these steps of these samplers, each of 20 steps. [N, 6]"""
    return torch.stack(
        [sampler(name, SCHEDULER, 20).coefficients[step] for name, step in steps]
    ).float()


def test_step_of_small_integers_is_exact() -> None:
    """A case small enough to follow by hand."""
    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    parts = [torch.full((1, 1, 1, 1), value) for value in (1.0, 10.0, 100.0, 1000.0)]
    known = torch.tensor([7.0, 8.0]).view(1, 2, 1, 1)
    following, x0, packed = sampler_step(
        rows, parts[0], parts[1], known, history=parts[2], noise=parts[3]
    )
    assert float(following) == 1 + 20 + 300 + 4000
    assert float(x0) == 5 + 60
    assert packed.flatten().tolist() == [4321.0, 7.0, 8.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("history", "noise"), [(True, True), (True, False), (False, False)])
def test_step_is_that_of_the_samplers(
    history: bool, noise: bool, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    """Samples of three samplers at different steps: advance's bits, and the U-Net's input."""
    rows = rows_of(("ddpm", 3), ("ddim", 19), ("dpm++2m", 7))
    latents, known = draw(1, 3, 4, 9, 7), draw(2, 3, 5, 9, 7)
    prediction = draw(3, 3, 4, 9, 7).to(dtype).contiguous(memory_format=memory_format)
    before = draw(4, 3, 4, 9, 7) if history else None
    fresh = draw(5, 3, 4, 9, 7) if noise else None
    following, x0, packed = sampler_step(
        rows, latents, prediction, known, history=before, noise=fresh, memory_format=memory_format
    )
    wanted, wanted_x0 = advance(rows, latents, prediction, before, fresh)
    assert torch.equal(following, wanted)
    assert torch.equal(x0, wanted_x0)
    assert packed.dtype == dtype
    assert packed.is_contiguous(memory_format=memory_format)
    assert torch.equal(packed, torch.cat([wanted, known], 1).to(dtype))


def test_step_may_overwrite_what_it_reads() -> None:
    """The latents make place for the next, and the history for this step's x0."""
    rows = rows_of(("dpm++2m", 4), ("ddpm", 0))
    latents, history = draw(1, 2, 4, 5, 5), draw(2, 2, 4, 5, 5)
    prediction, noise, known = draw(3, 2, 4, 5, 5), draw(4, 2, 4, 5, 5), draw(5, 2, 5, 5, 5)
    wanted = sampler_step(rows, latents, prediction, known, history=history, noise=noise)
    packed = torch.empty(2, 9, 5, 5)
    sampler_step_(latents, history, packed, rows, latents, prediction, known, history, noise)
    for ours, expected in zip((latents, history, packed), wanted, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"latents": torch.zeros(2, 4, 9)}, r"pass \[N, C, h, w\]"),
        ({"rows": torch.zeros(3, 6)}, r"pass float32 of shape \(2, 6\)"),
        ({"rows": torch.zeros(2, 6).double()}, "rows is torch.float64"),
        ({"prediction": torch.zeros(2, 3, 3, 3)}, r"prediction is \(2, 3, 3, 3\)"),
        ({"history": torch.zeros(1, 4, 3, 3)}, "pass one shape"),
        ({"noise": torch.zeros(2, 4, 3, 3, device="meta")}, "move it"),
        ({"known": torch.zeros(2, 5, 4, 3)}, r"known is \(2, 5, 4, 3\)"),
        ({"known": torch.zeros(2, 5, 3, 3, dtype=torch.int64)}, "pass a floating tensor"),
        ({"following": torch.zeros(2, 4, 3, 3).half()}, "following is torch.float16"),
        ({"x0": torch.zeros(2, 4, 3, 6)[..., ::2]}, "x0 is .* pass contiguous float32"),
        ({"packed": torch.zeros(2, 8, 3, 3)}, r"pass \(2, 9, 3, 3\)"),
        ({"packed": torch.zeros(2, 9, 3, 6)[..., ::2]}, "contiguous or channels-last"),
        ({"packed": torch.zeros(2, 9, 3, 3, dtype=torch.int8)}, "packed is torch.int8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    """Each fault is named with the value and what to pass."""
    latents = torch.zeros(2, 4, 3, 3)
    arguments: dict[str, Any] = {
        "following": torch.empty_like(latents),
        "x0": torch.empty_like(latents),
        "packed": torch.empty(2, 9, 3, 3),
        "rows": torch.zeros(2, 6),
        "latents": latents,
        "prediction": latents,
        "known": torch.zeros(2, 5, 3, 3),
    }
    with pytest.raises(ValueError, match=says):
        sampler_step_(**{**arguments, **changes})


def test_shapes_are_checked_before_memory_is_made() -> None:
    """Without four dimensions there is no shape of the U-Net's input."""
    latents = torch.zeros(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"\[N, C, h, w\] and \[N, K, h, w\]"):
        sampler_step(torch.zeros(2, 6), latents, latents, torch.zeros(2, 5))
