"""The training loop: photographs of a scene in, a capsule out."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from realfill.adapt.lora import drop, drop_elements, factors_in, parameters_of, read_out, restore
from realfill.adapt.loss import noisy, target_of, timesteps_of, weighted_error
from realfill.adapt.pool import Draws, Views, blank, draw
from realfill.adapt.probe import new_probe, reading
from realfill.adapter import Adapter
from realfill.base import PROMPT, Base, attention_for_training
from realfill.capsule import Capsule, CapsuleHeader, write_capsule
from realfill.complete.windows import crop_mask, window_of
from realfill.config import TrainingConfig
from realfill.errors import TrainingDiverged
from realfill.scene import Scene

logger = logging.getLogger(__name__)

CHECKPOINT_EVERY = 50
# A capsule that changes nothing would be none.
LEAST_STRENGTH = 0.1


@dataclass(frozen=True)
class Record:
    """What one step tells.

    Attributes:
        step: Steps done, from 1 to ``steps``.
        loss: Running mean of the training loss.
        probe: Loss on the fixed probe, where it was read.
        capsule: The finished capsule, on the last record alone.
    """

    step: int
    steps: int
    loss: float
    probe: float | None = None
    capsule: bytes | None = None


def train(
    base: Base, scene: Scene, config: TrainingConfig, *, checkpoint: Path | None = None
) -> Iterator[Record]:
    """Fit factors to a scene, a record a step; the last record carries the capsule.

    The same base, scene and configuration give the same bytes, also when a run was interrupted and
    resumed from its checkpoint: every step's draws follow from the seed and the step alone.

    Args:
        base: The frozen model; it is left as it was.
        scene: References, target and mask.
        config: Preset or changes to it.
        checkpoint: File to resume from and to save to every 50 steps and behind the last; each
            scene and configuration has its own beside it, so that another run leaves it alone. It
            is removed once whoever asks goes on behind the last record: until then the capsule may
            not have been written.

    Raises:
        TrainingDiverged: The loss is no longer finite.

    Source: RealFill, arXiv:2309.16668, section 3.
    """
    base.unet.to(memory_format=torch.channels_last)
    with ExitStack() as stack, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        stack.enter_context(attention_for_training(base.unet))
        run = _Run(base, scene, config, stack)
        checkpoint = checkpoint and run.own(checkpoint)
        begin = run.resume(checkpoint)
        for step in range(begin, config.steps):
            probe = run.read_probe(step)
            run.step(step)
            if checkpoint and ((step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == config.steps):
                run.keep(checkpoint, step + 1)
            if step + 1 < config.steps:
                yield Record(step + 1, config.steps, run.running, probe)
        last = run.read_probe(config.steps)
        strength = _strength(base, scene, config)
        run.set_strength(strength)
        report = _report(base, config, run.readings) | {"strength": strength}
        capsule = _capsule(base, scene, config, report)
    yield Record(config.steps, config.steps, run.running, last, write_capsule(capsule))
    if checkpoint:
        checkpoint.unlink(missing_ok=True)


class _Run:
    """Factors, optimizer and draws of one training run, and its checkpoint.

    Attributes:
        running: Running mean of the loss.
        readings: Of the probe, by step.
    """

    def __init__(self, base: Base, scene: Scene, config: TrainingConfig, stack: ExitStack) -> None:
        self.base, self.scene, self.config = base, scene, config
        self.layers = stack.enter_context(factors_in(base.unet, base.adapter_modules, config))
        text_layers: list[Any] = []
        if config.rate_text:
            inside = factors_in(base.text_encoder, base.text_adapter_modules, config)
            text_layers = stack.enter_context(inside)
        self.text_layers = text_layers
        self.groups = [parameters_of(self.layers), parameters_of(text_layers)]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        rates = (config.rate_unet, config.rate_text)
        pairs = zip(self.groups, rates, strict=True)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rate, "peak": rate} for group, rate in pairs if group],
            betas=(0.9, 0.999),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.source = _Source(base, scene, config)
        self.probe = None
        if config.probe_every:
            self.probe = new_probe(base, scene, config.seed, zoom=config.zoom)
        self.readings: dict[str, float] = {}
        self.running = 0.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All factors."""
        return [parameter for group in self.groups for parameter in group]

    def step(self, step: int) -> None:
        """One optimizer step, whose draws follow from the seed and the step."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        # PEFT's element-wise dropout draws from the global generator.
        torch.manual_seed(generator.initial_seed())
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * _decay(step, config)
        drop(self.layers, config, generator)
        drop_elements([*self.layers, *self.text_layers])
        loss = _loss(self.base, self.source.next(generator), config, generator)
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"The loss of scene {self.scene.name!r} is {loss.item()} at step {step}: "
                f"train again with rate_unet below {config.rate_unet:g}."
            )
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()
        for parameter in self.parameters:
            if parameter.grad is None:
                # Of a branch that was off: no gradient is one of 0, by which momentum fades.
                parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
        self.optimizer.step()
        self.running = 0.95 * self.running + 0.05 * loss.item() if self.running else loss.item()

    def read_probe(self, step: int) -> float | None:
        """Loss on the fixed probe, at every ``probe_every``-th step and at the end."""
        due = step == self.config.steps or (
            self.probe is not None and step % self.config.probe_every == 0
        )
        if self.probe is None or not due:
            return None
        self.set_strength(1.0)
        quick = self.base.dtype == torch.bfloat16
        with torch.autocast(self.base.device.type, torch.bfloat16, enabled=quick):
            loss = reading(self.base, self.probe, self.base.embed(PROMPT).detach())
        self.readings[str(step)] = loss
        return loss

    def set_strength(self, strength: float) -> None:
        """Switch every branch on, at a share of its full strength."""
        restore(self.layers, self.config, strength)
        restore(self.text_layers, self.config, strength)

    def own(self, checkpoint: Path) -> Path:
        """The checkpoint of this scene and configuration: beside the given one, by its name."""
        mark = hashlib.sha256(self._identity().encode()).hexdigest()[:8]
        return checkpoint.with_name(f"{checkpoint.stem}-{mark}{checkpoint.suffix}")

    def keep(self, checkpoint: Path, step: int) -> None:
        """Save where the run stands, entirely or not at all."""
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        draft = checkpoint.with_suffix(".part")
        state = {
            "identity": self._identity(),
            "step": step,
            "running": self.running,
            "readings": self.readings,
            "factors": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
        }
        with draft.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(checkpoint)

    def resume(self, checkpoint: Path | None) -> int:
        """Steps already done by an interrupted run of the same scene and configuration."""
        if checkpoint is None or not checkpoint.exists():
            return 0
        try:
            kept = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  # half a file can be anything to the unpickler
            logger.warning(
                "The checkpoint %s cannot be read, so training begins anew: %s", checkpoint, error
            )
            return 0
        if kept["identity"] != self._identity():
            return 0
        for parameter, value in zip(self.parameters, kept["factors"], strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(kept["optimizer"])
        self.readings, self.running = dict(kept["readings"]), float(kept["running"])
        return int(kept["step"])

    def _identity(self) -> str:
        scene, base = self.scene, self.base.fingerprint
        return json.dumps([self.config.digest, base, scene.name, sorted(scene.digests.items())])


class _Source:
    """Batches of draws: from a pool encoded once, or fresh ones."""

    def __init__(self, base: Base, scene: Scene, config: TrainingConfig) -> None:
        self.base, self.config = base, config
        self.views = Views(scene, base.size_px, config)
        self.blank = blank(base)
        self.pool: Draws | None = None
        if config.pool:
            generator = torch.Generator().manual_seed(config.seed)
            self.pool = self._draw(config.pool, generator)

    def next(self, generator: torch.Generator) -> Draws:
        """The batch of one step, with everything missing from a share of it."""
        count = self.config.batch
        if self.pool is None:
            draws = self._draw(count, generator)
        else:
            draws = self.pool.take(torch.randint(len(self.pool), (count,), generator=generator))
        dropped = torch.rand(count, generator=generator) < self.config.mask_dropout
        everything = dropped.to(draws.masks.device)[:, None, None, None]
        return Draws(
            draws.latents,
            torch.where(everything, self.blank, draws.masked),
            torch.where(everything, 1.0, draws.masks),
            draws.weights,
        )

    def _draw(self, count: int, generator: torch.Generator) -> Draws:
        return draw(self.base, self.views, count, generator)


def _loss(base: Base, draws: Draws, config: TrainingConfig, generator: torch.Generator) -> Tensor:
    count, device = len(draws), base.device
    timesteps = timesteps_of(generator, count, base.scheduler, config.timestep_power).to(device)
    noise = torch.randn(draws.latents.shape, generator=generator).to(device)
    unprompted = (torch.rand(count, generator=generator) < config.prompt_dropout).to(device)
    # At most two prompts are distinct: embed those, then hand them out.
    prompts = torch.where(unprompted[:, None, None], base.embed(""), base.embed(PROMPT))
    latents = noisy(base.scheduler, draws.latents, noise, timesteps)
    stacked = torch.cat([latents, draws.masks, draws.masked], 1).to(base.dtype)
    stacked = stacked.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
        predicted = base.unet(stacked, timesteps, prompts.to(base.dtype)).sample
    truth = target_of(base.scheduler, draws.latents, noise, timesteps)
    emphasis = config.known_weight + (1 - config.known_weight) * draws.masks
    return weighted_error(predicted, truth, draws.weights * emphasis)


def _decay(step: int, config: TrainingConfig) -> float:
    """Share of the peak rate: a short warm-up, then a half cosine to a tenth, if wanted."""
    if not config.decay_rate:
        return 1.0
    warm_up = min(1.0, (step + 1) / 20)
    return warm_up * (0.1 + 0.9 * (1 + math.cos(math.pi * step / config.steps)) / 2)


def _strength(base: Base, scene: Scene, config: TrainingConfig) -> float:
    """Share of the full strength that the adapter is fused with."""
    missing = crop_mask(scene.mask, window_of(scene.mask, base.size_px), base.size_px)
    known = 1 - float(missing.mean())
    if known >= config.full_from:
        return 1.0
    return max(LEAST_STRENGTH, round((known / config.full_from) ** 2, 4))


def _capsule(base: Base, scene: Scene, config: TrainingConfig, report: dict[str, Any]) -> Capsule:
    scale = config.scale * report["strength"]
    text = Adapter({}, scale)
    if config.rate_text:
        text = replace(read_out(base.text_encoder, config), scale=scale)
    header = CapsuleHeader(
        scene=scene.name,
        base=base.name,
        base_fingerprint=base.fingerprint,
        rank=config.rank,
        alpha=config.alpha * report["strength"],
        scale=scale,
        target_modules=base.adapter_modules,
        prompt=PROMPT,
        size_px=base.size_px,
        training=report,
        digests=dict(scene.digests),
        licence=base.licence,
    )
    return Capsule(
        header=header,
        adapter=replace(read_out(base.unet, config), scale=scale),
        text_adapter=text,
        prompt_embedding=base.embed(PROMPT).detach().cpu().half(),
        extras=_references(base, scene),
    )


def _references(base: Base, scene: Scene) -> dict[str, Tensor]:
    """The references at ranking size, at most twice the base's, in 8 bit."""
    small = {}
    for k, image in enumerate(scene.references):
        shrink = min(1.0, 2 * base.size_px / max(image.shape[-2:]))
        size = [max(8, round(length * shrink)) for length in image.shape[-2:]]
        resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        small[f"references.{k}"] = (resized.clamp(0, 1) * 255).round().to(torch.uint8)
    return small


def _report(base: Base, config: TrainingConfig, losses: dict[str, float]) -> dict[str, Any]:
    """What the capsule says of its training; no wall time: equal runs give equal bytes."""
    return {
        "configuration": asdict(config),
        "configuration_digest": config.digest,
        "steps": config.steps,
        "samples": config.steps * config.batch,
        "probe": {step: round(loss, 5) for step, loss in losses.items()},
        "device": f"{base.device.type} {platform.machine()}",
        "dtype": str(base.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
