"""A pipeline of random weights, small enough that a test runs it in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from realfill.adapter import Adapter
from realfill.base import (
    PAPER_MODULES,
    PROMPT,
    Base,
    save_base,
    target_layers,
)
from realfill.capsule import Capsule, CapsuleHeader, write_capsule
from realfill.fingerprint import fingerprint_of
from realfill.nano.tokenizer import byte_tokenizer


def tiny_base(seed: int = 0, *, prediction_type: str = "epsilon") -> Base:
    """A base of 32 px with 4x4 latents of 4 channels; its weights follow from the seed.

    Its adapters change attention and a convolution of every residual block.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=9,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )
    parts = {"unet": unet, "vae": autoencoder, "text_encoder": text_encoder}
    for module in parts.values():
        module.eval().requires_grad_(False)
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction_type,
        steps_offset=1,
    )
    return Base(
        name="tiny",
        unet=unet,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        tokenizer=byte_tokenizer(),
        scheduler=scheduler,
        size_px=32,
        fingerprint=fingerprint_of(parts),
        adapter_modules=(*PAPER_MODULES, "conv1"),
    )


def save_tiny_base(folder: Path, seed: int = 0) -> Path:
    """Write the tiny base as a folder that a server process can load."""
    save_base(tiny_base(seed), folder, dtype=torch.float32)
    return folder


def tiny_adapter(base: Base, seed: int = 0, rank: int = 4, scale: float = 2.0) -> Adapter:
    """Factors for every target module of the base, large enough to show in a picture."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, layer in target_layers(base.unet, base.adapter_modules).items():
        out_features, in_features = layer.weight.flatten(1).shape
        lora_a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        lora_b = torch.randn(out_features, rank, generator=generator)
        factors[path] = (lora_a.half(), lora_b.half())
    return Adapter(factors=factors, scale=scale)


def tiny_capsule(base: Base, scene: str = "tower", seed: int = 0, rank: int = 4) -> bytes:
    """A whole capsule for the tiny base, with three small references to rank against."""
    generator = torch.Generator().manual_seed(seed + 1000)
    references = {
        f"references.{k}": (torch.rand(3, 32, 48, generator=generator) * 255).to(torch.uint8)
        for k in range(2)
    }
    header = CapsuleHeader(
        scene=scene,
        base=base.name,
        base_fingerprint=base.fingerprint,
        rank=rank,
        alpha=2.0 * rank,
        scale=2.0,
        target_modules=base.adapter_modules,
        prompt=PROMPT,
        size_px=base.size_px,
        training={"steps": 0, "seed": seed},
        digests={},
        licence="none: random weights",
    )
    capsule = Capsule(
        header=header,
        adapter=tiny_adapter(base, seed, rank),
        text_adapter=Adapter(factors={}, scale=2.0),
        prompt_embedding=base.embed(PROMPT).half(),
        extras=references,
    )
    return write_capsule(capsule)
