"""What networks say of two pictures: LPIPS inside the hole, embeddings of whole pictures.

LPIPS is a map that is averaged over the hole: both pictures multiplied by the mask and compared as
a whole would average in the zeros of everything known. Its AlexNet stands here, so that weights are
all it needs.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from realfill.errors import InvalidScene

Measure = Callable[[Tensor, Tensor, Tensor], float]

# AlexNet's convolutions by name in LPIPS's state: stride, padding, whether a pooling comes before.
ALEXNET = (
    ("net.slice1.0", 4, 2, False),
    ("net.slice2.3", 1, 2, True),
    ("net.slice3.6", 1, 1, True),
    ("net.slice4.8", 1, 1, False),
    ("net.slice5.10", 1, 1, False),
)
EMBEDDED_PX = 224


def in_hole(distances: Tensor, hole: Tensor) -> float:
    """Mean of a map over the missing pixels.

    Args:
        distances: A distance at every pixel. [H, W]
        hole: 1 where pixels were missing, else 0. [H, W]

    Raises:
        InvalidScene: The sizes differ, or the hole is empty.
    """
    if distances.shape != hole.shape:
        raise InvalidScene(
            f"The map is {list(distances.shape)} and the hole {list(hole.shape)}: bring them to one"
            " height and width."
        )
    if not hole.any():
        raise InvalidScene("The hole is empty, so there is nothing to compare: mark it with 1.")
    return float(distances.double()[hole.bool()].mean())


def lpips_map(
    features0: Sequence[Tensor],
    features1: Sequence[Tensor],
    weights: Sequence[Tensor],
    size: tuple[int, int],
) -> Tensor:
    """LPIPS at every pixel: unit features' weighted squared difference, layers added up.

    Args:
        features0: Of image 0, one entry per layer. [C, h, w] each
        features1: Of image 1. [C, h, w] each
        weights: Of the channels, 0 or more. [C] each
        size: Height and width of the answer; layers are brought to it bilinearly.

    Returns:
        [H, W]

    Source: Zhang et al., arXiv:1801.03924, equation 1, without the mean over places.
    """
    total = torch.zeros(size)
    for first, second, weight in zip(features0, features1, weights, strict=True):
        unit0, unit1 = (F.normalize(f, dim=0, eps=1e-10) for f in (first, second))
        layer = ((unit0 - unit1).square() * weight[:, None, None]).sum(0)
        resized = F.interpolate(layer[None, None], size, mode="bilinear", align_corners=False)
        total = total + resized[0, 0]
    return total


def alexnet_features(pixels: Tensor, state: Mapping[str, Tensor]) -> list[Tensor]:
    """What the five convolutions of AlexNet see, after their rectifiers.

    Args:
        pixels: In [0, 1]. [3, H, W]
        state: Of ``lpips.LPIPS(net="alex")``.

    Returns:
        One entry per convolution. [C, h, w] each
    """
    shift, scale = (
        state[f"scaling_layer.{name}"].flatten()[:, None, None] for name in ("shift", "scale")
    )
    x = ((2 * pixels - 1 - shift) / scale)[None]
    found = []
    for name, stride, padding, pooled in ALEXNET:
        if pooled:
            x = F.max_pool2d(x, 3, 2)
        x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding).relu()
        found.append(x[0])
    return found


def lpips(path: Path) -> Measure:
    """LPIPS averaged over the hole, from a state of ``lpips.LPIPS(net="alex")``."""
    state = _state(path)
    weights = [state[f"lin{layer}.model.1.weight"].flatten() for layer in range(len(ALEXNET))]

    @torch.no_grad()
    def measure(image: Tensor, truth: Tensor, hole: Tensor) -> float:
        seen0, seen1 = (alexnet_features(picture, state) for picture in (image, truth))
        return in_hole(lpips_map(seen0, seen1, weights, (hole.shape[0], hole.shape[1])), hole)

    return measure


def dreamsim(path: Path) -> Measure:
    """DreamSim's distance of whole pictures, from the folder of its ensemble."""
    package: Any = importlib.import_module("dreamsim")
    net, _ = package.dreamsim(pretrained=True, cache_dir=str(path), device="cpu")

    @torch.no_grad()
    def measure(image: Tensor, truth: Tensor, hole: Tensor) -> float:
        return float(net(*(_resized(picture) for picture in (image, truth))))

    return measure


def dino(path: Path) -> Measure:
    """Cosine of whole pictures' class tokens, by a ViT in a folder of transformers."""
    return _cosines(path, "ViTModel", lambda net, x: net(pixel_values=x).last_hidden_state[:, 0])


def clip(path: Path) -> Measure:
    """Cosine of whole pictures' embeddings, by a CLIP in a folder of transformers."""
    return _cosines(
        path, "CLIPVisionModelWithProjection", lambda net, x: net(pixel_values=x).image_embeds
    )


def _cosines(path: Path, kind: str, embed: Callable[[Any, Tensor], Tensor]) -> Measure:
    package: Any = importlib.import_module("transformers")
    net = getattr(package, kind).from_pretrained(path, local_files_only=True).eval()
    # Read here: the library's own preprocessing wants torchvision.
    settings = json.loads((path / "preprocessor_config.json").read_text())
    mean, std = (
        torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std")
    )

    @torch.no_grad()
    def measure(image: Tensor, truth: Tensor, hole: Tensor) -> float:
        first, second = (
            embed(net, (_resized(picture) - mean) / std)[0].double() for picture in (image, truth)
        )
        return float(F.cosine_similarity(first, second, dim=0))

    return measure


def _resized(pixels: Tensor) -> Tensor:
    """Antialiased bicubic, within [0, 1]. [1, 3, 224, 224]"""
    size = (EMBEDDED_PX, EMBEDDED_PX)
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True).clamp(0, 1)


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state
