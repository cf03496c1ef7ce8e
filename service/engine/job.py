"""What goes into the engine, and what comes out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from realfill.adapter import Adapter
from service.engine.halving import Halving


class After(Protocol):
    """What comes between the decoding of a job's samples and their use."""

    def expected_s(self, samples: int) -> float:
        """Seconds that it may well take."""
        ...

    def least_s(self, samples: int) -> float:
        """Seconds that it takes at least, as far as is known."""
        ...


class Nothing:
    """Samples are of use as soon as they are there."""

    def expected_s(self, _: int) -> float:
        """No time."""
        return 0.0

    least_s = expected_s


@dataclass(frozen=True, eq=False)
class Job:
    """One completion to sample, at the size of the base.

    Attributes:
        digest: SHA-256 of the capsule that the adapter came in; None for the base alone.
        adapter: Factors to fuse into the U-Net; None for the base alone.
        prompt_embedding: From the capsule. [77, d]
        target: Image to complete, in [0, 1]. [3, S, S]
        mask: 1 where pixels are missing, else 0. [S, S]
        seeds: One sample for each.
        steps: U-Net calls per sample.
        sampler: ddpm, ddim, ddim-quadratic, dpm++2m or dpm++2m-sde.
        tenant: On whose behalf; tenants share the lane evenly, and so do the scenes of one.
        deadline: When what is finished has to be of use, on ``time.monotonic``'s clock.
        after: What whoever submitted it does with its samples before the deadline.
        halving: When to look at its samples and which to give up; None keeps all.
        cancel: Set it and the job ends within one step.
        on_step: Called in the lane after each of its steps with the sample-steps done and their
            total; it must return at once.
    """

    digest: str | None
    adapter: Adapter | None
    prompt_embedding: Tensor
    target: Tensor
    mask: Tensor
    seeds: tuple[int, ...]
    steps: int
    sampler: str
    tenant: str = ""
    deadline: float | None = None
    after: After = field(default_factory=Nothing)
    halving: Halving | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    on_step: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if (self.digest is None) != (self.adapter is None):
            raise ValueError(
                f"digest is {self.digest!r}, but the adapter is "
                f"{'absent' if self.adapter is None else 'given'}; pass both, or None for both"
            )
        if not self.seeds:
            raise ValueError("seeds is empty; pass at least one")

    @property
    def sample_steps(self) -> int:
        """U-Net evaluations of single samples that the job takes."""
        return len(self.seeds) * self.steps


@dataclass(frozen=True, eq=False)
class Sampled:
    """What the lane made of one job.

    Attributes:
        samples: Decoded images in [0, 1], not yet composited, in the order of the seeds.
            [N, 3, S, S]
        seeds: Of the samples: all of the job's, or those that were finished when it had to end.
        digest: Of the adapter that they were drawn with, as the weights told it at every step.
        swap_s: Seconds to make it ready; near 0 where it already was.
        sample_s: Seconds of encoding the masked image and from the first step to the last.
        decode_s: Seconds of decoding.
        queued_s: Seconds from submission until the lane took the job.
        partial: Whether the deadline ended it before all seeds were finished.
    """

    samples: Tensor
    seeds: tuple[int, ...]
    digest: str | None
    swap_s: float
    sample_s: float
    decode_s: float
    queued_s: float = 0.0
    partial: bool = False
