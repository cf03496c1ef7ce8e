"""Completions over HTTP: answers, bad input, the full queue, the deadline, the lost client."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator
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
from service.road import Lane
from service.settings import Settings
from tests.fakes import (
    BrokenEngine,
    FullEngine,
    SlowEngine,
    decoded,
    encoded,
    hole,
    photo,
    road_of,
)
from tests.tiny import tiny_base, tiny_capsule

Serve = Callable[..., TestClient]
PATH = "/v1/scenes/tower/complete"


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base()


@pytest.fixture(scope="module")
def capsule(base: Base) -> bytes:
    return tiny_capsule(base, "tower", seed=1)


@pytest.fixture
def serve(base: Base, capsule: bytes, tmp_path: Path) -> Iterator[Serve]:
    clients: list[TestClient] = []

    def start(engine: Lane | None = None, **limits: Any) -> TestClient:
        road = road_of(base, tmp_path, engine)
        road.registry.publish(capsule)
        # The fake engine's fills are told apart by their grey.
        settings = Settings(**{"seamless": False, **limits})
        client = TestClient(create_app(road, settings))
        clients.append(client.__enter__())
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def _files(**other: bytes) -> dict[str, tuple[str, bytes]]:
    files = {"image": encoded(photo()), "mask": encoded(hole()), **other}
    return {name: (f"{name}.png", content) for name, content in files.items()}


def _refused(answer: Any, status: int, code: str) -> str:
    """Check the one error shape and give its message."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "request_id"}
    assert error["code"] == code
    assert error["request_id"] == answer.headers["x-request-id"]
    return str(error["message"])


def test_an_image_answer_is_the_best_candidate_with_its_evidence(serve: Serve) -> None:
    """Seed 9 is the brightest of the seeds 6 to 9, and its score says so."""
    answer = serve().post(PATH, files=_files(), data={"seed": "6"})
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
        files=_files(),
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
    answer = serve().post(PATH, files=_files(), headers={"Accept": f"image/{kind}"})
    assert answer.headers["content-type"] == f"image/{kind}"
    assert Image.open(io.BytesIO(answer.content)).format == kind.upper()


def test_the_real_engine_answers_over_http(capsule: bytes, tmp_path: Path) -> None:
    """The whole road in one process: form, registry, swap, sampling, ranking, PNG."""
    base = tiny_base()
    road = road_of(base, tmp_path, Engine(base))
    road.registry.publish(capsule)
    with TestClient(create_app(road, Settings(steps=2, candidates=2))) as client:
        first, again = (client.post(PATH, files=_files()) for _ in range(2))
    assert first.status_code == 200, first.text
    assert first.content == again.content


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"mask": encoded(hole(40, 40))}, "'mask' is 40x40 pixels, the target 48x40"),
        ({"mask": encoded(np.zeros((40, 48), np.uint8))}, "marks no pixel as missing"),
        ({"mask": encoded(np.full((40, 48), 255, np.uint8))}, "marks every pixel as missing"),
        ({"image": encoded(photo())[:900]}, "damaged or incomplete"),
        ({"image": encoded(photo(), "GIF")}, "is a GIF, whatever its name says"),
        ({"image": b"hello", "mask": b""}, "'image' is no image"),
        ({"image": b""}, "is empty"),
    ],
    ids=["another size", "empty mask", "full mask", "truncated", "GIF", "both text", "nothing"],
)
def test_an_unusable_picture_is_refused(serve: Serve, other: Any, sentence: str) -> None:
    """422 with one sentence that names the field, what is wrong and the remedy."""
    message = _refused(serve().post(PATH, files=_files(**other)), 422, "invalid_scene")
    assert sentence in message
    assert message.startswith("The field '")


