"""The driver against a real service on a fake engine, and against one that misbehaves."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Response

from benchmarks.soak.contents import SIDES_PX, Contents, fill
from benchmarks.soak.driver import Driver, Record
from benchmarks.soak.ledger import AliasLedger
from benchmarks.soak.plan import Ask, Move
from benchmarks.soak.verdict import wrong_digests
from registry import Registry
from service.http import create_app
from service.settings import load_settings
from tests.fakes import SlowEngine, decoded, encoded, hole, photo, road_of
from tests.tiny import tiny_base

TARGET = (encoded(photo()), encoded(hole()))


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()


def drive(
    url: str,
    contents: Contents,
    work: Callable[[Driver], Coroutine[Any, Any, object]],
    timeout_s: float = 20.0,
) -> Record:
    """Run a driver's coroutine against a server."""
    record = Record(AliasLedger(contents.digests))

    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            await work(Driver(client, contents, record, fields={}, timeout_s=timeout_s))

    asyncio.run(run())
    return record


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contents]:
    """A registry with four scenes, of which the first and the last have three versions."""
    folder = tmp_path_factory.mktemp("filled")
    return folder, fill(tiny_base(), folder / "registry", scenes=4, scale=1.0, seed=0)


def test_contents_are_published_as_they_are_told(filled: tuple[Path, Contents]) -> None:
    """The alias points to the last version, and each scene keeps to one picture."""
    folder, contents = filled
    assert contents.versions == {"scene1": 3, "scene2": 1, "scene3": 1, "scene4": 3}
    registry = Registry.open(folder / "registry")
    assert registry.resolve("scene1").digest == contents.digests["scene1"][-1]
    assert registry.resolve("scene1@1").digest == contents.digests["scene1"][0]
    registry.close()
    width, height = SIDES_PX[1]
    assert decoded(contents.targets["scene2"][0]).shape == (height, width, 3)
    assert contents.targets["scene1"] == contents.targets["scene4"]


def test_answers_probes_and_moves_are_kept(filled: tuple[Path, Contents]) -> None:
    """Both kinds of answer and both ways to move an alias, through the real app."""
    folder, contents = filled
    registry = Registry.open(folder / "registry")

    async def work(driver: Driver) -> None:
        await driver.one_by_one([Ask(0, "scene1", 0, 2, 1), Ask(1, "scene1", 1, 1, 1)])
        moves = iter([Move("scene1", 1, over_http=True), Move("scene1", 1, over_http=False)])
        await driver.move(moves, registry, 0.01, 60.0)
        await driver.one_by_one([Ask(2, "scene1", 0, 2, 1, as_image=True)])
        probing = asyncio.create_task(driver.probe(0.1))
        await asyncio.sleep(0.5)
        probing.cancel()
        _, busy = await driver.idle(5.0)
        assert busy is None

    with listening(create_app(road_of(tiny_base(), folder), load_settings())) as url:
        record = drive(url, contents, work)
    registry.close()
    assert [(o.index, o.kind) for o in record.outcomes] == [(k, "answer") for k in range(3)]
    digests = contents.digests["scene1"]
    # From version 3 to 1 to 2.
    assert [o.digest for o in record.outcomes] == [digests[2], digests[2], digests[1]]
    assert wrong_digests(record) == []
    assert (record.moves, record.move_failures, record.probe_failures) == (2, [], [])
    # Seed 1 twice by version 3, then the best of two by version 2.
    assert (len(record.gallery), record.gallery.repeated, record.gallery.far) == (3, 1, [])


def test_a_stale_alias_is_a_wrong_digest(filled: tuple[Path, Contents]) -> None:
    """A server that keeps answering with the version before is caught, after real moves."""
    folder, contents = filled

    async def work(driver: Driver) -> None:
        number = driver.record.ledger.after("scene4", 1)
        driver.record.ledger.begin_move("scene4", number, driver.clock())
        # The alias is not moved, as if the server had not noticed.
        driver.record.ledger.end_move("scene4", driver.clock())
        await driver.one_by_one([Ask(0, "scene4", 0, 1, 1)])

    with listening(create_app(road_of(tiny_base(), folder), load_settings())) as url:
        record = drive(url, contents, work)
    assert [outcome.index for outcome in wrong_digests(record)] == [0]


def test_a_client_that_leaves_is_counted_and_its_work_ends(filled: tuple[Path, Contents]) -> None:
    """The engine would go on for ever; the server is idle soon after."""
    folder, contents = filled
    engine = SlowEngine()

    async def work(driver: Driver) -> None:
        await driver.send(Ask(0, "scene2", 0, 1, 1, cancel_after=1.0))
        _, busy = await driver.idle(10.0)
        assert busy is None

    with listening(create_app(road_of(tiny_base(), folder, engine), load_settings())) as url:
        record = drive(url, contents, work)
    assert [o.kind for o in record.outcomes] == ["cancelled"]
    assert engine.freed.wait(5)


def _misbehaving() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/scenes/{scene}/complete")
    async def complete(scene: str) -> Response:
        if scene == "hung":
            await asyncio.sleep(5)
        if scene == "seedless":
            return Response(TARGET[0], headers={"X-Adapter-Digest": "ab"})
        status = {"busy": 429, "failed": 500, "absent": 404}.get(scene, 200)
        return Response("{}", status_code=status, headers={"Retry-After": "3"})

    return app


def test_every_way_to_fail_has_its_own_outcome() -> None:
    """And a server that is gone breaks the connection."""
    kinds = {
        "busy": "throttled",
        "failed": "server_error",
        "absent": "refused",
        "torn": "malformed",
        "seedless": "malformed",
        "hung": "hung",
    }
    contents = Contents(dict.fromkeys(kinds, ("ab",)), dict.fromkeys(kinds, TARGET))
    asks = [Ask(k, name, 0, 1, 1, as_image=name == "seedless") for k, name in enumerate(kinds)]
    with listening(_misbehaving()) as url:
        record = drive(url, contents, lambda driver: driver.one_by_one(asks), timeout_s=1.0)
    assert {o.scene: o.kind for o in record.outcomes} == kinds
    assert record.outcomes[0].retry_after == "3"
    gone = drive(url, contents, lambda driver: driver.send(asks[0]))
    assert [o.kind for o in gone.outcomes] == ["broken"]


def test_loops_send_until_time_is_up() -> None:
    """The open loop sends what is due; the closed one a request after the other, with pauses."""
    contents = Contents({"absent": ("ab",)}, {"absent": TARGET})

    async def work(driver: Driver) -> None:
        asks = (Ask(k, "absent", 0, 1, 1) for k in itertools.count())
        await driver.arrive(asks, [0.0, 0.05, 0.1])
        assert len(driver.record.sent) == 3
        await driver.work(asks, driver.clock() + 0.3)

    with listening(_misbehaving()) as url:
        record = drive(url, contents, work)
    assert record.sent == list(range(len(record.outcomes)))
    assert record.count("refused") == len(record.sent) > 4
