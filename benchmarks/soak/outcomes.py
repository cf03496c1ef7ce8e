"""What became of each request, and what an answer must look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import httpx
from pydantic import ValidationError

from benchmarks.soak.plan import Ask
from service.client import image_of
from service.schemas import CompletionView

OutcomeKind = Literal[
    "answer", "throttled", "cancelled", "hung", "refused", "server_error", "malformed", "broken"
]


@dataclass(frozen=True)
class Outcome:
    """The end of one request, in seconds since the start of the run.

    Attributes:
        kind: ``throttled`` is 429, ``cancelled`` means that we left, ``hung`` that no answer came,
            ``refused`` another status below 500, ``malformed`` an answer that contradicts itself
            or its request, ``broken`` a connection that failed.
        digest: The adapter that an answer says it was drawn with.
        asked_digest: The version that the request insisted on, if any.
        retry_after: Of a throttled request.
        detail: What went wrong.
    """

    index: int
    scene: str
    kind: OutcomeKind
    began_s: float
    ended_s: float
    digest: str | None = None
    asked_digest: str | None = None
    retry_after: str | None = None
    detail: str | None = None

    @property
    def latency_s(self) -> float:
        """From sending to the end."""
        return self.ended_s - self.began_s


@dataclass(frozen=True)
class Pictures:
    """What an answer carries: the adapter it names, and a PNG file by seed."""

    digest: str
    files: Mapping[int, bytes]


def kind_of(status: int) -> OutcomeKind:
    """The outcome that a status means."""
    if status < 300:
        return "answer"
    if status == 429:
        return "throttled"
    return "server_error" if status >= 500 else "refused"


def read_pictures(response: httpx.Response, ask: Ask) -> Pictures:
    """The pictures of an answer, which must be those that were asked for.

    Raises:
        ValueError: The answer contradicts the request, or itself.
    """
    return _of_image(response, ask) if ask.as_image else _of_json(response, ask)


def _of_image(response: httpx.Response, ask: Ask) -> Pictures:
    try:
        digest = response.headers["x-adapter-digest"]
        seed = int(response.headers["x-realfill-seed"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"an image came without its evidence ({error})") from error
    if seed not in ask.seeds:
        raise ValueError(f"seed {seed} was answered, {list(ask.seeds)} were asked for")
    return Pictures(digest, {seed: response.content})


def _of_json(response: httpx.Response, ask: Ask) -> Pictures:
    try:
        view = CompletionView.model_validate_json(response.content)
    except ValidationError as error:
        raise ValueError(
            f"the JSON is not a completion's ({error.error_count()} faults)"
        ) from error
    if (view.scene, view.steps) != (ask.scene, ask.steps):
        raise ValueError(
            f"{view.scene} in {view.steps} steps was answered,"
            f" {ask.scene} in {ask.steps} was asked for"
        )
    seeds = sorted(candidate.seed for candidate in view.candidates)
    if seeds != sorted(ask.seeds):
        raise ValueError(f"seeds {seeds} were answered, {sorted(ask.seeds)} were asked for")
    stated = response.headers.get("x-adapter-digest", view.digest)
    if stated != view.digest:
        raise ValueError(f"the header names adapter {stated}, the JSON {view.digest}")
    files = {candidate.seed: image_of(candidate.image) for candidate in view.candidates}
    return Pictures(view.digest, files)
