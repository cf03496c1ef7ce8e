"""The client, against the real app in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from service.client import Client, image_of
from service.errors import RequestRefused, ServiceUnreachable
from service.http import create_app
from service.settings import Settings
from tests.fakes import decoded, encoded, hole, photo, road_of
from tests.tiny import tiny_base, tiny_capsule


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    road = road_of(tiny_base(), tmp_path)
    with TestClient(create_app(road, Settings(seamless=False))) as app:

        def forward(request: httpx.Request) -> httpx.Response:
            answer = app.request(
                request.method,
                str(request.url.copy_with(host="testserver")),
                content=request.read(),
                headers=dict(request.headers),
            )
            return httpx.Response(answer.status_code, content=answer.content)

        with Client(transport=httpx.MockTransport(forward)) as client:
            yield client


def test_the_client_goes_the_whole_way(client: Client, tmp_path: Path) -> None:
    """Publish, list, move an alias, complete."""
    base = tiny_base()
    for seed in range(2):
        client.publish("tower", tiny_capsule(base, "tower", seed))
    assert client.ready()
    assert [scene.name for scene in client.scenes()] == ["tower"]
    assert [version.version for version in client.versions("tower")] == [2, 1]
    assert client.set_alias("tower", "live", 1, expect=2).version == 1
    assert client.scene("tower").aliases == {"live": 1}
    (tmp_path / "image.png").write_bytes(encoded(photo()))
    answer = client.complete(
        "tower", tmp_path / "image.png", encoded(hole()), seed=8, candidates=2, top=1, steps=None
    )
    assert [candidate.seed for candidate in answer.candidates] == [9, 8]
    assert np.all(decoded(image_of(answer.candidates[0].image))[hole() > 0] == 225)
    with pytest.raises(ValueError, match="larger top"):
        image_of(answer.candidates[1].image)


def test_a_refusal_carries_the_services_sentence(client: Client) -> None:
    """With its status, its code and the id to look for."""
    with pytest.raises(RequestRefused, match="bridge") as caught:
        client.complete("bridge", encoded(photo()), encoded(hole()))
    assert (caught.value.status, caught.value.refusal) == (404, "not_found")
    assert len(caught.value.request_id) == 32


def test_no_service_is_said_so() -> None:
    """With the remedy."""

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused")

    with Client(transport=httpx.MockTransport(refuse)) as client:
        assert not client.ready()
        with pytest.raises(ServiceUnreachable, match="start it with `realfill serve`"):
            client.scenes()


def test_another_service_is_recognised() -> None:
    """A proxy's own error page has another shape."""
    transport = httpx.MockTransport(lambda request: httpx.Response(502, text="Bad Gateway"))
    with Client(transport=transport) as client, pytest.raises(ServiceUnreachable, match="502"):
        client.scenes()
