"""DDPM, DDIM and DPM-Solver++ as pure functions over tables, each sample at its own step.

Every one of these samplers is linear in what a step knows: the latents, the prediction of the
U-Net, the x0 predicted one step before, and fresh noise. So a sampler is a table with one row of
coefficients per step, and a step gathers one row per sample. Nothing is remembered between steps
but what the caller holds, hence samples may join, leave and stand at different steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from realfill.errors import BaseUnavailable

SamplerName = Literal["ddpm", "ddim", "ddim-quadratic", "dpm++2m", "dpm++2m-sde"]
# They draw noise at every step.
STOCHASTIC = ("ddpm", "dpm++2m-sde")
PredictionType = Literal["epsilon", "v_prediction"]

# DPM-Solver++ works with log(alpha / sigma), which is infinite where the terminal SNR is zero.
# The smallest positive half-precision number stands in for it, as in diffusers.
SMALLEST_ALPHA_BAR = 2.0**-24


@dataclass(frozen=True, eq=False)
class Sampler:
    """One sampler with one number of steps, ready to use.

    Attributes:
        name: ddpm, ddim, ddim-quadratic, dpm++2m or dpm++2m-sde.
        prediction_type: What the U-Net predicts: epsilon or v_prediction.
        timesteps: What to give the U-Net at each step, falling. [S]
        coefficients: One row per step. The next latents are the sum of row[0] * latents,
            row[1] * prediction, row[2] * the x0 of the step before and row[3] * noise; the x0 of
            this step is row[4] * latents + row[5] * prediction. [S, 6]
        stochastic: Whether steps need noise.

    Source: Ho et al., arXiv:2006.11239; Song et al., arXiv:2010.02502, whose appendix D.2 has the
    quadratic timesteps; Lu et al., arXiv:2211.01095.
    """

    name: SamplerName
    prediction_type: PredictionType
    timesteps: Tensor
    coefficients: Tensor
    stochastic: bool

    @property
    def steps(self) -> int:
        """Number of steps from noise to x0."""
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> Sampler:
        """The same sampler with its tables on another device."""
        return Sampler(
            self.name,
            self.prediction_type,
            self.timesteps.to(device),
            self.coefficients.to(device),
            self.stochastic,
        )

    def start(self, noise: Tensor) -> Tensor:
        """Turn standard normal noise into the latents of step 0, in float32. [N, C, h, w]"""
        return noise.float()

    def step(
        self,
        latents: Tensor,
        prediction: Tensor,
        index: Tensor,
        history: Tensor | None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Advance every sample by one step, each from its own.

        Args:
            latents: Where the samples stand. [N, C, h, w]
            prediction: Output of the U-Net at `timesteps[index]`. [N, C, h, w]
            index: Step of each sample, from 0 to steps - 1. [N], int64
            history: What the step before returned as history; None where all samples are at step 0,
                and of any finite value for those that are. [N, C, h, w]
            noise: Fresh standard normal noise, see `noise_for`; needed if `stochastic`.
                [N, C, h, w]

        Returns:
            The next latents, and the history, which is the x0 predicted at this step: after the
            last step both are the same. [N, C, h, w] each, float32

        Raises:
            ValueError: A stochastic sampler was given no noise.
        """
        if self.stochastic and noise is None:
            raise ValueError(
                f"noise is None, but {self.name} draws noise at every step; pass noise_for(...)"
            )
        return advance(self.coefficients[index], latents, prediction, history, noise)


