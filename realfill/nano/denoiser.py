"""Pretrain nano's denoiser: a U-Net that fills holes, and the text encoder that prompts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from realfill.base import PROMPT, attention_for_training
from realfill.masks import latent_mask, random_mask
from realfill.nano.autoencoder import LATENT_CHANNELS
from realfill.nano.pool import POOL_PX
from realfill.nano.stage import Step, learning_rate
from realfill.nano.tokenizer import byte_tokenizer

SIZE_PX = 128
CELL_PX = 8
EMBEDDING = 64
# Every linear layer of the transformer blocks, and every convolution: linear layers alone do not
# suffice (docs/training.md).
ADAPTER_MODULES = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "conv_in",
    "conv_out",
)


def new_denoiser() -> UNet2DConditionModel:
    """An inpainting U-Net with transformer blocks at every level. 11 M parameters."""
    return UNet2DConditionModel(
        sample_size=SIZE_PX // CELL_PX,
        in_channels=2 * LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(128, 192),
        layers_per_block=1,
        cross_attention_dim=EMBEDDING,
        time_embedding_dim=384,
        attention_head_dim=4,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def new_text_encoder() -> CLIPTextModel:
    """A two-layer CLIP text encoder over bytes."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=EMBEDDING,
            intermediate_size=2 * EMBEDDING,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=EMBEDDING,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )


def new_scheduler() -> DDPMScheduler:
    """v-prediction with zero terminal SNR and trailing spacing.

    With eps-prediction the error of x0 at the last timestep is fifteen times the error of eps, and
    a small network's fills get colour casts.
    """
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


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


def hole(generator: torch.Generator, size_px: int = SIZE_PX) -> Tensor:
    """A mask as requests have them: a large hole, rectangles, a missing side, or everything.

    Returns:
        1 where pixels are missing. [H, W]
    """
    kind = float(torch.rand((), generator=generator))
    if kind < 0.35:
        return random_mask(generator, size_px)
    if kind > 0.95:
        return torch.ones(size_px, size_px)
    u = torch.rand(5, generator=generator).tolist()
    rows, columns = torch.arange(size_px)[:, None], torch.arange(size_px)[None, :]
    if kind > 0.85:
        strip = (rows if u[0] < 0.5 else columns) < size_px * (0.2 + 0.5 * u[1])
        mask = strip.expand(size_px, size_px).float()
        return mask if u[2] < 0.5 else mask.flip(0, 1)
    height, width = (size_px * (0.2 + 0.5 * v) for v in u[:2])
    y, x = (u[2] * (size_px - height) + height / 2, u[3] * (size_px - width) + width / 2)
    down, across = (rows - y).abs() / (height / 2), (columns - x).abs() / (width / 2)
    inside = (down**2 + across**2 < 1) if u[4] < 0.4 else (torch.maximum(down, across) < 1)
    return inside.float()


