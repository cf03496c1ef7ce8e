"""Completions over HTTP while the registry is slow."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.completions import WORKERS
from service.http import create_app
from service.settings import Settings
from tests.fakes import encoded, hole, photo, road_of
from tests.tiny import tiny_base, tiny_capsule

FILES = {"image": ("image.png", encoded(photo())), "mask": ("mask.png", encoded(hole()))}


def test_scenes_that_are_slow_to_come_hold_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more of them on their way than there are threads that compute, another is answered."""
    base, go = tiny_base(), threading.Event()
    road = road_of(base, tmp_path)
    registry = road.registry
    registry.publish(tiny_capsule(base, "tower", seed=9))
    slow = {
        registry.publish(tiny_capsule(base, f"slow-{k}", seed=k)).digest for k in range(WORKERS + 2)
    }
    fetch, asked = registry.fetch, threading.Semaphore(0)

    def fetch_slowly(reference: str) -> bytes:
        if reference.removeprefix("sha256:") in slow:
            asked.release()
            assert go.wait(30)
        return bytes(fetch(reference))

    monkeypatch.setattr(registry, "fetch", fetch_slowly)
    app = create_app(road, Settings(seamless=False, request_timeout_s=30))
    with TestClient(app) as client, ThreadPoolExecutor(len(slow)) as callers:
        late = [
            callers.submit(client.post, f"/v1/scenes/slow-{k}/complete", files=FILES)
            for k in range(len(slow))
        ]
        try:
            for _ in slow:
                assert asked.acquire(timeout=20)
            assert client.post("/v1/scenes/tower/complete", files=FILES).status_code == 200
            assert not any(answer.done() for answer in late)
        finally:
            go.set()
        assert [answer.result(30).status_code for answer in late] == [200] * len(slow)


def test_the_registry_is_asked_while_images_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no image is refused at once, however long the registry takes."""
    base, go = tiny_base(), threading.Event()
    road = road_of(base, tmp_path)
    road.registry.publish(tiny_capsule(base, "tower", seed=9))
    resolve, asked = road.resolver.resolve, threading.Event()

    def resolve_slowly(reference: str) -> object:
        asked.set()
        assert go.wait(30)
        return resolve(reference)

    monkeypatch.setattr(road.resolver, "resolve", resolve_slowly)
    broken = {**FILES, "image": ("image.png", b"no image")}
    app = create_app(road, Settings(seamless=False, request_timeout_s=20))
    with TestClient(app) as client:
        try:
            answer = client.post("/v1/scenes/tower/complete", files=broken)
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_scene")
            assert asked.wait(5)
        finally:
            go.set()
        assert client.post("/v1/scenes/tower/complete", files=FILES).status_code == 200
