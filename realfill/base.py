"""The frozen inpainting model that every scene's adapter sits on.

A base is a folder in diffusers' layout (``unet``, ``vae``, ``text_encoder``, ``tokenizer``,
``scheduler``), with an optional ``realfill.json`` that names its size and the modules its adapters
target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from realfill.errors import BaseUnavailable
from realfill.fingerprint import TENSOR_PARTS, fingerprint_of_folder

PROMPT = "a photo of sks"
DEFAULT_SD2 = "sd2-community/stable-diffusion-2-inpainting"
NANO_FOLDER = Path(__file__).parent / "nano" / "weights" / "base"
PAPER_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
PAPER_TEXT_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")

_AUTOENCODERS = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderTiny, AutoencoderDC)}


@dataclass(frozen=True)
class Base:
    """One inpainting model, with everything that training and serving ask of it.

    Attributes:
        name: ``nano``, ``sd2-random``, a folder or a hub id.
        size_px: Height and width the model works at.
        fingerprint: SHA-256 over the sorted tensor digests of U-Net, autoencoder and text encoder.
        adapter_modules: Suffixes of the U-Net modules that an adapter may change.
        text_adapter_modules: The same for the text encoder.
        sampler: How it is sampled where nobody says otherwise.
        steps: U-Net evaluations per sample, likewise.
        products: What linear layers and convolutions shall multiply in where the engine computes
            them its own way, on a CPU; None for the precision of the weights.
    """

    name: str
    unet: UNet2DConditionModel
    autoencoder: Any
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    size_px: int
    fingerprint: str
    adapter_modules: tuple[str, ...] = PAPER_MODULES
    text_adapter_modules: tuple[str, ...] = PAPER_TEXT_MODULES
    sampler: str = "dpm++2m"
    steps: int = 20
    licence: str = "CreativeML Open RAIL++-M"
    settings: Mapping[str, Any] = field(default_factory=dict)
    products: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """Where the U-Net lives."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the U-Net's weights."""
        return next(self.unet.parameters()).dtype

    @property
    def multiplies_in(self) -> torch.dtype:
        """What linear layers and convolutions multiply in."""
        return self.products or self.dtype

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: the U-Net takes twice as many, and the mask."""
        return int(self.unet.config.out_channels)

    @property
    def cell_px(self) -> int:
        """Pixels along the side of one latent cell."""
        return self.size_px // int(self.unet.config.sample_size)

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of pictures; a generator draws them from the posterior, else its mode is taken.

        Args:
            pixels: Pictures in [0, 1]. [N, 3, H, W]
            generator: Source of the posterior's noise, where the autoencoder has one.

        Returns:
            Scaled latents. [N, C, h, w]
        """
        scaled = (2 * pixels - 1).to(self.device, self._autoencoder_dtype)
        encoded = self.autoencoder.encode(scaled)
        if hasattr(encoded, "latent_dist"):
            posterior = encoded.latent_dist
            latents = posterior.mode() if generator is None else posterior.sample(generator)
        else:
            latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
        return (latents * self._scaling).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1] of scaled latents. [N, C, h, w] -> [N, 3, H, W]"""
        unscaled = latents.to(self._autoencoder_dtype) / self._scaling
        return (self.autoencoder.decode(unscaled).sample.float() / 2 + 0.5).clamp(0, 1)

    def embed(self, prompt: str = PROMPT) -> Tensor:
        """The prompt's embedding; gradients flow to a text encoder that wants them. [77, d]"""
        tokens = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        hidden: Tensor = self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0]
        return hidden[0]

    @property
    def _scaling(self) -> float:
        return float(self.autoencoder.config.scaling_factor)

    @property
    def _autoencoder_dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype


def load_base(
    name: str = "nano",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    products: torch.dtype | None = None,
) -> Base:
    """Load a base, frozen and in evaluation mode.

    Args:
        name: ``nano`` (embedded), ``sd2`` (the documented default on the hub), ``sd2-random``
            (the full architecture with seeded weights), a folder in diffusers' layout, or a hub id.
        device: Where it shall live.
        dtype: Precision of its weights.
        products: As the base's attribute; ``serving_precision`` names one for a device.

    Raises:
        BaseUnavailable: The folder or a part of it is missing, or it is not an inpainting model.
    """
    if name == "sd2-random":
        return replace(_random_sd2(torch.device(device), dtype), products=products)
    folder = _folder_of(name)
    settings = _settings_of(folder)
    missing = [p for p in (*TENSOR_PARTS, "tokenizer", "scheduler") if not (folder / p).is_dir()]
    if missing:
        raise BaseUnavailable(
            f"The base {name!r} has no {', '.join(missing)} in {folder}: "
            "give a complete diffusers folder, or leave REALFILL_BASE unset to use nano."
        )
    kind = json.loads((folder / "vae" / "config.json").read_text()).get(
        "_class_name", "AutoencoderKL"
    )
    if kind not in _AUTOENCODERS:
        raise BaseUnavailable(
            f"The base {name!r} has a {kind}: one of {sorted(_AUTOENCODERS)} is needed."
        )
    _check_inpainting(name, json.loads((folder / "unet" / "config.json").read_text()))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
    autoencoder = _AUTOENCODERS[kind].from_pretrained(folder / "vae", torch_dtype=dtype)
    # A bar for a load of milliseconds would stand between the lines of commands and server logs.
    transformers_logging.disable_progress_bar()
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    for module in (unet, autoencoder, text_encoder):
        module.to(device).eval().requires_grad_(False)
    return Base(
        name=name,
        unet=unet,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=DDPMScheduler.from_pretrained(folder / "scheduler"),
        size_px=int(settings.get("size_px", 8 * int(unet.config.sample_size))),
        fingerprint=fingerprint_of_folder(folder),
        adapter_modules=tuple(settings.get("adapter_modules", PAPER_MODULES)),
        text_adapter_modules=tuple(settings.get("text_adapter_modules", PAPER_TEXT_MODULES)),
        sampler=str(settings.get("sampler", Base.sampler)),
        steps=int(settings.get("steps", Base.steps)),
        licence=str(settings.get("licence", "CreativeML Open RAIL++-M")),
        settings=settings,
        products=products,
    )


