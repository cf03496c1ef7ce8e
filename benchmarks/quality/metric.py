"""Metrics of Table 1: PSNR and SSIM always, those of networks where weights are configured.

PSNR, SSIM and LPIPS look inside the hole only, DreamSim, DINO and CLIP at whole candidates.

Source: RealFill, arXiv:2309.16668, section 4.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.quality import perceptual
from realfill.errors import RealFillError
from realfill.metrics import psnr, ssim

# Image, truth and hole to a number. [3, H, W], [3, H, W], [H, W]
Measure = Callable[[Tensor, Tensor, Tensor], float]


class MetricUnavailable(RealFillError):
    """A metric was asked for whose package or weights are not here."""

    code = "metric_unavailable"


@dataclass(frozen=True)
class Metric:
    """One column of Table 1.

    Attributes:
        name: As in the table's head.
        measure: Of one candidate against the truth.
        higher_is_better: Its direction.
        digits: After the point, in tables.
    """

    name: str
    measure: Measure
    higher_is_better: bool
    digits: int = 3


@dataclass(frozen=True)
class Network:
    """Where a network's metric comes from.

    Attributes:
        variable: Environment variable that names its weights.
        weights: What lies there, for the sentence that asks for it.
        load: Makes the measure from that path.
        higher_is_better: Direction of the metric.
        package: That has to be installed for it.
    """

    variable: str
    weights: str
    load: Callable[[Path], Measure]
    higher_is_better: bool
    package: str = "torch"


PSNR = Metric("psnr_db", psnr, higher_is_better=True, digits=2)
SSIM = Metric("ssim", ssim, higher_is_better=True)
NETWORKS = {
    "lpips": Network(
        "REALFILL_LPIPS",
        "the state of lpips.LPIPS(net='alex'), as .pth or .safetensors",
        perceptual.lpips,
        higher_is_better=False,
    ),
    "dreamsim": Network(
        "REALFILL_DREAMSIM",
        "the folder in which the package keeps its ensemble",
        perceptual.dreamsim,
        higher_is_better=False,
        package="dreamsim",
    ),
    "dino": Network(
        "REALFILL_DINO",
        "a folder of transformers with a ViT, such as facebook/dino-vits16",
        perceptual.dino,
        higher_is_better=True,
    ),
    "clip": Network(
        "REALFILL_CLIP",
        "a folder of transformers with a CLIP, such as openai/clip-vit-base-patch32",
        perceptual.clip,
        higher_is_better=True,
    ),
}


def metrics_of(names: Sequence[str]) -> list[Metric]:
    """PSNR and SSIM, and the networks' metrics of these names, ready to use.

    Args:
        names: Of lpips, dreamsim, dino, clip.

    Raises:
        MetricUnavailable: The name is unknown, its package is not installed, or its weights are
            not configured; the sentence says what to do.
    """
    return [PSNR, SSIM, *(_network_metric(name) for name in names)]


def _network_metric(name: str) -> Metric:
    if name not in NETWORKS:
        raise MetricUnavailable(f"No metric {name!r}: choose of {', '.join(NETWORKS)}.")
    network = NETWORKS[name]
    if importlib.util.find_spec(network.package) is None:
        raise MetricUnavailable(
            f"Metric {name} needs the package {network.package}, which is not installed: install"
            " it into an environment of its own, or leave the metric out."
        )
    configured = os.environ.get(network.variable)
    if not configured or not Path(configured).exists():
        raise MetricUnavailable(
            f"Metric {name} has no weights here: set {network.variable} to {network.weights}, or"
            " leave the metric out; nothing is downloaded."
        )
    return Metric(name, network.load(Path(configured)), network.higher_is_better)
