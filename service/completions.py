"""Completions over HTTP: admission, the deadline, the client that leaves, and the answer's form."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import orjson
import pybase64
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive
from torch import Tensor

from service.answer import Answer, Hole, Pending, Plan
from service.engine import Sampled
from service.errors import Cancelled, DeadlineExceeded, InvalidRequest, QueueFull
from service.forms import fields_of, files_of, read_form, wanted_form
from service.images import check_fit, encode, read_image, read_mask
from service.metrics import Metrics
from service.middleware import record_of
from service.road import Road
from service.schemas import CandidateView, CompletionFields, CompletionView, ImageFormat
from service.settings import Settings
from service.threads import after, side_by_side

T = TypeVar("T")

# Threads for decoding, ranking and encoding; the lane has its own.
WORKERS = 4
# Uploads that are read by one thread: sooner than a second one would be awake.
SMALL_BYTES = 2**20


@dataclass
class Gate:
    """Bounds the completions in flight, and so the memory of their images.

    Attributes:
        limit: Completions admitted at once; the lane's own queue refuses earlier as a rule.
        lane_s: Moving mean of the lane's time for one completion.
    """

    limit: int
    inside: int = 0
    lane_s: float = 1.0

    def enter(self) -> None:
        """Admit a completion, or raise QueueFull."""
        if self.inside >= self.limit:
            raise QueueFull(
                f"{self.inside} completions are in flight, which is the limit: try again later.",
                retry_after_s=self.inside * self.lane_s,
            )
        self.inside += 1

    def leave(self, work: asyncio.Task[Any]) -> None:
        """Count a completion out when its work has really ended, even after its answer."""
        self.inside -= 1
        if not work.cancelled():
            # Read here because, after a timeout, nobody else will.
            work.exception()

    def learn(self, seconds: float) -> None:
        """Take a completion's time in the lane into the mean."""
        self.lane_s += 0.2 * (seconds - self.lane_s)


@dataclass(frozen=True)
class Ask:
    """A completion as the client asked for it."""

    reference: str
    image: UploadFile
    mask: UploadFile
    plan: Plan
    top: int
    as_json: bool
    image_format: ImageFormat
    evidence: bool


def most_in_flight(settings: Settings) -> int:
    """Completions admitted at once: twice what may wait for the lane, and those in the threads."""
    return 2 * settings.max_queue + WORKERS


