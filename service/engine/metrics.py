"""What an engine has done and has before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.engine.arena import TierMetrics


@dataclass(frozen=True)
class EngineMetrics:
    """An engine at one moment.

    Attributes:
        waiting: Jobs that have not begun.
        running: Jobs that share the lane.
        pending_sample_steps: That all jobs still need.
        completed: Jobs that were answered in full.
        partial: Jobs that their deadline ended with some of their samples.
        cancelled, failed: Jobs that ended so.
        refused: Jobs that were not taken.
        sample_steps: Made by jobs that were answered.
        steps: U-Net batches.
        sample_steps_per_s: Of full batches, as last estimated; None before the calibration.
        cost_drift: Actual over calibrated seconds of recent steps.
        swaps: Times that the U-Net was composed of other adapters than before.
        programs: Programs traced and graphs captured of the networks, constant after the start.
        tiers: What lies ready, by tier.
    """

    waiting: int
    running: int
    pending_sample_steps: int
    completed: int
    partial: int
    cancelled: int
    failed: int
    refused: int
    sample_steps: int
    steps: int
    sample_steps_per_s: float | None
    cost_drift: float
    swaps: int
    programs: int
    tiers: Mapping[str, TierMetrics]
