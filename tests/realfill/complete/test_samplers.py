"""The samplers equal the diffusers schedulers, sample by sample and step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from realfill.complete.samplers import Sampler, advance, noise_for, sampler
from realfill.errors import BaseUnavailable

# numpy 2 warns of the way in which the DPM-Solver of diffusers turns tensors into arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SD2 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
}
SD2_V = {**SD2, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
NANO = {**SD2_V, "rescale_betas_zero_snr": True}
CONFIGS = {"eps": SD2, "v": SD2_V, "v zero-snr": NANO}
SHAPE = (4, 4, 4)


def network(latents: Tensor, timesteps: Tensor) -> Tensor:
    """A smooth stand-in for a U-Net, acting on each sample alone. [N, C, h, w]"""
    phase = timesteps.double().reshape(-1, 1, 1, 1) / 400
    return torch.sin(1.5 * latents.double() + phase).float() + 0.1 * latents.flip(1)


def diffusers_scheduler(name: str, config: dict[str, Any], steps: int) -> Any:
    """The scheduler that our sampler of that name must equal."""
    if name == "ddpm":
        scheduler = DDPMScheduler.from_config(config)
    elif name == "ddim":
        scheduler = DDIMScheduler.from_config(config)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(
            config,
            solver_order=2,
            algorithm_type="sde-dpmsolver++" if name.endswith("sde") else "dpmsolver++",
            timestep_spacing="trailing",
        )
    scheduler.set_timesteps(steps)
    return scheduler


def diffusers_trajectory(
    scheduler: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Latents after each step of one sample, with our noise in place of the scheduler's."""
    draws = iter(range(1, len(scheduler.timesteps) + 1))

    def ours(shape: Any, **_: Any) -> Tensor:
        return noise_for(seed, next(draws), shape[1:]).unsqueeze(0)

    for scheduling in ("scheduling_ddpm", "scheduling_dpmsolver_multistep"):
        monkeypatch.setattr(f"diffusers.schedulers.{scheduling}.randn_tensor", ours)
    latents = noise_for(seed, 0, SHAPE).unsqueeze(0)
    trajectory = []
    for timestep in scheduler.timesteps:
        prediction = network(latents, timestep.reshape(1))
        latents = scheduler.step(prediction, timestep, latents).prev_sample
        trajectory.append(latents)
    return trajectory


