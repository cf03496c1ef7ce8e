"""The road of one completion: reference to pinned version to capsule to samples to candidates.

Independent of HTTP. ``begin`` and ``finish`` are for worker threads; between them lies the lane.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from realfill.base import Base
from realfill.capsule import Capsule, read_capsule
from realfill.complete.compositing import Window, composite, crop, crop_mask, paste, window_of
from realfill.complete.seam import seamless
from realfill.errors import InvalidCapsule
from realfill.rank import Matcher, Ranking, ReferenceFeatures, prepare_references, rank_candidates
from registry import Registry, Version
from registry.signing import Guard
from service.capsules import Capsules, Loaded
from service.engine import EngineMetrics, Halving, Job, Sampled
from service.errors import Cancelled
from service.images import to_bytes, to_pixels
from service.leases import Leases
from service.resolver import Resolver

REFERENCES = "references."
MIN_REFERENCE_PX = 8
MAX_REFERENCE_PX = 1024

T = TypeVar("T")


class Lane(Protocol):
    """What the road asks of an engine."""

    @property
    def pending(self) -> int:
        """Jobs that wait or run."""
        ...

    def start(self) -> object:
        """Begin to take jobs."""
        ...

    def close(self, *, drain: bool = True) -> None:
        """Refuse new jobs and end; without draining, those there are get cancelled."""
        ...

    def submit(self, job: Job) -> Future[Sampled]:
        """Queue a job; raises QueueFull or EngineClosed."""
        ...

    def forget(self, digest: str) -> None:
        """Keep nothing of an adapter on the device."""
        ...

    def metrics(self) -> EngineMetrics | None:
        """What was done and is before the lane; None where nothing is known."""
        ...


@dataclass(frozen=True)
class Plan:
    """How to sample: one candidate per seed.

    Attributes:
        feather_px: Width of the blend, in pixels of the image.
        seamless: Whether samples are shifted to meet the known pixels around the hole.
        deadline: When to answer with what is finished, on ``time.monotonic``'s clock.
        halving: Whether to give up the worse candidates half-way.
    """

    seeds: tuple[int, ...]
    steps: int
    sampler: str
    feather_px: int
    seamless: bool = True
    deadline: float | None = None
    halving: bool = False


@dataclass(frozen=True)
class Pending:
    """A completion on its way through the lane; stale where its alias may have moved."""

    version: Version
    stale: bool
    loaded: Loaded
    plan: Plan
    image: Tensor
    mask: Tensor
    window: Window
    job: Job
    future: Future[Sampled]
    timings_s: dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """One candidate's evidence; None where nothing was ranked.

    Attributes:
        sample: Its index among the samples.
        score: Correspondences between its filled region and the references.
        per_reference: The same, for each reference.
        confidence: Sum of the correspondences' confidences.
        coverage: Share of the hole that a reference matches, in [0, 1].
    """

    sample: int
    seed: int
    score: int | None = None
    per_reference: tuple[int, ...] | None = None
    confidence: float | None = None
    coverage: float | None = None


@dataclass(frozen=True)
class Answer:
    """A completion: candidates, best first, and where they came from.

    Attributes:
        margin: Best score minus the median score.
        timings_s: Seconds per stage.
        partial: Whether the deadline came before every seed was finished.
        stale: Whether the registry did not answer, so that the alias may have moved.
    """

    version: Version
    plan: Plan
    base_fingerprint: str
    candidates: tuple[Candidate, ...]
    margin: float | None
    timings_s: dict[str, float]
    partial: bool
    stale: bool
    _pending: Pending = field(repr=False)
    _samples: Tensor = field(repr=False)

    @property
    def ranked(self) -> bool:
        """Whether the order is by score; else it is by seed."""
        return self.candidates[0].score is not None

    def picture(self, place: int) -> Tensor:
        """The candidate at a place of the list, at the image's own resolution, 8 bit. [3, H, W]

        Made on demand: sixteen candidates of a large photograph would take gigabytes.
        """
        sample = self._samples[self.candidates[place].sample][None]
        pending = self._pending
        target, mask = to_pixels(pending.image), pending.mask.float()
        return to_bytes(paste(sample, pending.window, target, mask, self.plan.feather_px)[0])


class Road:
    """Joins registry, engine and matcher; safe to use from many threads."""

    def __init__(
        self,
        base: Base,
        registry: Registry,
        engine: Lane,
        matcher: Matcher | None,
        *,
        host_bytes: int = 2**30,
        guard: Guard | None = None,
        lease_s: float = 300.0,
        patience_s: float = 2.0,
    ) -> None:
        self.base = base
        self.registry = registry
        self.engine = engine
        self.matcher = matcher
        self.leases = Leases(registry, self.let_go, lease_s=lease_s)
        self.capsules = Capsules(self._load, self.leases, budget_bytes=host_bytes)
        self.resolver = Resolver(registry, patience_s=patience_s)
        self._guard = guard or Guard()
        # Rankings compete with the lane for the device; one at a time bounds their memory.
        self._rank_lock = threading.Lock()
        self._open = False

    @property
    def ready(self) -> bool:
        """Whether completions are taken."""
        return self._open

    @property
    def loaded(self) -> list[str]:
        """Digests of the capsules in memory, the least recently used first."""
        return self.capsules.digests

    def start(self) -> None:
        """Start the lane, and the renewal of claims on what is in memory."""
        self.engine.start()
        self.leases.start()
        self._open = True

    def close(self) -> None:
        """End the lane within a step; what is in it is cancelled, and every claim given up."""
        self._open = False
        self.engine.close(drain=False)
        self.leases.close()

    def let_go(self, digest: str) -> bool:
        """Drop a capsule from memory and device, and the claim on it; False where it is not there.

        What is in the lane is finished first.
        """
        here = self.capsules.drop(digest)
        self.engine.forget(digest)
        return here

    def complete(
        self,
        reference: str,
        image: Tensor,
        mask: Tensor,
        plan: Plan,
        cancel: threading.Event | None = None,
    ) -> Answer:
        """Complete an image, from its pixels to ranked candidates, and wait for it.

        Args:
            reference: ``tower``, ``tower@candidate``, ``tower@3`` or ``sha256:<64 hex>``.
            image: 8-bit pixels. [3, H, W]
            mask: True where pixels are missing. [H, W]
            plan: Seeds, steps, sampler and feather.
            cancel: Set it to give the work up within a step.

        Raises:
            RegistryError: The scene is unknown, or its capsule is damaged or out of reach.
            AdapterMismatch: The capsule is for another base.
            QueueFull: The lane has too much to do.
            Cancelled: ``cancel`` was set.
        """
        pending = self.begin(reference, image, mask, plan, cancel or threading.Event())
        return self.finish(pending, pending.future.result())

    def begin(
        self, reference: str, image: Tensor, mask: Tensor, plan: Plan, cancel: threading.Event
    ) -> Pending:
        """Everything before the lane; arguments and errors as for ``complete``."""
        if cancel.is_set():
            raise Cancelled("Nobody waits for this completion any more.")
        timings: dict[str, float] = {}
        # From here on the digest is pinned: an alias that moves meanwhile moves the next request.
        version, stale = _timed(timings, "resolve", lambda: self.resolver.resolve(reference))
        loaded = _timed(timings, "capsule", lambda: self.capsules.get(version))
        size_px = self.base.size_px
        window = window_of(mask, size_px)
        job = Job(
            digest=version.digest,
            adapter=loaded.capsule.adapter,
            prompt_embedding=loaded.capsule.prompt_embedding,
            target=crop(to_pixels(image), window, size_px),
            mask=crop_mask(mask.float(), window, size_px),
            seeds=plan.seeds,
            steps=plan.steps,
            sampler=plan.sampler,
            deadline=plan.deadline,
            cancel=cancel,
        )
        if plan.halving and loaded.references is not None and self.matcher is not None:
            judge = partial(self._judge, loaded.references, job)
            job = replace(job, halving=Halving(judge))
        future = self.engine.submit(job)
        return Pending(version, stale, loaded, plan, image, mask, window, job, future, timings)

    def finish(self, pending: Pending, sampled: Sampled) -> Answer:
        """Everything after the lane: rank the samples on the window the model saw."""
        timings = pending.timings_s
        timings["queue"] = sampled.queued_s
        timings["swap"] = sampled.swap_s
        timings["sample"] = sampled.sample_s
        timings["decode"] = sampled.decode_s
        samples = sampled.samples.float().cpu()
        if pending.plan.seamless:
            job = pending.job
            samples = _timed(timings, "seam", lambda: seamless(samples, job.target, job.mask))
        ranking = _timed(timings, "rank", lambda: self._rank(pending, samples))
        return Answer(
            version=pending.version,
            plan=pending.plan,
            base_fingerprint=self.base.fingerprint,
            candidates=_candidates(sampled.seeds, ranking),
            margin=ranking.margin if ranking else None,
            timings_s=timings,
            partial=sampled.partial,
            stale=pending.stale,
            _pending=pending,
            _samples=samples,
        )

    def _rank(self, pending: Pending, samples: Tensor) -> Ranking | None:
        references = pending.loaded.references
        if references is None or self.matcher is None:
            return None
        job, size_px = pending.job, self.base.size_px
        feather_px = round(pending.plan.feather_px * size_px / pending.window.side)
        candidates = composite(samples, job.target, job.mask, feather_px=feather_px)
        with self._rank_lock:
            return rank_candidates(self.matcher, candidates, job.mask, references)

    def _judge(self, references: ReferenceFeatures, job: Job, previews: Tensor) -> Tensor:
        """Scores of previews. [N, 3, S, S] -> [N]"""
        assert self.matcher is not None
        previews = composite(previews.float().cpu(), job.target, job.mask, feather_px=0)
        with self._rank_lock:
            return rank_candidates(self.matcher, previews, job.mask, references).scores.cpu()

    def _load(self, version: Version) -> Loaded:
        """The capsule of a version, from the registry."""
        data = self.registry.fetch(f"sha256:{version.digest}")
        self._guard.check(self.registry, version, data)
        capsule = self.check(data)
        return Loaded(capsule, self._prepare(capsule))

    def check(self, encoded: bytes) -> Capsule:
        """Read a capsule and make sure that this service can serve it.

        Raises:
            InvalidCapsule: It is not sound, or its references are no pictures to rank by.
            AdapterMismatch: It is for another base.
        """
        capsule = read_capsule(encoded, self.base)
        for name, photo in _references(capsule).items():
            sides = photo.shape[1:]
            sound = photo.dtype == torch.uint8 and photo.dim() == 3 and photo.shape[0] == 3
            if not sound or not MIN_REFERENCE_PX <= min(sides) <= max(sides) <= MAX_REFERENCE_PX:
                raise InvalidCapsule(
                    f"The capsule's {name} is {photo.dtype} {list(photo.shape)}: write it as "
                    f"uint8 [3, H, W] with sides of {MIN_REFERENCE_PX} to {MAX_REFERENCE_PX} px."
                )
        return capsule

    def _prepare(self, capsule: Capsule) -> ReferenceFeatures | None:
        photos = [to_pixels(photo) for photo in _references(capsule).values()]
        if not photos or self.matcher is None:
            return None
        return prepare_references(self.matcher, photos)


def _references(capsule: Capsule) -> dict[str, Tensor]:
    """The pictures to rank by, by name."""
    return {k: capsule.extras[k] for k in sorted(capsule.extras) if k.startswith(REFERENCES)}


def _candidates(seeds: tuple[int, ...], ranking: Ranking | None) -> tuple[Candidate, ...]:
    """Best first where there is a ranking, else by seed."""
    if ranking is None:
        return tuple(Candidate(k, seed) for k, seed in enumerate(seeds))
    return tuple(
        Candidate(
            sample=k,
            seed=seeds[k],
            score=int(ranking.scores[k]),
            per_reference=tuple(ranking.per_reference[k].tolist()),
            confidence=float(ranking.confidence[k]),
            coverage=float(ranking.coverage[k]),
        )
        for k in ranking.order.tolist()
    )


def _timed(timings_s: dict[str, float], stage: str, work: Callable[[], T]) -> T:
    started = time.perf_counter()
    value = work()
    timings_s[stage] = time.perf_counter() - started
    return value