def test_large_uploads_are_read_side_by_side_to_the_same_end(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answer, and what is wrong with the image is said first."""
    client = serve()
    small = client.post(PATH, files=_files()).content
    monkeypatch.setattr("service.completions.SMALL_BYTES", 0)
    assert client.post(PATH, files=_files()).content == small
    broken = client.post(PATH, files=_files(image=b"hello", mask=b""))
    assert "'image' is no image" in _refused(broken, 422, "invalid_scene")


def test_a_bomb_is_refused_before_it_is_decoded(serve: Serve) -> None:
    """Thirty megapixels in a few kilobytes."""
    bomb = io.BytesIO()
    Image.new("1", (6000, 5000)).save(bomb, "PNG")
    answer = serve().post(PATH, files=_files(image=bomb.getvalue()))
    assert "6000x5000, 30000000 pixels" in _refused(answer, 413, "image_too_large")


def test_a_bomb_for_a_mask_is_refused_too(serve: Serve) -> None:
    """A hundred megapixels, at which Pillow itself objects."""
    bomb = io.BytesIO()
    Image.new("1", (14000, 14000)).save(bomb, "PNG")
    _refused(serve().post(PATH, files=_files(mask=bomb.getvalue())), 413, "image_too_large")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"steps": "many"}, "'steps' is 'many': input should be a valid integer"),
        ({"seed": "1e3"}, "'seed' is '1e3'"),
        ({"seed": "-1"}, "'seed' is '-1': input should be greater than or equal to 0"),
        ({"candidates": "17"}, "'candidates' is 17: ask for at most 16"),
        ({"candidates": "2", "top": "3"}, "'top' is 3: ask for at most 2"),
        ({"sampler": "euler"}, "'sampler' is 'euler': input should be 'ddpm', 'ddim'"),
        ({"feather_px": "-3"}, "'feather_px' is '-3'"),
        ({"stepz": "20"}, "'stepz' is unknown: use image, mask, seed"),
        ({"seed": ["1", "2"]}, "'seed' is given twice"),
    ],
)
def test_a_bad_field_is_refused(serve: Serve, data: Any, sentence: str) -> None:
    """Nothing is guessed and nothing ignored."""
    message = _refused(serve().post(PATH, files=_files(), data=data), 422, "invalid_request")
    assert sentence in message


def test_a_missing_file_is_refused(serve: Serve) -> None:
    """The sentence names the field."""
    files = _files()
    del files["mask"]
    message = _refused(serve().post(PATH, files=files), 422, "invalid_request")
    assert "'mask' is given 0 times" in message


def test_text_for_a_file_is_refused(serve: Serve) -> None:
    """A URL, say: the service fetches nothing."""
    files = _files()
    del files["image"]
    answer = serve().post(PATH, files=files, data={"image": "http://127.0.0.1/x.png"})
    assert "'image' is text" in _refused(answer, 422, "invalid_request")


def test_another_body_than_a_form_is_refused(serve: Serve) -> None:
    """415, with the form that is wanted."""
    answer = serve().post(PATH, json={"image": "..."})
    assert "multipart/form-data" in _refused(answer, 415, "unsupported_media")


def test_a_torn_form_is_refused(serve: Serve) -> None:
    """A multipart body without its boundary."""
    answer = serve().post(
        PATH, content=b"--x\r\nbroken", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    _refused(answer, 422, "invalid_request")


def test_an_unwritable_answer_is_refused(serve: Serve) -> None:
    """406 names what can be had."""
    answer = serve().post(PATH, files=_files(), headers={"Accept": "text/html"})
    assert "image/png" in _refused(answer, 406, "not_acceptable")


def test_an_unknown_scene_is_not_found(serve: Serve) -> None:
    """404 with the registry's sentence."""
    answer = serve().post("/v1/scenes/bridge/complete", files=_files())
    assert "bridge" in _refused(answer, 404, "not_found")


def test_a_scene_that_is_no_name_is_refused(serve: Serve) -> None:
    """422 with the rule."""
    _refused(serve().post("/v1/scenes/a b/complete", files=_files()), 422, "invalid_reference")


def test_a_capsule_with_a_flipped_byte_is_reported(serve: Serve, tmp_path: Path) -> None:
    """Damage on the disk is a 500 that says which object, not a wrong picture."""
    client = serve()
    blobs = [p for p in (tmp_path / "registry").rglob("*") if len(p.name) >= 64 and p.is_file()]
    for blob in blobs:
        stored = bytearray(blob.read_bytes())
        stored[-5] ^= 1
        blob.chmod(0o600)
        blob.write_bytes(stored)
    _refused(client.post(PATH, files=_files()), 500, "corrupt_object")


def test_a_body_above_the_limit_is_refused(serve: Serve) -> None:
    """By its declared length, and the sentence has the limit."""
    answer = serve(max_body_bytes=1000).post(PATH, files=_files())
    assert "limit of 1000 bytes" in _refused(answer, 413, "body_too_large")


def test_a_chunked_body_above_the_limit_is_refused(serve: Serve) -> None:
    """No length is declared: the bytes are counted as they come."""

    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for _ in range(20):
            yield b"0" * 100

    answer = serve(max_body_bytes=1000).post(
        PATH, content=chunks(), headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    _refused(answer, 413, "body_too_large")


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    """429, and Retry-After in whole seconds, rounded up."""
    answer = serve(FullEngine()).post(PATH, files=_files())
    _refused(answer, 429, "queue_full")
    assert answer.headers["retry-after"] == "8"


def test_an_unforeseen_failure_shows_no_inside(serve: Serve) -> None:
    """500 with the request id to look for; the text stays in the log."""
    message = _refused(serve(BrokenEngine()).post(PATH, files=_files()), 500, "internal_error")
    assert "request_id" in message
    assert "CUDA" not in message


def test_a_completion_that_takes_too_long_is_given_up(serve: Serve) -> None:
    """504 in our shape, and the lane is free within a step."""
    engine = SlowEngine()
    answer = serve(engine, request_timeout_s=0.3).post(PATH, files=_files())
    assert "longer than 0.3 s" in _refused(answer, 504, "deadline_exceeded")
    assert engine.freed.wait(1.0)


def test_a_client_that_leaves_frees_the_lane(serve: Serve) -> None:
    """The job's flag is set as soon as the connection is gone, long before the deadline."""
    engine = SlowEngine()
    client = serve(engine)
    request = client.build_request("POST", PATH, files=_files())
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
                statuses.append((await caller.post(PATH, files=_files())).status_code)

            async with anyio.create_task_group() as group:
                for _ in range(8):
                    group.start_soon(call)

    anyio.run(flood)
    assert sorted(statuses) == [429, 429] + [504] * 6


def test_an_answer_says_whether_the_references_support_it(serve: Serve) -> None:
    """In a header of an image, beside every candidate in JSON, and drawn where it is asked for."""
    headers = {"Accept": "application/json"}
    fields = {"seed": "6", "candidates": "4", "top": "2"}
    plain = serve().post(PATH, files=_files(), data=fields, headers=headers).json()
    assert [c["evidence"] for c in plain["candidates"]] == [None] * 4
    assert all(c["verdict"] in ("supported", "weak", "unsupported") for c in plain["candidates"])
    drawn = (
        serve()
        .post(PATH, files=_files(), data={**fields, "evidence": "true"}, headers=headers)
        .json()
    )
    pictures = [c["evidence"] for c in drawn["candidates"]]
    assert [picture is not None for picture in pictures] == [True, True, False, False]
    image = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
    # Candidate and reference side by side, 256 px high.
    assert image.format == "PNG"
    assert image.height == 256
    assert image.width > 512
    best = serve().post(PATH, files=_files(), data={"seed": "6"})
    assert best.headers["x-realfill-verdict"] == plain["candidates"][0]["verdict"]


def test_a_deadline_gives_what_is_finished_and_says_so(capsule: bytes, tmp_path: Path) -> None:
    """Some of sixteen candidates by the deadline, in JSON and as an image; none is 504."""
    base = tiny_base()
    engine = Engine(base, max_samples=1)
    road = road_of(base, tmp_path, engine)
    road.registry.publish(capsule)
    settings = Settings(steps=40, candidates=16, max_samples=16)
    with TestClient(create_app(road, settings)) as client:
        began = time.perf_counter()
        client.post(PATH, files=_files(), data={"candidates": "1"})
        asked = {"deadline_ms": str(round(3000 * (time.perf_counter() - began)))}
        # The calibrated model would refuse what cannot be finished; here it knows nothing.
        engine.cost.calibrate([1], lambda size: 1e-9, lambda: 0.0)
        wanted = {"Accept": "application/json"}
        view = client.post(PATH, files=_files(), data=asked, headers=wanted).json()
        assert view["asked"] == 16
        assert view["partial"] == (len(view["candidates"]) < 16)
        assert 1 <= len(view["candidates"]) <= 16
        late = client.post(PATH, files=_files(), data={"deadline_ms": "1"})
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