def our_trajectory(ours: Sampler, seed: int) -> list[Tensor]:
    """Latents after each step of one sample."""
    latents, history = ours.start(noise_for(seed, 0, SHAPE).unsqueeze(0)), None
    trajectory = []
    for i in range(ours.steps):
        index = torch.tensor([i])
        noise = noise_for(seed, i + 1, SHAPE).unsqueeze(0)
        prediction = network(latents, ours.timesteps[index])
        latents, history = ours.step(latents, prediction, index, history, noise)
        trajectory.append(latents)
    return trajectory


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 200])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m", "dpm++2m-sde"])
def test_trajectory_equals_diffusers(
    name: str, config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every point of the trajectory is the scheduler's, to 1e-5 of the largest value in it."""
    scheduler = diffusers_scheduler(name, config, steps)
    ours = sampler(name, config, steps)
    assert ours.timesteps.tolist() == scheduler.timesteps.tolist()
    theirs = diffusers_trajectory(scheduler, seed=5, monkeypatch=monkeypatch)
    scale = max(float(point.abs().max()) for point in theirs)
    for our_point, their_point in zip(our_trajectory(ours, seed=5), theirs, strict=True):
        assert float((our_point - their_point).abs().max()) <= 1e-5 * scale


def test_quadratic_timesteps_are_the_papers() -> None:
    """tau_i = c i^2, the last of them the last that was trained; and never one twice."""
    assert sampler("ddim-quadratic", NANO, 2).timesteps.tolist() == [999, 249]
    assert sampler("ddim-quadratic", SD2, 5).timesteps.tolist() == [999, 639, 359, 159, 39]
    for steps in (1, 3, 31, 100, 333, 1000):
        timesteps = sampler("ddim-quadratic", NANO, steps).timesteps
        assert timesteps[0] == 999
        assert bool((timesteps.diff() < 0).all())
        assert timesteps[-1] >= 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_quadratic_ddim_goes_from_one_timestep_to_the_next(config: dict[str, Any]) -> None:
    """x0 and eps of every prediction, put together at the noise of the next timestep (eq. 12)."""
    ours = sampler("ddim-quadratic", config, 4)
    bars = DDIMScheduler.from_config(config).alphas_cumprod.double()
    latents = noise_for(5, 0, SHAPE).unsqueeze(0).double()
    following = [*ours.timesteps.tolist()[1:], None]
    last = bars[0] if not config.get("set_alpha_to_one", True) else torch.tensor(1.0).double()
    for timestep, after, our_point in zip(
        ours.timesteps, following, our_trajectory(ours, 5), strict=True
    ):
        prediction = network(latents.float(), timestep.reshape(1)).double()
        alpha, sigma = bars[timestep].sqrt(), (1 - bars[timestep]).sqrt()
        if config["prediction_type"] == "epsilon":
            x0, eps = (latents - sigma * prediction) / alpha, prediction
        else:
            x0, eps = alpha * latents - sigma * prediction, sigma * latents + alpha * prediction
        bar = last if after is None else bars[after]
        latents = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
        assert float((our_point - latents).abs().max()) <= 1e-5 * float(latents.abs().max())


@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim-quadratic", "dpm++2m", "dpm++2m-sde"])
@pytest.mark.parametrize("config", [SD2, NANO], ids=["eps", "v zero-snr"])
def test_samples_at_different_steps_are_bit_equal_to_samples_alone(
    name: str, config: dict[str, Any]
) -> None:
    """Samples that joined at different times stand at their own steps in one batch."""
    ours = sampler(name, config, 6)
    alone = {seed: our_trajectory(ours, seed) for seed in (1, 2, 3)}
    joined = {1: 0, 2: 2, 3: 3}
    latents = torch.stack([noise_for(seed, 0, SHAPE) for seed in joined])
    history = torch.zeros_like(latents)
    for now in range(6 + max(joined.values())):
        rows = [k for k, at in enumerate(joined.values()) if 0 <= now - at < 6]
        seeds = [list(joined)[k] for k in rows]
        index = torch.tensor([now - joined[seed] for seed in seeds])
        noise = torch.stack(
            [noise_for(s, int(i) + 1, SHAPE) for s, i in zip(seeds, index, strict=True)]
        )
        prediction = network(latents[rows], ours.timesteps[index])
        latents[rows], history[rows] = ours.step(
            latents[rows], prediction, index, history[rows], noise
        )
        for k, seed, i in zip(rows, seeds, index, strict=True):
            assert torch.equal(latents[k], alone[seed][int(i)][0])


def test_rows_of_different_samplers_share_one_batch() -> None:
    """A batch may mix samplers and step counts, since a row of coefficients says it all."""
    quick, slow = sampler("ddim", NANO, 4), sampler("dpm++2m", NANO, 10)
    latents = torch.stack([noise_for(seed, 0, SHAPE) for seed in (1, 2)])
    history = torch.stack([noise_for(seed, 9, SHAPE) for seed in (1, 2)])
    prediction = network(latents, torch.tensor([7, 9]))
    mixed, _ = advance(
        torch.stack([quick.coefficients[2], slow.coefficients[5]]),
        latents,
        prediction,
        history,
        None,
    )
    first, _ = quick.step(latents[:1], prediction[:1], torch.tensor([2]), history[:1])
    second, _ = slow.step(latents[1:], prediction[1:], torch.tensor([5]), history[1:])
    assert torch.equal(mixed, torch.cat([first, second]))


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m", "dpm++2m-sde"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_perfect_prediction_ends_at_x0(name: str, config: dict[str, Any]) -> None:
    """A network that knows the image ends exactly there, and says so as history."""
    truth = noise_for(8, 0, (2, *SHAPE))
    ours = sampler(name, config, 10)
    latents, history = ours.start(noise_for(9, 0, (2, *SHAPE))), None
    for i in range(ours.steps):
        index = torch.tensor([i, i])
        a, b = (ours.coefficients[index, k].reshape(-1, 1, 1, 1) for k in (4, 5))
        prediction = (truth - a * latents) / b
        noise = noise_for(i, 1, (2, *SHAPE))
        latents, history = ours.step(latents, prediction, index, history, noise)
        torch.testing.assert_close(history, truth, rtol=0, atol=2e-4)
    torch.testing.assert_close(latents, truth, rtol=0, atol=2e-4)


def test_zero_terminal_snr_starts_from_pure_noise_at_the_last_timestep() -> None:
    """With zero terminal SNR the first step takes nothing of x0 from the latents."""
    for name in ("ddpm", "ddim"):
        ours = sampler(name, NANO, 20)
        assert int(ours.timesteps[0]) == 999
        assert ours.coefficients[0, 4:].tolist() == [0.0, -1.0]


def test_coefficients_are_finite_for_every_step_count() -> None:
    """No step count gives an infinite coefficient, a repeated or a negative timestep."""
    for name in ("ddpm", "ddim", "dpm++2m"):
        for steps in [*range(1, 60), 333, 999, 1000]:
            ours = sampler(name, NANO, steps)
            assert ours.coefficients.isfinite().all()
            assert len(set(ours.timesteps.tolist())) == steps
            assert set(ours.timesteps.tolist()) <= set(range(1000))


def test_noise_depends_on_seed_and_draw_only() -> None:
    """The same seed and draw give the same noise; another of either gives other noise."""
    noise = noise_for(3, 1, SHAPE)
    torch.randn(5)
    assert torch.equal(noise, noise_for(3, 1, SHAPE))
    assert not torch.equal(noise, noise_for(3, 2, SHAPE))
    assert not torch.equal(noise, noise_for(4, 1, SHAPE))
    assert not torch.equal(noise_for(1, 11, SHAPE), noise_for(11, 1, SHAPE))
    assert not torch.equal(noise_for(2**40, 0, SHAPE), noise_for(0, 0, SHAPE))
    assert not torch.equal(noise_for(-1, 0, SHAPE), noise_for(1, 0, SHAPE))
    assert abs(float(noise_for(0, 0, (100, 100)).std()) - 1.0) < 0.02


def test_clip_sample_in_the_configuration_is_ignored() -> None:
    """Latents are never clipped, even where the configuration of the base asks for it."""
    plain, clipped = (sampler("ddpm", {**SD2, "clip_sample": clip}, 10) for clip in (False, True))
    assert torch.equal(plain.coefficients, clipped.coefficients)


def test_trained_betas_and_unfinished_ddim_equal_diffusers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Explicit betas are used, and set_alpha_to_one off ends DDIM at the first timestep."""
    betas = torch.linspace(0.001, 0.02, 1000).tolist()
    config = {**SD2, "trained_betas": betas, "set_alpha_to_one": False}
    theirs = diffusers_trajectory(diffusers_scheduler("ddim", config, 20), 1, monkeypatch)
    ours = our_trajectory(sampler("ddim", config, 20), 1)
    scale = max(float(point.abs().max()) for point in theirs)
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=0, atol=1e-5 * scale)


def test_bad_arguments_are_refused_with_a_remedy() -> None:
    """Unknown names, step counts out of range and unusable configurations are refused."""
    with pytest.raises(ValueError, match="'euler' is unknown; use one of"):
        sampler("euler", SD2, 20)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="use 1 to 1000"):
            sampler("ddim", SD2, steps)
    with pytest.raises(ValueError, match="use fewer steps"):
        sampler("ddim", SD2, 1000)
    with pytest.raises(BaseUnavailable, match="beta_schedule"):
        sampler("ddim", {**SD2, "beta_schedule": "cosine"}, 20)
    with pytest.raises(BaseUnavailable, match="timestep_spacing"):
        sampler("ddim", {**SD2, "timestep_spacing": "linspace"}, 20)
    with pytest.raises(BaseUnavailable, match="prediction_type"):
        sampler("ddim", {**SD2, "prediction_type": "sample"}, 20)
    with pytest.raises(BaseUnavailable, match="pure noise"):
        sampler("dpm++2m", {**NANO, "prediction_type": "epsilon"}, 20)


def test_ddpm_without_noise_is_refused() -> None:
    """A forgotten noise argument fails instead of giving a blurred image."""
    latents = noise_for(0, 0, (1, *SHAPE))
    with pytest.raises(ValueError, match="ddpm draws noise"):
        sampler("ddpm", SD2, 5).step(latents, latents, torch.tensor([0]), None)
