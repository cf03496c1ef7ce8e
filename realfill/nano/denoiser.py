"""Pretrain nano's denoiser: a U-Net that fills holes, and the text encoder that prompts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderDC, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from realfill.base import PROMPT
from realfill.masks import latent_mask, random_masks
from realfill.nano.autoencoder import LATENT_CHANNELS
from realfill.nano.denoiser_step import CapturedGradients, Gradients, Triples, draw
from realfill.nano.pool import shrunk, views
from realfill.nano.stage import RunningLoss, Step, drawn_from, half_precision, learning_rate
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


def holes(generator: torch.Generator, count: int, size_px: int = SIZE_PX) -> Tensor:
    """Masks as requests have them: large holes, rectangles, a missing side, or everything.

    Returns:
        1 where pixels are missing. [count, H, W]
    """
    device = generator.device
    kind, *u = torch.rand(6, count, 1, 1, generator=generator, device=device)
    line = torch.arange(size_px, device=device, dtype=torch.float32)
    rows, columns = line[:, None], line[None, :]
    height, width = (size_px * (0.2 + 0.5 * share) for share in u[:2])
    y = u[2] * (size_px - height) + height / 2
    x = u[3] * (size_px - width) + width / 2
    down, across = (rows - y).abs() / (height / 2), (columns - x).abs() / (width / 2)
    round_ = down.square() + across.square() < 1
    shape = torch.where(u[4] < 0.4, round_, torch.maximum(down, across) < 1)
    along = torch.where(u[0] < 0.5, rows, columns)
    along = torch.where(u[2] < 0.5, along, size_px - 1 - along)
    side = along < size_px * (0.2 + 0.5 * u[1])
    large = random_masks(generator, count, size_px) > 0
    mask = torch.where(kind < 0.35, large, torch.where(kind < 0.85, shape, side))
    return (mask | (kind > 0.95)).float()


@torch.no_grad()
def encode_triples(
    autoencoder: AutoencoderDC,
    captions: Sequence[str],
    pictures: Tensor,
    count: int,
    *,
    seed: int,
    batch: int = 50,
) -> Iterator[tuple[int, Triples | None]]:
    """Crop, mask and encode what training draws from; the last yield has the whole.

    Args:
        autoencoder: Calibrated, where the pictures are.
        captions: Of the pictures.
        pictures: The pool. [K, 160, 160, 3], uint8
        count: Number of triples.
        seed: Start of every random draw.
        batch: How many are encoded at once.

    Yields:
        How many are encoded, and in the end all of them, on the pictures' device.
    """
    device = pictures.device
    texts = (*sorted(set(captions)), PROMPT, "")
    number = torch.tensor([texts.index(caption) for caption in captions], device=device)
    small = shrunk(pictures, SIZE_PX)
    latents, masked, masks, prompts = [], [], [], []
    for start in range(0, count, batch):
        size = min(batch, count - start)
        generator = drawn_from(seed, 3, start, device=device)
        chosen = torch.randint(len(pictures), (size,), generator=generator, device=device)
        pixels = 2 * views(pictures, small, chosen, generator) - 1
        missing = holes(generator, size)[:, None]
        both = torch.cat([pixels, pixels * (1 - missing)])
        with half_precision(device):
            encoded = autoencoder.encode(both.contiguous(memory_format=torch.channels_last)).latent
        whole, greyed = encoded.half().chunk(2)
        latents.append(whole)
        masked.append(greyed)
        masks.append(latent_mask(missing, CELL_PX).half())
        prompts.append(number[chosen])
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
    encode: Callable[[int], Iterator[tuple[int, Triples | None]]],
    checkpoint: Path,
    *,
    steps: int,
    rounds: int,
    seed: int,
    device: torch.device,
    batch: int = 16,
    peak: float = 6e-4,
) -> Iterator[Step]:
    """Fit U-Net and text encoder; after the last step both hold the averaged weights.

    The averaged weights are also in the checkpoint, under ``average``, while training goes on.

    Args:
        unet: Trained in place.
        text_encoder: Likewise.
        encode: Makes the triples of a round, given its number, as ``encode_triples`` does.
        checkpoint: Where training goes on, and what it leaves.
        steps: In all.
        rounds: How often new triples are encoded.
        seed: Start of every random draw.
        device: cpu or cuda.
        batch: Triples in a step.
        peak: Highest learning rate.
    """
    modules = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device).train()
    unet.to(memory_format=torch.channels_last)
    parameters = list(modules.parameters())
    captured = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-2, fused=captured
    )
    average = [p.detach().clone() for p in parameters]
    begin = _resume(checkpoint, modules, optimizer, average)
    scheduler = new_scheduler()
    running = RunningLoss("denoiser", 0.99, step=begin)
    triples, encoded_round = None, -1
    tokens = torch.empty(0)
    gradients = (CapturedGradients if captured else Gradients)(unet, text_encoder)
    for step in range(begin, steps):
        if (now := step * rounds // steps) != encoded_round:
            # Freed first: a GPU holds one round's triples, not two.
            triples, encoded_round = None, now
            for done, triples in encode(now):
                yield Step("encoding", done, done if triples else done + 1, 0.0)
            assert triples is not None
            tokens = byte_tokenizer()(
                list(triples.texts), padding="max_length", max_length=77, return_tensors="pt"
            ).input_ids.to(device)
        assert triples is not None
        generator = drawn_from(seed, 4, step, device=device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = gradients(draw(scheduler, triples, generator, batch), tokens)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.9985, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        running.take(loss)
        if (step + 1) % max(200, steps // 20) == 0 or step + 1 == steps:
            running.read()
            _keep(checkpoint, modules, optimizer, average, step + 1)
        yield Step("denoiser", step + 1, steps, running.value)
    # Also where a finished run is only read back.
    adopt(modules, average)


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
