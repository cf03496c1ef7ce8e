"""The client, against the real app in this process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from registry import Query
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
            return httpx.Response(
                answer.status_code, headers=dict(answer.headers), content=answer.content
            )

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


def test_the_client_reaches_every_route_of_the_registry(client: Client) -> None:
    """Search by page, look at one, download, roll back, retire, restore, and the history of it."""
    base = tiny_base()
    capsules = [tiny_capsule(base, "tower", seed) for seed in range(3)]
    for capsule in capsules:
        client.publish("tower", capsule)
    page = client.search(Query(scene="tower", base="tiny"), limit=2)
    assert [version.version for version in page.versions] == [3, 2]
    rest = client.search(Query(scene="tower", base="tiny"), after=page.after, limit=2)
    assert ([version.version for version in rest.versions], rest.after) == ([1], None)
    assert client.version("tower", 2) == page.versions[1]
    assert client.download("tower", 2) == capsules[1]
    assert client.alias("tower").version == 3
    with pytest.raises(RequestRefused, match="expected version 2") as caught:
        client.rollback("tower", expect=2)
    assert (caught.value.status, caught.value.refusal) == (412, "precondition_failed")
    assert client.rollback("tower", expect=3).version == 2
    assert client.retire("tower", 3).retired is not None
    assert client.search(Query(retired=True)).versions[0].version == 3
    assert client.restore("tower", 3).retired is None
    moves = [(move.previous, move.version, move.action) for move in client.history("tower", "live")]
    assert moves == [
        (None, 1, "publish"),
        (1, 2, "publish"),
        (2, 3, "publish"),
        (3, 2, "rollback"),
    ]
    assert client.history("tower", "candidate") == []


@pytest.mark.parametrize("headers", [{"ETag": f'"sha256:{"0" * 64}"'}, {}])
def test_a_download_that_was_altered_on_the_way_is_refused(headers: dict[str, str]) -> None:
    """The bytes are held against the digest in the ETag."""

    def send(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers=headers, content=b"capsule")

    with (
        Client(transport=httpx.MockTransport(send)) as client,
        pytest.raises(ServiceUnreachable, match="tower@1 arrived with the digest"),
    ):
        client.download("tower", 1)


def test_a_refusal_carries_the_services_sentence(client: Client) -> None:
    """With its status, its code and the id to look for."""
    with pytest.raises(RequestRefused, match="bridge") as caught:
        client.complete("bridge", encoded(photo()), encoded(hole()))
    assert (caught.value.status, caught.value.refusal) == (404, "not_found")
    assert len(caught.value.request_id) == 32


def test_names_go_into_the_path_whole(client: Client) -> None:
    """Neither a # nor a slash leads to another scene, and what is no name is refused as such."""
    client.publish("tower", tiny_capsule(tiny_base(), "tower", 1))
    pictures = encoded(photo()), encoded(hole())
    assert client.complete("tower@1", *pictures).version == 1
    assert client.complete(f"sha256:{client.version('tower', 1).digest}", *pictures).version == 1
    for scene in ("tower#x", "tower?x", "tower\n", "töwer", "tower\udcff"):
        with pytest.raises(RequestRefused) as caught:
            client.complete(scene, *pictures)
        assert caught.value.refusal == "invalid_reference"
    for call in (client.scene, client.versions, client.history, client.alias):
        with pytest.raises(RequestRefused, match="There is no route"):
            call("../scenes/tower")


@pytest.fixture
def silent() -> Iterator[str]:
    """Where somebody listens who never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_an_answer_that_takes_too_long_is_told_from_none(silent: str) -> None:
    """The service is there: starting another would not help."""
    with (
        Client(silent, timeout_s=0.1) as client,
        pytest.raises(ServiceUnreachable, match=r"gave no answer within 0\.1 s: wait longer"),
    ):
        client.scenes()


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5h://127.0.0.1:1"])
def test_this_machine_is_asked_without_proxies(
    silent: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cannot reach it: what is asked arrives at the port itself."""
    for name in ("ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy)
    with (
        Client(silent, timeout_s=0.1) as client,
        pytest.raises(ServiceUnreachable, match="gave no answer within"),
    ):
        client.scenes()


@pytest.mark.parametrize("url", ["http://[::1", "http://example.org:port"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    """In one sentence, as a proxy that cannot be used."""
    with pytest.raises(ServiceUnreachable, match="check the address and the proxies"):
        Client(url)


def test_a_proxy_that_cannot_be_used_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """SOCKS, for which there is no package here."""
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1")
    with pytest.raises(ServiceUnreachable, match="check the address and the proxies"):
        Client("http://example.org")


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


@pytest.mark.parametrize("call", [Client.scenes, Client.search])
def test_another_services_success_is_recognised(call: Callable[[Client], object]) -> None:
    """A page for people, where JSON of ours was asked for."""
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="<html></html>"))
    with (
        Client(transport=transport) as client,
        pytest.raises(ServiceUnreachable, match="answered 200 in another shape"),
    ):
        call(client)
