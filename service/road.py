"""The road of one completion: reference to pinned version to capsule to samples to candidates.

Independent of HTTP. ``look_up``, ``look_at``, ``begin`` and ``finish`` are for worker threads;
between the last two lies the lane.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from realfill.base import Base
from realfill.capsule import Capsule, read_capsule
from realfill.complete.compositing import composite
from realfill.complete.windows import crop, crop_mask, window_of
from realfill.errors import InvalidCapsule
from realfill.photographs import to_pixels
from realfill.rank import (
    Matcher,
    Ranking,
    ReferenceFeatures,
    from_extras,
    prepare_references,
    rank_candidates,
)
from registry import Registry, Version
from registry.signing import Guard
from service.after_lane import AfterLane
from service.answer import (
    Ahead,
    Answer,
    Found,
    Hole,
    Pending,
    Plan,
    candidates_of,
    composited,
    references_of,
)
from service.capsules import Capsules, Loaded
from service.engine import EngineMetrics, Halving, Job, Sampled
from service.engine.arena import TierMetrics
from service.errors import Cancelled
from service.leases import Leases
from service.resolver import Resolver

MIN_REFERENCE_PX = 8
MAX_REFERENCE_PX = 1024
# Threads that make seams and blends ready while a GPU draws.
AHEAD = 2

T = TypeVar("T")


class Lane(Protocol):
    """What the road asks of an engine."""

    @property
    def pending(self) -> int:
        """Jobs that wait or run."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """What ended it for good, if anything did."""
        ...

    def start(self) -> object:
        """Begin to take jobs; raises EngineClosed where it cannot."""
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

    def turn(self) -> AbstractContextManager[float]:
        """While it lasts, the lane leaves its cores to whoever has it."""
        ...

    def metrics(self) -> EngineMetrics | None:
        """What was done and is before the lane; None where nothing is known."""
        ...


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
        self.after_lane = AfterLane()
        self.resolver = Resolver(registry, patience_s=patience_s)
        self._guard = guard or Guard()
        # Rankings compete with the lane for the device; one at a time bounds their memory.
        self._rank_lock = threading.Lock()
        self._ahead = ThreadPoolExecutor(AHEAD, "realfill-ahead")
        self._open = False

    @property
    def ready(self) -> bool:
        """Whether completions are taken."""
        return self._open and self.alive

    @property
    def alive(self) -> bool:
        """Whether the lane runs, or may yet: one that has failed needs a new process."""
        return self.engine.failure is None

    @property
    def loaded(self) -> list[str]:
        """Digests of the capsules in memory, the least recently used first."""
        return self.capsules.digests

    def tiers(self) -> dict[str, TierMetrics]:
        """What lies in memory and, where the registry has a cache, on disk."""
        tiers = {"host": self.capsules.metrics()}
        if (disk := self.registry.cache_metrics()) is not None:
            tiers["disk"] = TierMetrics(pinned=0, **asdict(disk))
        return tiers

    def start(self) -> None:
        """Start the lane, and the renewal of claims on what is in memory."""
        self.engine.start()
        self.leases.start()
        self._open = True

    def close(self) -> None:
        """End the lane within a step; what is in it is cancelled, and every claim given up."""
        self._open = False
        self.engine.close(drain=False)
        self._ahead.shutdown(wait=False)
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
        found = self.look_up(reference)
        hole = self.look_at(mask, plan)
        pending = self.begin(found, image, hole, plan, cancel or threading.Event())
        return self.finish(pending, pending.future.result())

    def look_up(self, reference: str) -> Found:
        """What a reference means, and its capsule; argument and errors as for ``complete``.

        From here on the digest is pinned: an alias that moves meanwhile moves the next request.
        """
        timings: dict[str, float] = {}
        version, stale = _timed(timings, "resolve", lambda: self.resolver.resolve(reference))
        loaded = _timed(timings, "capsule", lambda: self.capsules.get(version))
        return Found(version, stale, loaded, timings)

    def look_at(self, mask: Tensor, plan: Plan) -> Hole:
        """What a mask says by itself; arguments and errors as for ``complete``.

        A GPU leaves the other cores idle while it draws: seams and blends are made then. On a CPU
        the lane has use for every core, and what is made beside it costs more than what is made
        now.
        """
        window = window_of(mask, self.base.size_px)
        seen = crop_mask(mask, window, self.base.size_px)
        ranked = self.matcher is not None
        work = cache(partial(Ahead.of, plan, window, seen, mask, ranked=ranked))
        if self.base.device.type != "cuda":
            work()
            return Hole(mask, window, seen, work)
        try:
            return Hole(mask, window, seen, self._ahead.submit(work).result)
        except RuntimeError:
            # The road was closed meanwhile.
            return Hole(mask, window, seen, work)

    def begin(
        self, found: Found, image: Tensor, hole: Hole, plan: Plan, cancel: threading.Event
    ) -> Pending:
        """Hand the job to the lane; arguments and errors as for ``complete``."""
        capsule = found.loaded.capsule
        job = Job(
            digest=found.version.digest,
            adapter=capsule.adapter,
            prompt_embedding=capsule.prompt_embedding,
            target=crop(image, hole.window, self.base.size_px),
            mask=hole.seen,
            seeds=plan.seeds,
            steps=plan.steps,
            sampler=plan.sampler,
            deadline=plan.deadline,
            after=self.after_lane,
            cancel=cancel,
        )
        _still_wanted(job)
        references = found.loaded.references
        if plan.halving and references is not None and self.matcher is not None:
            judge = partial(self._judge, references, job)
            job = replace(job, halving=Halving(judge))
        future = self.engine.submit(job)
        return Pending(found, plan, image, hole, job, future)

    def finish(self, pending: Pending, sampled: Sampled) -> Answer:
        """Everything after the lane: rank the samples on the window the model saw."""
        _still_wanted(pending.job)
        assert sampled.digest is not None, "a completion is drawn with an adapter"
        timings = pending.timings_s
        timings["queue"] = sampled.queued_s
        timings["swap"] = sampled.swap_s
        timings["sample"] = sampled.sample_s
        timings["decode"] = sampled.decode_s
        # Where they were drawn: sixteen of 512 px are 50 MB, which a CPU's core shifts in 0.5 s.
        samples = sampled.samples.float()
        if pending.plan.seamless:
            samples = _timed(timings, "seam", lambda: _seamless(pending, samples))
        ranking = _timed(timings, "rank", lambda: self._rank(pending, samples))
        return Answer(
            version=pending.found.version,
            digest=sampled.digest,
            plan=pending.plan,
            base_fingerprint=self.base.fingerprint,
            candidates=candidates_of(sampled.seeds, ranking),
            margin=ranking.margin if ranking else None,
            timings_s=timings,
            partial=sampled.partial,
            stale=pending.found.stale,
            _pending=pending,
            _samples=samples,
            _ranking=ranking,
        )

    def _rank(self, pending: Pending, samples: Tensor) -> Ranking | None:
        references = pending.found.loaded.references
        if references is None or self.matcher is None:
            return None
        candidates = composited(pending, samples)
        with self._cores(), self._rank_lock:
            _still_wanted(pending.job)
            return rank_candidates(self.matcher, candidates, pending.job.mask, references).to("cpu")

    def _judge(self, references: ReferenceFeatures, job: Job, previews: Tensor) -> Tensor:
        """Scores of previews. [N, 3, S, S] -> [N]"""
        assert self.matcher is not None
        previews = previews.float()
        target, mask = job.target.to(previews), job.mask.to(previews)
        previews = composite(previews, target, mask, feather_px=0)
        with self._cores(), self._rank_lock:
            _still_wanted(job)
            return rank_candidates(self.matcher, previews, job.mask, references).ordered_by.cpu()

    def _cores(self) -> AbstractContextManager[float]:
        """For a matcher: those of the lane, if it computes with more than one."""
        several = self.matcher is not None and self.matcher.takes_all_cores
        return self.engine.turn() if several else nullcontext(0.0)

    def _load(self, version: Version) -> Loaded:
        """The capsule of a version, from the registry."""
        data = self.registry.fetch(f"sha256:{version.digest}")
        self._guard.check(self.registry, version, data)
        capsule = self.check(data)
        if self.base.device.type == "cuda":
            capsule = replace(capsule, adapter=capsule.adapter.page_locked())
        return Loaded(capsule, self.prepare(capsule))

    def check(self, encoded: bytes) -> Capsule:
        """Read a capsule and make sure that this service can serve it.

        Raises:
            InvalidCapsule: It is not sound, or its references are no pictures to rank by.
            AdapterMismatch: It is for another base.
        """
        capsule = read_capsule(encoded, self.base)
        for name, photo in references_of(capsule).items():
            sides = photo.shape[1:]
            sound = photo.dtype == torch.uint8 and photo.dim() == 3 and photo.shape[0] == 3
            if not sound or not MIN_REFERENCE_PX <= min(sides) <= max(sides) <= MAX_REFERENCE_PX:
                raise InvalidCapsule(
                    f"The capsule's {name} is {photo.dtype} {list(photo.shape)}: write it as "
                    f"uint8 [3, H, W] with sides of {MIN_REFERENCE_PX} to {MAX_REFERENCE_PX} px."
                )
        return capsule

    def prepare(self, capsule: Capsule) -> ReferenceFeatures | None:
        """The capsule's references as the matcher sees them, kept in it or made now."""
        photos = [to_pixels(photo) for photo in references_of(capsule).values()]
        if not photos or self.matcher is None:
            return None
        kept = from_extras(self.matcher, capsule.extras)
        if kept is not None and len(kept) == len(photos):
            return kept
        with self._cores():
            return prepare_references(self.matcher, photos)


def _still_wanted(job: Job) -> None:
    """Asked again after every wait: work for nobody keeps others waiting."""
    if job.cancel.is_set():
        raise Cancelled("Nobody waits for this completion any more.")


def _seamless(pending: Pending, samples: Tensor) -> Tensor:
    """Samples that meet the known pixels."""
    seam = pending.hole.ahead().seam
    assert seam is not None
    return seam.close(samples, pending.job.target)


def _timed(timings_s: dict[str, float], stage: str, work: Callable[[], T]) -> T:
    started = time.perf_counter()
    value = work()
    timings_s[stage] = time.perf_counter() - started
    return value
