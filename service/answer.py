"""One completion on its way and at its end: its plan, its candidates, and what speaks for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from realfill.capsule import Capsule
from realfill.complete.compositing import Blend, Patch
from realfill.complete.seam import Seam
from realfill.complete.windows import Window
from realfill.photographs import to_bytes, to_pixels
from realfill.rank import Ranking, Verdict, draw_correspondences, judge
from registry import Version
from service.capsules import Loaded
from service.engine import Job, Sampled

REFERENCES = "references."


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
class Found:
    """What a reference means now, in memory; stale where its alias may have moved."""

    version: Version
    stale: bool
    loaded: Loaded
    timings_s: dict[str, float]


@dataclass(frozen=True)
class Ahead:
    """What of a completion needs its mask alone, neither its image nor a sample.

    Attributes:
        seam: None where none is asked for.
        blend: Of what is ranked, if anything is.
        patch: Of the image that the answer shows.
    """

    seam: Seam | None
    blend: Blend | None
    patch: Patch

    @staticmethod
    def of(plan: Plan, window: Window, seen: Tensor, mask: Tensor, *, ranked: bool) -> Ahead:
        """Everything, for a mask as the model sees it, and as it is. [S, S] and [H, W]"""
        feather_px = round(plan.feather_px * seen.shape[-1] / window.side)
        return Ahead(
            seam=Seam(seen) if plan.seamless else None,
            blend=Blend.around(seen, feather_px) if ranked else None,
            patch=Patch.around(window, mask, plan.feather_px),
        )


@dataclass(frozen=True)
class Hole:
    """A mask that was looked at, before there is an image.

    Attributes:
        mask: True where pixels are missing. [H, W]
        window: That the model sees.
        seen: 1 where pixels of it are missing. [S, S]
        ahead: Gives what else needs no image, always the same, and waits for it if need be.
    """

    mask: Tensor
    window: Window
    seen: Tensor
    ahead: Callable[[], Ahead]


@dataclass(frozen=True)
class Pending:
    """A completion on its way through the lane."""

    found: Found
    plan: Plan
    image: Tensor
    hole: Hole
    job: Job
    future: Future[Sampled]

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds per stage so far."""
        return self.found.timings_s


@dataclass(frozen=True)
class Candidate:
    """One candidate's evidence; None where nothing was ranked.

    Attributes:
        sample: Its index among the samples.
        agreement: Correspondences in its filled region that lie where the known region puts them;
            candidates are ordered by it.
        score: All sure correspondences in its filled region.
        per_reference: The same, for each reference.
        confidence: Sum of the correspondences' confidences.
        coverage: Share of the hole that a reference matches, in [0, 1].
        verdict: Whether the references support it.
    """

    sample: int
    seed: int
    agreement: float | None = None
    score: int | None = None
    per_reference: tuple[int, ...] | None = None
    confidence: float | None = None
    coverage: float | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Answer:
    """A completion: candidates, best first, and where they came from.

    Attributes:
        digest: Of the adapter that drew them, by the lane.
        margin: The best candidate's agreement minus the median.
        timings_s: Seconds per stage.
        partial: Whether the deadline came before every seed was finished.
        stale: Whether the registry did not answer, so that the alias may have moved.
    """

    version: Version
    digest: str
    plan: Plan
    base_fingerprint: str
    candidates: tuple[Candidate, ...]
    margin: float | None
    timings_s: dict[str, float]
    partial: bool
    stale: bool
    _pending: Pending = field(repr=False)
    _samples: Tensor = field(repr=False)
    _ranking: Ranking | None = field(repr=False)

    @property
    def ranked(self) -> bool:
        """Whether the order is by score; else it is by seed."""
        return self.candidates[0].score is not None

    def picture(self, place: int) -> Tensor:
        """The candidate at a place of the list, at the image's own resolution, 8 bit. [3, H, W]

        Made on demand: sixteen candidates of a large photograph would take gigabytes.
        """
        sample = self._samples[self.candidates[place].sample][None].cpu()
        patch, image = self._pending.hole.ahead().patch, self._pending.image
        picture = image.clone()
        picture[:, patch.rows, patch.columns] = to_bytes(patch.of(sample, image)[0])
        return picture

    def evidence(self, place: int) -> Tensor | None:
        """The candidate at a place beside the reference that vouches for it most, 8 bit. [3, H, W]

        Lines join their correspondences. None where nothing was ranked.
        """
        if self._ranking is None:
            return None
        sample, pending = self.candidates[place].sample, self._pending
        best = int(self._ranking.per_reference[sample].argmax())
        name = list(references_of(pending.found.loaded.capsule))[best]
        drawn = draw_correspondences(
            composited(pending, self._samples[sample][None].cpu())[0],
            to_pixels(pending.found.loaded.capsule.extras[name]),
            self._ranking.correspondences[best].of_pair(sample),
            pending.job.mask,
        )
        return to_bytes(drawn)


def references_of(capsule: Capsule) -> dict[str, Tensor]:
    """The pictures to rank by, by name."""
    return {k: capsule.extras[k] for k in sorted(capsule.extras) if k.startswith(REFERENCES)}


def composited(pending: Pending, samples: Tensor) -> Tensor:
    """Candidates as they are ranked: the window at the size that the model saw. [N, 3, S, S]

    Made where the samples are.
    """
    blend = pending.hole.ahead().blend
    assert blend is not None
    return blend.of(samples, pending.job.target)


def candidates_of(seeds: tuple[int, ...], ranking: Ranking | None) -> tuple[Candidate, ...]:
    """Best first where there is a ranking, else by seed."""
    if ranking is None:
        return tuple(Candidate(k, seed) for k, seed in enumerate(seeds))
    verdicts = judge(ranking)
    return tuple(
        Candidate(
            sample=k,
            seed=seeds[k],
            agreement=float(ranking.agreement[k]),
            score=int(ranking.scores[k]),
            per_reference=tuple(ranking.per_reference[k].tolist()),
            confidence=float(ranking.confidence[k]),
            coverage=float(ranking.coverage[k]),
            verdict=verdicts[k],
        )
        for k in ranking.order.tolist()
    )
