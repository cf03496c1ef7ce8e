"""One job inside the lane: its samples, where they stand, and what it will answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from realfill.errors import InvalidCapsule
from service.engine.batcher import Ready
from service.engine.halving import survivors
from service.engine.job import Job, Sampled
from service.engine.sample import Sample


@dataclass(eq=False)
class Task:
    """A submitted job, who waits for it, and its samples once it runs.

    Attributes:
        samples: Those that are not given up, in the order of their seeds; empty until it begins.
        places: Of those samples among the job's seeds.
        images: Decoded samples by place.
        taken: Whether its adapter is pinned.
        overtaken: Jobs that began before it although they came later.
        previews: Of the first of its samples, where they stand at a look.
        verdict: What a look at the samples will say; while it is awaited they stand still.
        looks: Steps after which samples still have to wait for a look.
        at_once: Samples that move together; fewer than all where a deadline leaves no time for all,
            so that some are finished when it comes.
        sample_steps_left: What it will take at most.
        promised_s: Seconds in which an answer was expected when it came.
        ended_early: Whether its deadline took samples from it.
    """

    job: Job
    future: Future[Sampled]
    submitted: float
    samples: list[Sample] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    images: dict[int, Tensor] = field(default_factory=dict)
    taken: bool = False
    overtaken: int = 0
    previews: list[Tensor] = field(default_factory=list)
    verdict: Future[Tensor] | None = None
    looks: list[int] = field(default_factory=list)
    at_once: int | None = None
    sample_steps_left: int = 0
    sample_steps_done: int = 0
    taken_at: float = 0.0
    swap_s: float = 0.0
    sampled_at: float = 0.0
    decode_s: float = 0.0
    ended_early: bool = False
    promised_s: float | None = None

    def __post_init__(self) -> None:
        self.sample_steps_left = self.job.sample_steps

    def begin(self, samples: list[Sample]) -> None:
        """Start to run with these samples, one for each seed."""
        self.samples, self.places = samples, list(range(len(samples)))
        if self.job.halving is not None:
            self.looks = list(self.job.halving.steps(self.job.steps))

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.cancelled() or self.job.cancel.is_set()

    def late(self, decoding_s: Callable[[int], float]) -> bool:
        """Whether what is finished has to be decoded now; with nothing finished, at the deadline.

        Args:
            decoding_s: Expected seconds of decoding so many samples.
        """
        if self.job.deadline is None:
            return False
        finished = sum(sample.finished for sample in self.samples)
        needs_s = 0.0
        if finished:
            needs_s = decoding_s(finished - len(self.images)) + self.job.after.expected_s(finished)
        return time.monotonic() + needs_s >= self.job.deadline

    def movable(self) -> list[Sample]:
        """Samples that could make a step now, in the order of their seeds."""
        look = self.looks[0] if self.looks else None
        unfinished = [s for s in self.samples if not s.finished]
        return [s for s in unfinished[: self.at_once] if s.index != look]

    @property
    def unfinished(self) -> int:
        """Samples that have a step to make; before it begins, all."""
        if not self.samples:
            return len(self.job.seeds)
        return sum(not sample.finished for sample in self.samples)

    def ready(self, step_s: float | None, places: int) -> Ready | None:
        """The same for the batcher; None where no sample can move.

        Args:
            step_s: Expected seconds of a step of a full batch.
            places: Samples of a full batch.
        """
        movable = self.movable()
        if not movable or self.verdict is not None:
            return None
        slack, needs, work = None, 0.0, 0.0
        if self.job.deadline is not None:
            needs = (step_s or 0.0) * max(self.job.steps - s.index for s in movable)
            slack = (
                self.job.deadline
                - time.monotonic()
                - needs
                - self.job.after.expected_s(len(movable))
            )
            # When it is due it leaves, with whatever it has.
            work = (step_s or 0.0) * self.sample_steps_left / places
            work = min(work, max(0.0, slack + needs))
        scene, tenant = self.job.digest, self.job.tenant
        return Ready(self, tenant, scene, len(movable), slack, needs, work)

    @property
    def wants_look(self) -> bool:
        """Whether all its samples stand at a look."""
        return bool(self.looks and self.samples) and self.verdict is None and not self.movable()

    def judged(self, scores: Tensor | None) -> None:
        """Go on with the better samples, or with all where there are no scores."""
        halving = self.job.halving
        self.verdict = None
        at = self.looks.pop(0)
        if scores is None or halving is None:
            return
        kept = survivors(scores, halving.keeps(len(self.samples)))
        given_up = len(self.samples) - len(kept)
        self.sample_steps_left -= given_up * (self.job.steps - at)
        self.samples = [self.samples[k] for k in kept]
        self.places = [self.places[k] for k in kept]

    def to_decode(self, most: int) -> list[tuple[int, Tensor]]:
        """Places and latents of finished samples that are not decoded yet, a few."""
        pairs = zip(self.places, self.samples, strict=True)
        waiting = [(p, s.latents) for p, s in pairs if s.finished and p not in self.images]
        return waiting[:most]

    @property
    def all_finished(self) -> bool:
        """Whether no sample will move again."""
        return bool(self.samples) and all(s.finished for s in self.samples)

    @property
    def done(self) -> bool:
        """Whether every sample that it will have is decoded."""
        return self.all_finished and len(self.images) == len(self.samples)

    def stop(self) -> None:
        """End with the samples that are finished."""
        self.verdict, self.previews = None, []
        kept = [k for k, s in enumerate(self.samples) if s.finished]
        self.ended_early = self.ended_early or len(kept) < len(self.samples)
        self.samples = [self.samples[k] for k in kept]
        self.places = [self.places[k] for k in kept]

    def answer(self) -> Sampled:
        """What it made.

        Raises:
            InvalidCapsule: Its adapter drew something that is no picture.
        """
        if not bool(torch.isfinite(torch.stack([s.latents for s in self.samples])).all()):
            raise InvalidCapsule(
                f"adapter {self.job.digest or 'none'} draws values that are not finite; "
                "train and publish the scene again"
            )
        return Sampled(
            samples=torch.cat([self.images[place] for place in self.places]),
            seeds=tuple(self.job.seeds[place] for place in self.places),
            digest=self.samples[0].drawn_with,
            swap_s=self.swap_s,
            sample_s=self.sampled_at - self.taken_at - self.swap_s,
            decode_s=self.decode_s,
            queued_s=self.taken_at - self.submitted,
            partial=self.ended_early,
        )
