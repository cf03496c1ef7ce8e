"""The bounds that the project set itself, one per row name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Target:
    """What the latest row of a name must reach: at least ``bound``, or at most."""

    bound: float
    unit: str
    better: Better = "higher"

    def met_by(self, value: float) -> bool:
        """Whether ``value`` is on the right side of the bound, the bound itself included."""
        return value >= self.bound if self.better == "higher" else value <= self.bound


def on_cuda(name: str) -> bool:
    """Whether a row of this name is measured on a GPU: ``cuda`` is one of its parts."""
    return "cuda" in name.split(".")


TARGETS: dict[str, Target] = {
    "demo.main_s": Target(360, "s", "lower"),
    "demo.train_s": Target(120, "s", "lower"),
    "demo.complete4_s": Target(3, "s", "lower"),
    "adapt.psnr_gain_db": Target(2.5, "dB"),
    "adapt.worst_scene_gain_db": Target(0, "dB"),
    "nano.autoencoder_psnr_db": Target(24, "dB"),
    "swap.ratio_load_lora": Target(50, "x"),
    "swap.ratio_load_lora.cuda": Target(300, "x"),
    "swap.p99_ms.cuda": Target(1, "ms", "lower"),
    "engine.sample_steps_per_s.b16.cuda": Target(480, "sample-steps/s"),
    "engine.mixed_overhead_pct": Target(10, "%", "lower"),
    "engine.mixed_overhead_pct.cuda": Target(5, "%", "lower"),
    "engine.ratio_diffusers": Target(1.3, "x"),
    "engine.ratio_diffusers.cuda": Target(2, "x"),
    "engine.captures_after_warmup.cuda": Target(0, "captures", "lower"),
    "registry.resolve.ratio_mlflow": Target(5, "x"),
    "registry.alias.ratio_mlflow": Target(5, "x"),
    "registry.list100k.p95_ms": Target(20, "ms", "lower"),
    "registry.resolve.p95_ms": Target(20, "ms", "lower"),
    "rank.ratio_kornia": Target(5, "x"),
    "rank.ratio_kornia.cuda": Target(5, "x"),
    "rank.16x3_ms.cuda": Target(60, "ms", "lower"),
    "rank.motorcycle_precision": Target(0.7, "share"),
    "rank.top25_psnr_gain_db": Target(0, "dB"),
    "load.goodput_ratio_peer": Target(3, "x"),
    "soak.lost": Target(0, "requests", "lower"),
    "soak.violations": Target(0, "promises", "lower"),
    "soak.wrong_digests": Target(0, "answers", "lower"),
    "soak.differing_pictures": Target(0, "pictures", "lower"),
    "soak.rss_growth_pct": Target(2, "%", "lower"),
    "train.flops_ratio_reference": Target(3, "x"),
    "train.wall_ratio_unpooled": Target(2, "x"),
    "train.paper_s.cuda": Target(300, "s", "lower"),
    "e2e.p50_s.16x20.cuda": Target(0.8, "s", "lower"),
    "e2e.ratio_batched.16x20.cuda": Target(2, "x"),
    "e2e.ratio_infer.16x20.cuda": Target(100, "x"),
    "service.overhead_p50_ms": Target(15, "ms", "lower"),
}