class Completions:
    """Serves completions over one road.

    Args:
        work: Threads for decoding, ranking and encoding: a few, which compute.
        waiting: Threads for what may wait for the registry: one for each completion in flight, so
            that scenes which are slow to come hold up nobody else's.
    """

    def __init__(
        self,
        road: Road,
        settings: Settings,
        metrics: Metrics,
        work: ThreadPoolExecutor,
        waiting: ThreadPoolExecutor,
    ) -> None:
        self.road = road
        self.settings = settings
        self.metrics = metrics
        self.work, self.waiting = work, waiting
        self.gate = Gate(most_in_flight(settings))
        metrics.watch(
            "realfill_completions_in_flight", "Completions admitted.", lambda: self.gate.inside
        )

    async def complete(self, scene: str, request: Request) -> Response:
        """Complete an image: the best candidate as an image, or all of them as JSON."""
        started, arrived = time.perf_counter(), time.monotonic()
        limit_s = self.settings.request_timeout_s
        try:
            form = await asyncio.wait_for(read_form(request), limit_s)
        except TimeoutError as error:
            raise self._too_slow() from error
        try:
            fields = fields_of(form, request.query_params)
            ask = self._ask(scene, request, arrived, fields, *files_of(form))
            self.gate.enter()
        except BaseException:
            await form.close()
            raise
        cancel = threading.Event()
        work = asyncio.create_task(self._work(ask, request, cancel))
        work.add_done_callback(self.gate.leave)
        left_s = limit_s - (time.perf_counter() - started)
        return await self._attend(work, request.receive, cancel, left_s)

    def _ask(
        self,
        scene: str,
        request: Request,
        arrived: float,
        fields: CompletionFields,
        image: UploadFile,
        mask: UploadFile,
    ) -> Ask:
        """Fill in the defaults and check what pydantic cannot know."""
        most = self.settings.max_samples
        count = fields.candidates or self.settings.candidates
        top = fields.top or min(count, 4)
        if count > most:
            raise InvalidRequest(f"The field 'candidates' is {count}: ask for at most {most}.")
        if top > count:
            raise InvalidRequest(
                f"The field 'top' is {top}: ask for at most {count}, as many as candidates."
            )
        feather_px = fields.feather_px
        plan = Plan(
            seeds=tuple(range(fields.seed, fields.seed + count)),
            steps=fields.steps or self.settings.steps or self.road.base.steps,
            sampler=fields.sampler or self.settings.sampler or self.road.base.sampler,
            feather_px=self.settings.feather_px if feather_px is None else feather_px,
            seamless=self.settings.seamless if fields.seamless is None else fields.seamless,
            deadline=None if fields.deadline_ms is None else arrived + fields.deadline_ms / 1000,
            halving=self.settings.halving if fields.halving is None else fields.halving,
        )
        as_json, image_format = wanted_form(request.headers.get("accept"), fields.format)
        return Ask(scene, image, mask, plan, top, as_json, image_format, fields.evidence)

    async def _attend(
        self,
        work: asyncio.Task[Response],
        receive: Receive,
        cancel: threading.Event,
        left_s: float,
    ) -> Response:
        """Wait for the work, the client's leaving or the deadline, whichever comes first."""
        watcher = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait(
                {work, watcher}, timeout=max(left_s, 0), return_when=asyncio.FIRST_COMPLETED
            )
            if work.done():
                return work.result()
            if watcher.done():
                raise Cancelled("The client left before its answer was ready.")
            raise self._too_slow()
        finally:
            # Also when this task is cancelled from outside; the lane reads it at its next step.
            cancel.set()
            watcher.cancel()

    def _too_slow(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"The completion took longer than {self.settings.request_timeout_s:g} s: ask for fewer "
            "candidates or steps, or raise REALFILL_REQUEST_TIMEOUT_S."
        )

    async def _work(self, ask: Ask, request: Request, cancel: threading.Event) -> Response:
        started, loop = time.perf_counter(), asyncio.get_running_loop()
        # The registry is asked while the images are decoded, side by side.
        look_up = loop.run_in_executor(self.waiting, self.road.look_up, ask.reference)
        # If it fails after the images did, nobody is told: they were the reason.
        look_up.add_done_callback(lambda done: done.cancelled() or done.exception())
        image, hole = await self._in_thread(partial(self._read, ask))
        read_s = time.perf_counter() - started
        begin = partial(self.road.begin, await look_up, image, hole, ask.plan, cancel)
        pending = await loop.run_in_executor(self.waiting, begin)
        pending.timings_s["read"] = read_s
        record = record_of(request.scope)
        drawn_at: list[float] = []
        pending.future.add_done_callback(lambda _: drawn_at.append(time.perf_counter()))
        finish = partial(self._finish, ask, pending, record.request_id, started)
        finished = after(pending.future, self.work, finish)
        answer, response = await asyncio.wrap_future(finished)
        self.road.after_lane.learn(len(answer.candidates), time.perf_counter() - drawn_at[0])
        stages = answer.timings_s
        self.gate.learn(stages["swap"] + stages["sample"] + stages["decode"])
        self.metrics.count_completion(len(answer.candidates), stages)
        record.fields.update(
            scene=answer.version.scene,
            version=answer.version.number,
            digest=answer.digest,
            candidates=len(ask.plan.seeds),
            timings_ms=_milliseconds(stages),
        )
        return response

    def _read(self, ask: Ask) -> tuple[Tensor, Hole]:
        """The request's image and mask; what is wrong with the image is said first."""
        tasks: list[Callable[[], Tensor | Hole]] = [
            partial(self._image, ask),
            partial(self._hole, ask),
        ]
        if (ask.image.size or 0) + (ask.mask.size or 0) <= SMALL_BYTES:
            with ask.mask.file:
                read = [task() for task in tasks]
        else:
            read = side_by_side(self.work, tasks)
        image, hole = read
        assert isinstance(image, Tensor)
        assert isinstance(hole, Hole)
        check_fit(image, hole.mask)
        return image, hole

    def _image(self, ask: Ask) -> Tensor:
        return _read(ask.image, read_image, self.settings.max_pixels)

    def _hole(self, ask: Ask) -> Hole:
        """The mask, and what it says by itself."""
        mask = _read(ask.mask, read_mask, self.settings.max_pixels)
        return self.road.look_at(mask, ask.plan)

    def _finish(
        self, ask: Ask, pending: Pending, request_id: str, started: float, sampled: Sampled
    ) -> tuple[Answer, Response]:
        """Rank and encode, in one go: each change of threads costs a part of a millisecond."""
        answer = self.road.finish(pending, sampled)
        write = self._as_json if ask.as_json else self._as_image
        return answer, write(ask, answer, request_id, started)

    def _as_image(self, ask: Ask, answer: Answer, request_id: str, started: float) -> Response:
        """The best candidate, with the evidence in headers."""
        best, began = answer.candidates[0], time.perf_counter()
        encoded = encode(answer.picture(0), ask.image_format)
        answer.timings_s["encode"] = time.perf_counter() - began
        answer.timings_s["total"] = time.perf_counter() - started
        headers = {
            "X-RealFill-Scene": answer.version.scene,
            "X-RealFill-Version": str(answer.version.number),
            "X-Adapter-Digest": answer.digest,
            "X-RealFill-Seed": str(best.seed),
            "X-RealFill-Timings": ", ".join(
                f"{stage};dur={ms}" for stage, ms in _milliseconds(answer.timings_s).items()
            ),
            "Vary": "Accept",
        }
        if answer.partial:
            headers["X-RealFill-Partial"] = f"{len(answer.candidates)}/{len(ask.plan.seeds)}"
        if answer.stale:
            headers["X-RealFill-Stale"] = "true"
        if best.score is not None:
            headers["X-RealFill-Score"] = str(best.score)
            headers["X-RealFill-Verdict"] = str(best.verdict)
        return Response(encoded, media_type=f"image/{ask.image_format}", headers=headers)

    def _as_json(self, ask: Ask, answer: Answer, request_id: str, started: float) -> Response:
        """All candidates, best first, the first ``top`` with their images."""
        views = []
        drawn = self._drawn(ask, answer)
        for place, candidate in enumerate(answer.candidates):
            image, evidence = drawn[place] if place < len(drawn) else (None, None)
            per_reference = candidate.per_reference
            views.append(
                CandidateView(
                    seed=candidate.seed,
                    agreement=candidate.agreement,
                    score=candidate.score,
                    per_reference=None if per_reference is None else list(per_reference),
                    confidence=candidate.confidence,
                    coverage=candidate.coverage,
                    verdict=candidate.verdict,
                    image=image,
                    evidence=evidence,
                )
            )
        answer.timings_s["total"] = time.perf_counter() - started
        view = CompletionView(
            request_id=request_id,
            scene=answer.version.scene,
            version=answer.version.number,
            digest=answer.digest,
            base_fingerprint=answer.base_fingerprint,
            ranked=answer.ranked,
            margin=answer.margin,
            partial=answer.partial,
            asked=len(ask.plan.seeds),
            stale=answer.stale,
            sampler=answer.plan.sampler,
            steps=answer.plan.steps,
            feather_px=answer.plan.feather_px,
            seamless=answer.plan.seamless,
            format=ask.image_format,
            candidates=views,
            timings_ms=_milliseconds(answer.timings_s),
        )
        headers = {"Vary": "Accept", "X-Adapter-Digest": answer.digest}
        return Response(_json(view), media_type="application/json", headers=headers)

    def _drawn(self, ask: Ask, answer: Answer) -> list[tuple[str, str | None]]:
        """Image and evidence of the first candidates, as text; side by side."""
        started = time.perf_counter()
        first = range(min(ask.top, len(answer.candidates)))
        drawn = side_by_side(self.work, [partial(_drawn, ask, answer, place) for place in first])
        answer.timings_s["encode"] = time.perf_counter() - started
        return drawn

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.work, work)


async def _until_disconnect(receive: Receive) -> None:
    """Return when the client has left; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        continue


def _read(file: UploadFile, decode: Callable[..., Tensor], max_pixels: int) -> Tensor:
    """An uploaded picture, whose file is closed."""
    with file.file as opened:
        return decode(opened.read(), max_pixels=max_pixels)


def _drawn(ask: Ask, answer: Answer, place: int) -> tuple[str, str | None]:
    """One candidate's image, and its evidence where that is asked for and there is any."""
    image = _text(encode(answer.picture(place), ask.image_format))
    evidence = answer.evidence(place) if ask.evidence else None
    return image, None if evidence is None else _text(encode(evidence, "png"))


def _text(file: bytes) -> str:
    return pybase64.b64encode_as_string(file)


def _json(view: CompletionView) -> bytes:
    """As pydantic writes it, which takes 1 ms for a megabyte of pictures."""
    return orjson.dumps(view.model_dump(mode="json"))


def _milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: round(value * 1000, 2) for stage, value in seconds.items()}