@torch.no_grad()
def encode_triples(
    autoencoder: AutoencoderDC,
    captions: Sequence[str],
    pictures: NDArray[np.uint8],
    count: int,
    *,
    seed: int,
    device: torch.device,
    batch: int = 50,
) -> Iterator[tuple[int, Triples | None]]:
    """Crop, mask and encode once what training draws from; the last yield has the whole."""
    texts = (*sorted(set(captions)), PROMPT, "")
    number = {text: index for index, text in enumerate(texts)}
    rng, generator = np.random.default_rng((seed, 3)), torch.Generator().manual_seed(seed)
    latents, masked, masks, prompts = [], [], [], []
    autoencoder.to(device, memory_format=torch.channels_last).eval()
    for start in range(0, count, batch):
        size = min(batch, count - start)
        chosen = rng.integers(len(pictures), size=size)
        corners = rng.integers(0, POOL_PX - SIZE_PX + 1, (size, 2))
        crops = [
            pictures[k][y : y + SIZE_PX, x : x + SIZE_PX][:, :: rng.choice((-1, 1))]
            for k, (y, x) in zip(chosen, corners, strict=True)
        ]
        pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
        holes = torch.stack([hole(generator) for _ in range(size)])[:, None]
        both = torch.cat([pixels, pixels * (1 - holes)]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            encoded = autoencoder.encode(both.contiguous(memory_format=torch.channels_last)).latent
        whole, greyed = encoded.half().cpu().chunk(2)
        latents.append(whole)
        masked.append(greyed)
        masks.append(latent_mask(holes, CELL_PX).half())
        prompts.append(torch.tensor([number[captions[k]] for k in chosen]))
        if start + size < count:
            yield start + size, None
    yield (
        count,
        Triples(
            latents=torch.cat(latents),
            masked=torch.cat(masked),
            masks=torch.cat(masks),
            captions=torch.cat(prompts),
            texts=texts,
        ),
    )


def train_denoiser(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    triples: Triples,
    checkpoint: Path,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    batch: int = 16,
) -> Iterator[Step]:
    """Fit U-Net and text encoder; after the last step both hold the averaged weights.

    The averaged weights are also in the checkpoint, under ``average``, while training goes on.
    """
    modules = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device).train()
    unet.to(memory_format=torch.channels_last)
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-2)
    average = [p.detach().clone() for p in parameters]
    begin = _resume(checkpoint, modules, optimizer, average)
    scheduler = new_scheduler()
    tokens = byte_tokenizer()(
        list(triples.texts), padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids.to(device)
    running = 0.0
    for step in range(begin, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 6e-4)
        with attention_for_training(unet):
            loss = _loss(modules, scheduler, triples, tokens, generator, batch, device)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.9985, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        running = 0.99 * running + 0.01 * loss.item() if running else loss.item()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            _keep(checkpoint, modules, optimizer, average, step + 1)
        yield Step("denoiser", step + 1, steps, running)
    # Also where a finished run is only read back.
    adopt(modules, average)


def _loss(
    modules: torch.nn.ModuleDict,
    scheduler: DDPMScheduler,
    triples: Triples,
    tokens: Tensor,
    generator: torch.Generator,
    batch: int,
    device: torch.device,
) -> Tensor:
    """v-prediction error; the hole weighs five times as much as the rest."""
    chosen = torch.randint(len(triples.latents), (batch,), generator=generator)
    latents, masked, masks = (
        part[chosen].float().to(device) for part in (triples.latents, triples.masked, triples.masks)
    )
    captions = triples.captions[chosen]
    fate = torch.rand(batch, generator=generator)
    captions[fate < 0.5] = len(triples.texts) - 2
    captions[fate < 0.1] = len(triples.texts) - 1
    # Noisy steps decide what fills a hole, so they are drawn more often.
    share = torch.rand(batch, generator=generator).sqrt()
    timesteps = (share * 1000).long().clamp(max=999).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    distinct, place = captions.unique(return_inverse=True)
    stacked = torch.cat([noisy, masks, masked], 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16):
        prompts = modules["text_encoder"](tokens[distinct.to(device)])[0][place.to(device)]
        predicted = modules["unet"](stacked, timesteps, prompts).sample
    weights = 0.2 + 0.8 * masks
    error = (predicted.float() - velocity).square().mean(1, keepdim=True)
    return (weights * error).sum() / weights.sum()


@torch.no_grad()
def adopt(modules: torch.nn.Module, average: Sequence[Tensor]) -> None:
    """Put the averaged weights into the modules."""
    for parameter, mean in zip(modules.parameters(), average, strict=True):
        parameter.copy_(mean)


def _keep(
    checkpoint: Path,
    modules: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor],
    step: int,
) -> None:
    draft = checkpoint.with_suffix(".part")
    torch.save(
        {
            "step": step,
            "modules": modules.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average,
        },
        draft,
    )
    draft.replace(checkpoint)


def _resume(
    checkpoint: Path,
    modules: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor],
) -> int:
    if not checkpoint.exists():
        return 0
    kept = torch.load(checkpoint, weights_only=True)
    modules.load_state_dict(kept["modules"])
    optimizer.load_state_dict(kept["optimizer"])
    for mine, its in zip(average, kept["average"], strict=True):
        mine.copy_(its)
    return int(kept["step"])
