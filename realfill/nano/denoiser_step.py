"""One step of the denoiser's pretraining: what it is shown, its loss and its gradients."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from realfill.base import attention_for_training
from realfill.nano.stage import half_precision

# Steps before one is captured as a graph.
WARM_UPS = 3


@dataclass(frozen=True)
class Triples:
    """Encoded pictures with a hole each.

    Attributes:
        latents: Whole pictures. [K, C, h, w]
        masked: The same with the hole greyed out before encoding. [K, C, h, w]
        masks: 1 where a cell has a missing pixel. [K, 1, h, w]
        captions: Index into ``texts``. [K]
        texts: Distinct captions, then the fixed prompt of all scenes, then the empty one.
    """

    latents: Tensor
    masked: Tensor
    masks: Tensor
    captions: Tensor
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Draw:
    """What one step shows the denoiser, and what it should answer.

    Attributes:
        stacked: Noisy latents, mask and masked latents. [N, 2C+1, h, w]
        timesteps: [N]
        captions: Index of each one's text. [N]
        velocity: The answer. [N, C, h, w]
        masks: 1 where a cell has a missing pixel. [N, 1, h, w]
    """

    stacked: Tensor
    timesteps: Tensor
    captions: Tensor
    velocity: Tensor
    masks: Tensor


def draw(
    scheduler: DDPMScheduler, triples: Triples, generator: torch.Generator, batch: int
) -> Draw:
    """Some triples, each at a timestep of its own, noisy ones more often.

    Args:
        scheduler: Adds the noise.
        triples: What is drawn from.
        generator: Source of every random choice, on the triples' device.
        batch: How many.
    """
    device = triples.latents.device

    def share() -> Tensor:
        return torch.rand(batch, generator=generator, device=device)

    chosen = torch.randint(len(triples.latents), (batch,), generator=generator, device=device)
    latents, masked, masks = (
        part[chosen].float() for part in (triples.latents, triples.masked, triples.masks)
    )
    fate, named, prompt = share(), triples.captions[chosen], len(triples.texts) - 2
    captions = torch.where(fate < 0.1, prompt + 1, torch.where(fate < 0.5, prompt, named))
    # Noisy steps decide what fills a hole, so they are drawn more often.
    timesteps = (share().sqrt() * 1000).long().clamp(max=999)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    return Draw(
        stacked=torch.cat([noisy, masks, masked], 1).contiguous(memory_format=torch.channels_last),
        timesteps=timesteps,
        captions=captions,
        velocity=scheduler.get_velocity(latents, noise, timesteps),
        masks=masks,
    )


class Gradients:
    """Loss and gradients of one step.

    Args:
        unet: Its gradients are left in its parameters.
        text_encoder: Likewise.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        self._unet = unet
        self._text_encoder = text_encoder

    def __call__(self, drawn: Draw, tokens: Tensor) -> Tensor:
        """The loss."""
        self._text_encoder.zero_grad()
        with half_precision(tokens.device):
            prompts = self._text_encoder(tokens)[0][drawn.captions]
        # The U-Net ends at its prompts, and the text encoder goes on from there.
        loss, backward = self._of_unet(drawn, prompts.detach())
        prompts.backward(backward)
        return loss

    def _of_unet(self, drawn: Draw, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its gradient at the prompts."""
        self._unet.zero_grad()
        return self._pass(drawn, prompts.requires_grad_())

    def _pass(self, drawn: Draw, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """v-prediction error; the hole weighs five times as much as the rest."""
        with attention_for_training(self._unet), half_precision(prompts.device):
            predicted = self._unet(drawn.stacked, drawn.timesteps, prompts).sample
            weights = 0.2 + 0.8 * drawn.masks
            error = (predicted.float() - drawn.velocity).square().mean(1, keepdim=True)
            loss = (weights * error).sum() / weights.sum()
            loss.backward()
        assert prompts.grad is not None
        return loss.detach(), prompts.grad


class CapturedGradients(Gradients):
    """The same on CUDA, where the U-Net's passes are captured as one graph.

    It is so small that launching its kernels one by one takes longer than running them.
    """

    _graph: torch.cuda.CUDAGraph | None = None

    def _of_unet(self, drawn: Draw, prompts: Tensor) -> tuple[Tensor, Tensor]:
        if self._graph is None:
            self._capture(drawn, prompts)
        assert self._graph is not None
        with torch.no_grad():
            for field in fields(drawn):
                getattr(self._drawn, field.name).copy_(getattr(drawn, field.name))
            self._prompts.copy_(prompts)
        self._graph.replay()
        return self._outcome

    def _capture(self, drawn: Draw, prompts: Tensor) -> None:
        self._drawn = Draw(**{f.name: getattr(drawn, f.name).clone() for f in fields(drawn)})
        self._prompts = prompts.clone().requires_grad_()
        device = prompts.device
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            # Libraries choose algorithms and allocate before anything is recorded.
            for _ in range(WARM_UPS):
                self._forget()
                self._pass(self._drawn, self._prompts)
        torch.cuda.current_stream(device).wait_stream(aside)
        # The gradients of before go, so that the graph has its own, which replays write anew.
        self._forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            self._outcome = self._pass(self._drawn, self._prompts)
        self._graph = graph

    def _forget(self) -> None:
        self._unet.zero_grad()
        self._prompts.grad = None