def advance(
    rows: Tensor,
    latents: Tensor,
    prediction: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One step of every sample with the row of coefficients that belongs to it.

    The rows may come from different samplers. Multiplications and additions stay separate
    operations, so that a sample's value does not depend on its place in the batch.

    Args:
        rows: One row of `Sampler.coefficients` for each sample. [N, 6]
        latents, prediction, history, noise: As in `Sampler.step`. [N, C, h, w]

    Returns:
        The next latents and the predicted x0. [N, C, h, w] each, float32
    """
    latents, prediction = latents.float(), prediction.float()
    shape = (-1,) + (1,) * (latents.dim() - 1)
    of_latents, of_prediction, of_history, of_noise, x0_latents, x0_prediction = (
        column.reshape(shape) for column in rows.unbind(1)
    )
    x0 = x0_latents * latents + x0_prediction * prediction
    following = of_latents * latents + of_prediction * prediction
    if history is not None:
        following = following + of_history * history.float()
    if noise is not None:
        following = following + of_noise * noise.float()
    return following, x0


def noise_for(seed: int, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise that depends on nothing but a sample's seed and the draw.

    It is drawn on the CPU, so that a seed means the same image on every device, at every batch
    position, and when a trajectory is taken up again in the middle.

    Args:
        seed: Seed of the sample, any integer.
        draw: 0 for the start, i + 1 for the noise of step i.
        shape: Of the noise, for example (C, h, w).

    Returns:
        Noise of that shape, float32, on the CPU.
    """
    digest = hashlib.blake2b(f"{seed}:{draw}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(tuple(shape), generator=generator)


def sampler(name: str, scheduler_config: Mapping[str, Any], steps: int) -> Sampler:
    """Build a sampler from the configuration of the scheduler that comes with a base.

    Equal to the diffusers scheduler of that configuration within float32 rounding, except that x0
    is never clipped (latents have no fixed range) and DPM-Solver++ always uses trailing spacing,
    since leading spacing starts few steps far from pure noise.

    Args:
        name: ddpm, ddim, ddim-quadratic, dpm++2m or dpm++2m-sde.
        scheduler_config: Read are num_train_timesteps, beta_start, beta_end, beta_schedule
            (linear or scaled_linear), trained_betas, rescale_betas_zero_snr, prediction_type,
            timestep_spacing (leading or trailing), steps_offset and set_alpha_to_one.
        steps: Number of U-Net calls, from 1 to num_train_timesteps.

    Raises:
        ValueError: The name is unknown, or the number of steps out of range.
        BaseUnavailable: The configuration asks for something that no sampler here does.
    """
    if name not in get_args(SamplerName):
        raise ValueError(f"sampler {name!r} is unknown; use one of {get_args(SamplerName)}")
    train_steps = int(scheduler_config.get("num_train_timesteps", 1000))
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps is {steps}; use 1 to {train_steps}")
    prediction_type = scheduler_config.get("prediction_type", "epsilon")
    if prediction_type not in get_args(PredictionType):
        raise BaseUnavailable(
            f"prediction_type of the scheduler is {prediction_type!r}; "
            f"use a base with one of {get_args(PredictionType)}"
        )
    alpha_bars = _alpha_bars(scheduler_config)
    timesteps = _timesteps(name, scheduler_config, train_steps, steps)
    if prediction_type == "epsilon" and float(alpha_bars[timesteps[0]]) == 0.0:
        raise BaseUnavailable(
            f"prediction_type is 'epsilon', but timestep {timesteps[0]} is pure noise (zero "
            "terminal SNR), from which eps tells nothing of x0; use a v_prediction base"
        )
    if name == "ddpm":
        rows = _ddpm_rows(alpha_bars, timesteps, prediction_type)
    elif name.startswith("ddim"):
        stride = train_steps // steps
        # As in diffusers, a step leads one stride back, which is not quite the next timestep where
        # trailing spacing does not divide the training steps evenly.
        following = [timestep - stride for timestep in timesteps]
        if name == "ddim-quadratic":
            following = [*timesteps[1:], -1]
        after_last = _ddim_last_alpha_bar(scheduler_config, alpha_bars)
        rows = _ddim_rows(alpha_bars, timesteps, following, prediction_type, after_last)
    else:
        rows = _dpm_rows(alpha_bars, timesteps, prediction_type, sde=name == "dpm++2m-sde")
    return Sampler(
        name=name,  # type: ignore[arg-type]  # checked against the literal above
        prediction_type=prediction_type,
        timesteps=torch.tensor(timesteps, dtype=torch.long),
        coefficients=torch.tensor(rows, dtype=torch.float64).float(),
        stochastic=name in STOCHASTIC,
    )


def _alpha_bars(config: Mapping[str, Any]) -> Tensor:
    """Share of signal variance at each training timestep, as float32 arithmetic gives it. [T]

    The base was trained with float32 tables; float64 would be another schedule.
    """
    train_steps = int(config.get("num_train_timesteps", 1000))
    first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    schedule = config.get("beta_schedule", "linear")
    trained = config.get("trained_betas")
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float32)
    elif schedule == "linear":
        betas = torch.linspace(first, last, train_steps)
    elif schedule == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, train_steps) ** 2
    else:
        raise BaseUnavailable(
            f"beta_schedule of the scheduler is {schedule!r}; use a base with 'linear' or "
            "'scaled_linear'"
        )
    if config.get("rescale_betas_zero_snr", False):
        betas = _without_terminal_signal(betas)
    return torch.cumprod(1.0 - betas, dim=0)


def _without_terminal_signal(betas: Tensor) -> Tensor:
    """Shift and stretch the schedule until its last timestep is pure noise. [T]

    Source: Lin et al., arXiv:2305.08891, algorithm 1.
    """
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    bars = roots**2
    return 1.0 - torch.cat([bars[:1], bars[1:] / bars[:-1]])


