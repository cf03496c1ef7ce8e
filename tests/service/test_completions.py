"""Completions over HTTP: answers, the full queue, the deadline, the lost client."""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from realfill.base import Base
from service.engine import Engine
from service.http import create_app
from service.settings import Settings
from tests.fakes import (
    PATH,
    BrokenEngine,
    FullEngine,
    Serve,
    SlowEngine,
    decoded,
    hole,
    photo,
    refused,
    road_of,
    uploads,
)
from tests.tiny import tiny_base


def test_an_image_answer_is_the_best_candidate_with_its_evidence(serve: Serve) -> None:
    """Seed 9 is the brightest of the seeds 6 to 9, and its score says so."""
    answer = serve().post(PATH, files=uploads(), data={"seed": "6"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-realfill-scene"] == "tower"
    assert answer.headers["x-realfill-version"] == "1"
    assert len(answer.headers["x-adapter-digest"]) == 64
    assert answer.headers["x-realfill-seed"] == "9"
    assert int(answer.headers["x-realfill-score"]) > 0
    assert "swap;dur=1.0" in answer.headers["x-realfill-timings"]
    pixels = decoded(answer.content)
    assert (pixels[hole() > 0] == 225).all()
    assert np.array_equal(pixels[:4], photo()[:4])


def test_a_json_answer_ranks_all_and_carries_the_first_images(serve: Serve) -> None:
    """`top` limits the images, not the evidence."""
    answer = serve().post(
        PATH,
        files=uploads(),
        data={"seed": "6", "candidates": "4", "top": "2", "format": "webp"},
        headers={"Accept": "application/json", "X-Request-Id": "mine-1"},
    )
    view = answer.json()
    assert view["request_id"] == answer.headers["x-request-id"] == "mine-1"
    assert [c["seed"] for c in view["candidates"]] == [9, 8, 7, 6]
    assert [c["image"] is not None for c in view["candidates"]] == [True, True, False, False]
    image = Image.open(io.BytesIO(base64.b64decode(view["candidates"][0]["image"])))
    assert (image.format, image.size) == ("WEBP", (48, 40))
    assert view["ranked"] is True
    assert {"read", "resolve", "capsule", "queue", "swap", "sample", "rank"} <= set(
        view["timings_ms"]
    )


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_accept_chooses_the_encoding(serve: Serve, kind: str) -> None:
    """Each image type is written as what it is called."""
    answer = serve().post(PATH, files=uploads(), headers={"Accept": f"image/{kind}"})
    assert answer.headers["content-type"] == f"image/{kind}"
    assert Image.open(io.BytesIO(answer.content)).format == kind.upper()


def test_the_real_engine_answers_over_http(capsule: bytes, tmp_path: Path) -> None:
    """The whole road in one process: form, registry, swap, sampling, ranking, PNG."""
    base = tiny_base()
    road = road_of(base, tmp_path, Engine(base))
    road.registry.publish(capsule)
    with TestClient(create_app(road, Settings(steps=2, candidates=2))) as client:
        first, again = (client.post(PATH, files=uploads()) for _ in range(2))
    assert first.status_code == 200, first.text
    assert first.content == again.content


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    """429, and Retry-After in whole seconds, rounded up."""
    answer = serve(FullEngine()).post(PATH, files=uploads())
    refused(answer, 429, "queue_full")
    assert answer.headers["retry-after"] == "8"


def test_an_unforeseen_failure_shows_no_inside(serve: Serve) -> None:
    """500 with the request id to look for; the text stays in the log."""
    message = refused(serve(BrokenEngine()).post(PATH, files=uploads()), 500, "internal_error")
    assert "request_id" in message
    assert "CUDA" not in message


def test_a_completion_that_takes_too_long_is_given_up(serve: Serve) -> None:
    """504 in our shape, and the lane is free within a step."""
    engine = SlowEngine()
    answer = serve(engine, request_timeout_s=0.3).post(PATH, files=uploads())
    assert "longer than 0.3 s" in refused(answer, 504, "deadline_exceeded")
    assert engine.freed.wait(1.0)


def test_a_client_that_leaves_frees_the_lane(serve: Serve) -> None:
    """The job's flag is set as soon as the connection is gone, long before the deadline."""
    engine = SlowEngine()
    client = serve(engine)
    request = client.build_request("POST", PATH, files=uploads())
    body, sent = request.read(), []

    async def leave() -> None:
        asked = 0

        async def receive() -> dict[str, Any]:
            nonlocal asked
            asked += 1
            if asked == 1:
                return {"type": "http.request", "body": body, "more_body": False}
            await anyio.to_thread.run_sync(engine.started.wait, 5)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(k.lower().encode(), v.encode()) for k, v in request.headers.items()]
        scope = {
            "type": "http",
            "method": "POST",
            "path": PATH,
            "raw_path": PATH.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
        }
        await client.app(scope, receive, send)  # type: ignore[arg-type]

    began = time.perf_counter()
    anyio.run(leave)
    assert engine.freed.wait(1.0)
    assert time.perf_counter() - began < 5
    assert sent[0]["status"] == 499


def test_completions_in_flight_are_bounded(serve: Serve) -> None:
    """Beyond the bound a request is refused before its images are decoded."""
    engine = SlowEngine()
    client = serve(engine, max_queue=1, request_timeout_s=0.5)
    statuses: list[int] = []

    async def flood() -> None:
        import httpx2

        transport = httpx2.ASGITransport(client.app)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as caller:

            async def call() -> None:
                statuses.append((await caller.post(PATH, files=uploads())).status_code)

            async with anyio.create_task_group() as group:
                for _ in range(8):
                    group.start_soon(call)

    anyio.run(flood)
    assert sorted(statuses) == [429, 429] + [504] * 6


def test_an_answer_says_whether_the_references_support_it(serve: Serve) -> None:
    """In a header of an image, beside every candidate in JSON, and drawn where it is asked for."""
    headers = {"Accept": "application/json"}
    fields = {"seed": "6", "candidates": "4", "top": "2"}
    plain = serve().post(PATH, files=uploads(), data=fields, headers=headers).json()
    assert [c["evidence"] for c in plain["candidates"]] == [None] * 4
    assert all(c["verdict"] in ("supported", "weak", "unsupported") for c in plain["candidates"])
    drawn = (
        serve()
        .post(PATH, files=uploads(), data={**fields, "evidence": "true"}, headers=headers)
        .json()
    )
    pictures = [c["evidence"] for c in drawn["candidates"]]
    assert [picture is not None for picture in pictures] == [True, True, False, False]
    image = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
    # Candidate and reference side by side, 256 px high.
    assert image.format == "PNG"
    assert image.height == 256
    assert image.width > 512
    best = serve().post(PATH, files=uploads(), data={"seed": "6"})
    assert best.headers["x-realfill-verdict"] == plain["candidates"][0]["verdict"]


def test_what_follows_the_lane_is_learnt(base: Base, capsule: bytes, tmp_path: Path) -> None:
    """From each completion; deadlines leave as much time for it."""
    road = road_of(base, tmp_path)
    road.registry.publish(capsule)
    with TestClient(create_app(road, Settings())) as client:
        assert road.after_lane.expected_s(2) == 0.0
        client.post(PATH, files=uploads(), data={"candidates": "2"})
    assert 0 < road.after_lane.expected_s(2) < 5


def test_a_deadline_gives_what_is_finished_and_says_so(capsule: bytes, tmp_path: Path) -> None:
    """Some of sixteen candidates by the deadline, in JSON and as an image; none is 504."""
    base = tiny_base()
    engine = Engine(base, max_samples=1)
    road = road_of(base, tmp_path, engine)
    road.registry.publish(capsule)
    settings = Settings(steps=40, candidates=16, max_samples=16)
    with TestClient(create_app(road, settings)) as client:
        began = time.perf_counter()
        client.post(PATH, files=uploads(), data={"candidates": "1"})
        asked = {"deadline_ms": str(round(3000 * (time.perf_counter() - began)))}
        # The calibrated model would refuse what cannot be finished; here it knows nothing.
        engine.cost.calibrate([1], lambda size: 1e-9, lambda: 0.0)
        wanted = {"Accept": "application/json"}
        view = client.post(PATH, files=uploads(), data=asked, headers=wanted).json()
        assert view["asked"] == 16
        assert view["partial"] == (len(view["candidates"]) < 16)
        assert 1 <= len(view["candidates"]) <= 16
        late = client.post(PATH, files=uploads(), data={"deadline_ms": "1"})
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