def target_layers(network: nn.Module, suffixes: Iterable[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that adapters may change: those whose path ends in one of the suffixes.

    An adapter's factors for a convolution are those of its weight as a matrix,
    [out, in * height * width].

    Args:
        network: A network of a base.
        suffixes: Whole parts of paths: ``to_q`` does not match ``add_to_q``.
    """
    endings = tuple(suffixes)
    dotted = tuple(f".{ending}" for ending in endings)
    return {
        path: layer
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and (path in endings or path.endswith(dotted))
    }


@contextmanager
def attention_for_training(unet: UNet2DConditionModel) -> Iterator[None]:
    """Attention as plain matrix products while a U-Net is trained on a CPU.

    There the backward pass of the fused attention in bf16 takes a quarter of a step of ``nano``;
    without it a step takes 0.45 s instead of 0.6 s on two cores. Elsewhere nothing is changed.
    """
    before = unet.attn_processors
    if unet.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        unet.set_attn_processor(before)


def save_base(base: Base, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a base as a folder that ``load_base`` reads, its weights rounded to ``dtype``."""
    parts = {"unet": base.unet, "vae": base.autoencoder, "text_encoder": base.text_encoder}
    for part, module in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        config = module.config.to_dict() if part == "text_encoder" else dict(module.config)
        if part == "text_encoder":
            # Not where it was read from.
            config["_name_or_path"] = ""
        if part != "text_encoder":
            config["_class_name"] = type(module).__name__
            config = {
                k: v for k, v in config.items() if k not in ("_name_or_path", "_use_default_values")
            }
        (folder / part / "config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n"
        )
        tensors = {
            k: v.detach().cpu().to(dtype).contiguous() for k, v in module.state_dict().items()
        }
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file(tensors, folder / part / f"{name}.safetensors", metadata={"format": "pt"})
    base.tokenizer.save_pretrained(folder / "tokenizer")
    base.scheduler.save_pretrained(folder / "scheduler")
    settings = {
        "size_px": base.size_px,
        "adapter_modules": list(base.adapter_modules),
        "text_adapter_modules": list(base.text_adapter_modules),
        "sampler": base.sampler,
        "steps": base.steps,
        "licence": base.licence,
    }
    (folder / "realfill.json").write_text(json.dumps(settings, indent=2) + "\n")


def _folder_of(name: str) -> Path:
    if name == "nano":
        if not NANO_FOLDER.is_dir():
            raise BaseUnavailable(
                "The embedded base nano is missing: reinstall, or rebuild it by `make nano`."
            )
        return NANO_FOLDER
    if Path(name).is_dir():
        return Path(name)
    repository = DEFAULT_SD2 if name == "sd2" else name
    if name != "sd2" and (name.startswith((".", "/")) or name.count("/") != 1):
        raise BaseUnavailable(
            f"No base {name!r}: give nano, sd2, sd2-random, a folder, or a hub id owner/name."
        )
    return _snapshot(repository)


def _snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*/*.json", "*/*.txt", "*/model.safetensors"]
    patterns += ["*/diffusion_pytorch_model*.safetensors", "*/model-*.safetensors"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseUnavailable(
            f"The base {repository!r} could not be fetched from the hub: "
            "check the id and the network, or give a local folder."
        ) from error


def _settings_of(folder: Path) -> dict[str, Any]:
    path = folder / "realfill.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _check_inpainting(name: str, config: Mapping[str, Any]) -> None:
    takes, gives = int(config.get("in_channels", 4)), int(config.get("out_channels", 4))
    if takes != 2 * gives + 1:
        raise BaseUnavailable(
            f"The base {name!r} is no inpainting model: its U-Net takes {takes} channels, "
            f"{2 * gives + 1} are needed (latent, mask, masked latent)."
        )


def _random_sd2(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Base:
    """SD-2-inpainting's architecture with seeded weights: for speed, not for pictures."""
    from realfill.nano.tokenizer import byte_tokenizer

    torch.manual_seed(seed)
    with device:
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=9,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
            )
        )
    parts = {"unet": unet, "vae": autoencoder, "text_encoder": text_encoder}
    for module in parts.values():
        module.to(device, dtype).eval().requires_grad_(False)
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    fingerprint = hashlib.sha256(f"sd2-random {seed}".encode()).hexdigest()
    tokenizer = byte_tokenizer()
    return Base(
        "sd2-random",
        unet,
        autoencoder,
        text_encoder.float(),
        tokenizer,
        scheduler,
        512,
        fingerprint,
    )