def _timesteps(name: str, config: Mapping[str, Any], train_steps: int, steps: int) -> list[int]:
    """Training timesteps that a trajectory visits, falling. [S]"""
    if name == "ddim-quadratic":
        squares = [((k + 1) / steps) ** 2 * train_steps for k in range(steps)]
        # Rounded half up; where squares lie closer than timesteps, one timestep after the other.
        return [max(math.floor(square + 0.5) - 1, k) for k, square in enumerate(squares)][::-1]
    spacing = "trailing" if name.startswith("dpm++") else config.get("timestep_spacing", "leading")
    if spacing == "leading":
        stride = train_steps // steps
        offset = int(config.get("steps_offset", 0))
        timesteps = [i * stride + offset for i in reversed(range(steps))]
    elif spacing == "trailing":
        timesteps = [round(train_steps - i * (train_steps / steps)) - 1 for i in range(steps)]
    else:
        raise BaseUnavailable(
            f"timestep_spacing of the scheduler is {spacing!r}; use 'leading' or 'trailing'"
        )
    if timesteps[0] >= train_steps:
        raise ValueError(
            f"{steps} steps with steps_offset {config.get('steps_offset')} start at timestep "
            f"{timesteps[0]} of {train_steps}; use fewer steps"
        )
    return timesteps


def _x0_of(alpha_bar: float, prediction_type: str) -> tuple[float, float]:
    """Coefficients of x0 = a * latents + b * prediction."""
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
    if prediction_type == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    return alpha, -sigma


def _eps_of(alpha_bar: float, prediction_type: str) -> tuple[float, float]:
    """Coefficients of eps = a * latents + b * prediction."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    return math.sqrt(1.0 - alpha_bar), math.sqrt(alpha_bar)


def _ddpm_rows(
    alpha_bars: Tensor, timesteps: list[int], prediction_type: str
) -> list[tuple[float, ...]]:
    """Ancestral sampling with the posterior variance ("fixed_small"); the last step gives x0."""
    rows: list[tuple[float, ...]] = []
    for i, timestep in enumerate(timesteps):
        bar = float(alpha_bars[timestep])
        last = i + 1 == len(timesteps)
        next_bar = 1.0 if last else float(alpha_bars[timesteps[i + 1]])
        alpha, beta = bar / next_bar, 1.0 - bar / next_bar
        of_x0 = math.sqrt(next_bar) * beta / (1.0 - bar)
        of_latents = math.sqrt(alpha) * (1.0 - next_bar) / (1.0 - bar)
        of_noise = math.sqrt((1.0 - next_bar) / (1.0 - bar) * beta)
        a, b = _x0_of(bar, prediction_type)
        rows.append((of_latents + of_x0 * a, of_x0 * b, 0.0, of_noise, a, b))
    return rows


def _ddim_last_alpha_bar(config: Mapping[str, Any], alpha_bars: Tensor) -> float:
    """Where DDIM ends: at x0, or where `set_alpha_to_one` is off, at the first training step."""
    return 1.0 if config.get("set_alpha_to_one", True) else float(alpha_bars[0])


def _ddim_rows(
    alpha_bars: Tensor,
    timesteps: list[int],
    following: list[int],
    prediction_type: str,
    after_last: float,
) -> list[tuple[float, ...]]:
    """Deterministic DDIM (eta 0); below timestep 0 lies what comes after the last step."""
    rows: list[tuple[float, ...]] = []
    for timestep, after in zip(timesteps, following, strict=True):
        bar = float(alpha_bars[timestep])
        next_bar = float(alpha_bars[after]) if after >= 0 else after_last
        a, b = _x0_of(bar, prediction_type)
        c, d = _eps_of(bar, prediction_type)
        of_x0, of_eps = math.sqrt(next_bar), math.sqrt(1.0 - next_bar)
        rows.append((of_x0 * a + of_eps * c, of_x0 * b + of_eps * d, 0.0, 0.0, a, b))
    return rows


def _dpm_rows(
    alpha_bars: Tensor, timesteps: list[int], prediction_type: str, *, sde: bool
) -> list[tuple[float, ...]]:
    """DPM-Solver++(2M), midpoint form; the first and the last step are of first order.

    As an SDE it forgets the latents twice as fast, and noise makes up for what is missing.
    """
    bars = [max(float(alpha_bars[timestep]), SMALLEST_ALPHA_BAR) for timestep in timesteps]
    # Half the log of the signal-to-noise ratio, the time in which the solver is exact.
    times = [0.5 * math.log(bar / (1.0 - bar)) for bar in bars]
    rows: list[tuple[float, ...]] = []
    for i, bar in enumerate(bars):
        a, b = _x0_of(bar, prediction_type)
        if i + 1 == len(bars):
            rows.append((a, b, 0.0, 0.0, a, b))
            continue
        h = times[i + 1] - times[i]
        of_latents = math.sqrt((1.0 - bars[i + 1]) / (1.0 - bar)) * (math.exp(-h) if sde else 1.0)
        of_x0 = -math.sqrt(bars[i + 1]) * math.expm1(-2 * h if sde else -h)
        of_noise = math.sqrt((1.0 - bars[i + 1]) * -math.expm1(-2 * h)) if sde else 0.0
        # Extrapolate x0 along the line through this step's and the last one's.
        slope = 0.0 if i == 0 else 0.5 * h / (times[i] - times[i - 1])
        mixed = of_x0 * (1.0 + slope)
        rows.append((of_latents + mixed * a, mixed * b, -of_x0 * slope, of_noise, a, b))
    return rows
