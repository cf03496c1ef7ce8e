"""Whole requests: from HTTP in to the ranked answer, beside diffusers and naive ranking."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.engine.adapters import random_capsule
from benchmarks.engine.rates import fits_pipeline, loop, pipeline, plain_copy
from benchmarks.engine.service import SCENE, hole, job_for, png, served, square_of
from benchmarks.engine.timing import alone, seconds_of
from benchmarks.ranking.peer import counts_at_working_size, naive_kornia
from benchmarks.ranking.pictures import REFERENCES
from realfill.base import Base
from realfill.nano.photographs import photograph
from realfill.rank.matchers import load_matcher
from realfill.rank.matching import LoFTRMatcher
from realfill.rank.references import at_working_size
from service.client import Client
from service.engine import Job

PEER = "diffusers in one batch at equal steps, then kornia's LoFTR pair by pair; no HTTP"
WARM_UPS = 2


@dataclass
class Requests:
    """Seconds that requests took, and the peers for the same candidates, in turns.

    Attributes:
        request_s: On the client's side.
        stages_ms: Of each request, as the service reports them.
        drawn_s: By diffusers, all candidates in one batch.
        ranked_s: By kornia's LoFTR, pair by pair.
    """

    request_s: list[float] = field(default_factory=list)
    stages_ms: list[dict[str, float]] = field(default_factory=list)
    drawn_s: list[float] = field(default_factory=list)
    ranked_s: list[float] = field(default_factory=list)


def measure_requests(
    base: Base,
    base_name: str,
    folder: Path,
    *,
    samples: int,
    steps: int,
    repeats: int,
    rank: int,
    matcher: str,
    start_s: float = 300.0,
) -> Requests:
    """Start the real server on a scene with three references, and time requests to it.

    The peers draw by the base alone, and neither composite nor encode: that is in their favour.

    Args:
        base: The base, as the server will load it by ``base_name`` and from its own settings.
        base_name: Name or folder of it.
        folder: For the registry and the server's log.
        samples: Candidates of a request.
        steps: Of each.
        repeats: Timed requests, after two that warm up.
        rank: Of the adapter.
        matcher: LoFTR's weights, as for ``load_matcher``.
        start_s: Longest to wait for the server.

    Raises:
        RuntimeError: The service did not rank every candidate.
    """
    square = alone(partial(square_of, base.size_px))
    photos = alone(partial(references_of, base.size_px))
    extras = {f"references.{k}": photo for k, photo in enumerate(photos)}
    capsule = alone(partial(random_capsule, base, SCENE, rank=rank, seed=0, extras=extras))
    measured = Requests()
    with served(base, base_name, folder, capsule, matcher=matcher, start_s=start_s) as (
        client,
        digest,
    ):
        job = job_for(base, capsule, digest, square)
        job = dataclasses.replace(job, seeds=tuple(range(samples)), steps=steps)
        draw, rank_all = _peers(base, job, photos, matcher)
        for turn in range(-WARM_UPS, repeats):
            request_s, stages_ms = _ask(client, square, samples=samples, steps=steps)
            drawn_s = seconds_of(draw, base.device)
            ranked_s = seconds_of(rank_all, base.device)
            if turn >= 0:
                measured.request_s.append(request_s)
                measured.stages_ms.append(stages_ms)
                measured.drawn_s.append(drawn_s)
                measured.ranked_s.append(ranked_s)
    return measured


def _ask(
    client: Client, square: Tensor, *, samples: int, steps: int
) -> tuple[float, dict[str, float]]:
    """Seconds of one request, and milliseconds of its stages."""
    image, mask = png(square), png(hole(square).expand(3, -1, -1))
    began = time.perf_counter()
    answer = client.complete(SCENE, image, mask, candidates=samples, steps=steps, seed=0)
    taken = time.perf_counter() - began
    if not answer.ranked or len(answer.candidates) != samples:
        raise RuntimeError(
            f"{len(answer.candidates)} of {samples} candidates came, ranked: {answer.ranked}; "
            "see the server's log"
        )
    return taken, dict(answer.timings_ms)


def _peers(
    base: Base, job: Job, photos: list[Tensor], matcher: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Drawing all candidates by diffusers, and ranking what was drawn by kornia."""
    plain = plain_copy(base)
    # The whole of LoFTR in torch, whatever program the service chose.
    ours = load_matcher(f"torch:{matcher.removeprefix('torch:')}", base.device)
    assert isinstance(ours, LoFTRMatcher)
    model = naive_kornia(ours)
    references = [at_working_size(ours, photo[None].to(base.device) / 255)[0] for photo in photos]
    draw_all = (
        pipeline(plain, job)
        if fits_pipeline(plain)
        else lambda: loop(plain, job, batch=len(job.seeds))
    )
    drawn: list[Tensor] = []

    def draw() -> None:
        drawn[:] = [draw_all()]

    def rank_all() -> None:
        counts_at_working_size(model, ours, drawn[0], references, job.mask)

    return draw, rank_all


def references_of(size_px: int) -> list[Tensor]:
    """Three photographs as a capsule carries them. [3, S, S] each, uint8"""
    photos = []
    for name in REFERENCES:
        photo = torch.tensor(photograph(name)).permute(2, 0, 1)[None].float()
        small = F.interpolate(photo, (size_px, size_px), mode="bilinear", antialias=True)[0]
        photos.append(small.clamp(0, 255).round().to(torch.uint8))
    return photos
