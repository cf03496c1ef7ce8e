"""Searches, histories and restoring over HTTP, and the page that lists every route."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from realfill.base import Base
from service.http import create_app
from service.road import Road
from service.settings import Settings
from tests.fakes import road_of
from tests.tiny import tiny_capsule


@pytest.fixture(scope="module")
def capsules(base: Base) -> list[bytes]:
    return [tiny_capsule(base, "tower", seed) for seed in range(3)]


@pytest.fixture
def road(base: Base, capsules: list[bytes], tmp_path: Path) -> Road:
    """Tower 1 and 2, of which the second is live, and bridge 1, under the alias next."""
    road = road_of(base, tmp_path)
    registry = road.registry
    registry.publish(capsules[0], by="ada", tags={"site": "north", "kind": "night"})
    registry.publish(capsules[1], by="bob", tags={"site": "north"}, metrics={"psnr": 25})
    registry.publish(capsules[2], scene="bridge", by="bob", alias="next")
    return road


@pytest.fixture
def client(road: Road) -> Iterator[TestClient]:
    with TestClient(create_app(road, Settings())) as client:
        yield client


def _refused(answer: Any, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"code", "message", "request_id"}
    assert answer.json()["error"]["code"] == code
    return str(answer.json()["error"]["message"])


def _found(client: TestClient, query: str) -> list[str]:
    answer = client.get(f"/v1/versions?{query}")
    assert answer.status_code == 200, answer.text
    return [f"{version['scene']}@{version['version']}" for version in answer.json()["versions"]]


@pytest.mark.parametrize(
    ("query", "references"),
    [
        ("", ["bridge@1", "tower@2", "tower@1"]),
        ("scene=tower", ["tower@2", "tower@1"]),
        ("text=BOB", ["bridge@1", "tower@2"]),
        ("tag=site=north", ["tower@2", "tower@1"]),
        ("tag=site=north&tag=kind", ["tower@1"]),
        ("base=tiny&rank=4&limit=1", ["bridge@1"]),
        ("base=nano", []),
        ("rank=3", []),
        ("metric=psnr>=25", ["tower@2"]),
        ("metric=psnr%3E25", []),
        ("metric=psnr>20&metric=psnr<26", ["tower@2"]),
        ("since=1990-01-01", ["bridge@1", "tower@2", "tower@1"]),
        ("until=1990-01-01T00:00:00Z", []),
        ("alias=live", ["tower@2"]),
        ("alias=next&retired=true", ["bridge@1"]),
    ],
)
def test_a_search_finds_what_meets_it(
    client: TestClient, query: str, references: list[str]
) -> None:
    """Each parameter is a condition of the registry's query, newest first."""
    assert _found(client, query) == references


def test_a_moment_parts_the_versions(client: TestClient, road: Road) -> None:
    """From it on, and before it; without a zone it is in UTC."""
    moment = road.registry.resolve("tower").created
    since = moment.isoformat().replace("+00:00", "")
    assert _found(client, f"since={since}") == ["bridge@1", "tower@2"]
    assert _found(client, f"until={since}Z") == ["tower@1"]
    later = (moment + timedelta(hours=3)).isoformat().replace("+00:00", "%2B03:00")
    assert _found(client, f"until={later}") == ["tower@1"]


def test_retired_versions_are_found_when_asked_for(client: TestClient) -> None:
    """And say since when; restored, they are found without asking."""
    path = "/v1/scenes/tower/versions/1"
    assert client.delete(path).json()["retired"] is not None
    assert _found(client, "tag=kind") == []
    assert _found(client, "tag=kind&retired=true") == ["tower@1"]
    assert client.post(f"{path}/restore").json()["retired"] is None
    assert _found(client, "tag=kind") == ["tower@1"]


def test_a_version_without_bytes_is_not_restored(client: TestClient, road: Road) -> None:
    """409 with the remedy."""
    client.delete("/v1/scenes/tower/versions/1")
    road.registry.sweep(grace=timedelta(0))
    answer = client.post("/v1/scenes/tower/versions/1/restore")
    assert "Publish the same capsule again" in _refused(answer, 409, "conflict")
    _refused(client.post("/v1/scenes/tower/versions/9/restore"), 404, "not_found")


def test_found_versions_show_what_was_said_and_measured(client: TestClient) -> None:
    """What can be searched by can be seen."""
    [found] = client.get("/v1/versions?tag=kind").json()["versions"]
    assert found["tags"] == {"kind": "night", "site": "north"}
    assert (found["parent"], found["retired"], found["aliases"]) == (None, None, [])
    [measured] = client.get("/v1/versions?alias=live").json()["versions"]
    assert measured["metrics"]["psnr"] == 25


def test_pages_meet_and_the_last_says_so(client: TestClient, road: Road, base: Base) -> None:
    """A version published meanwhile neither repeats one nor hides one."""
    page = client.get("/v1/versions?limit=2").json()
    road.registry.publish(tiny_capsule(base, "mill", 9))
    rest = client.get("/v1/versions", params={"limit": 2, "after": page["after"]}).json()
    numbers = [(v["scene"], v["version"]) for v in page["versions"] + rest["versions"]]
    assert numbers == [("bridge", 1), ("tower", 2), ("tower", 1)]
    assert rest["after"] is None


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("tags=site", "'query.tags' is unknown"),
        ("tag=Site", "The label 'Site' is not allowed"),
        ("tag=site=north&tag=site=south", "each key may be given once"),
        ("rank=0", "'query.rank' is '0'"),
        ("rank=99999999999999999999", "'query.rank' is"),
        ("metric=psnr", "write it like psnr>=20"),
        ("since=yesterday", "'query.since' is 'yesterday'"),
        ("since=0001-01-01T00:00:00%2B05:00", "its year should be 1970 to 9998"),
        ("alias=Live", "The alias 'Live' is not allowed"),
        ("scene=../x", "The scene name '../x' is not allowed"),
        ("text=a%00b", "the character NUL"),
        ("retired=perhaps", "'query.retired' is 'perhaps'"),
        ("limit=0", "'query.limit' is '0'"),
        ("limit=1001", "'query.limit' is '1001'"),
        ("after=1-2", "pass the text that the page before it gave"),
    ],
)
def test_a_search_that_cannot_be_read_is_refused(
    client: TestClient, query: str, sentence: str
) -> None:
    """400 with the parameter and the remedy, rather than an answer to another question."""
    assert sentence in _refused(client.get(f"/v1/versions?{query}"), 400, "invalid_query")


def test_an_unknown_parameter_is_refused_by_every_route(
    client: TestClient, road: Road, capsules: list[bytes]
) -> None:
    """`alais=candidate` moves nothing, rather than live."""
    before = road.registry.search()
    bodies: dict[str, dict[str, Any]] = {
        "put": {"json": {"version": 1}},
        "post": {"content": capsules[0], "headers": {"Content-Type": "application/octet-stream"}},
    }
    paths = client.get("/openapi.json").json()["paths"]
    paths = {path: methods for path, methods in paths.items() if path.startswith("/v1/")}
    # Its fields are in a form, which is looked at first.
    del paths["/v1/scenes/{scene}/complete"]
    for path, methods in paths.items():
        filled = path.format(scene="tower", number=1, alias="live")
        for method in methods:
            answer = client.request(method, f"{filled}?alais=next", **bodies.get(method, {}))
            assert "'query.alais' is unknown" in _refused(answer, 400, "invalid_query")
    assert len(paths) == 10
    assert road.registry.search() == before


@pytest.mark.parametrize("before", ["0", "-5", "1000000000", "9" * 23, "9" * 6000])
def test_a_page_of_versions_begins_below_a_number_that_there_can_be(
    client: TestClient, before: str
) -> None:
    """Neither everything, nor nothing, nor 500."""
    answer = client.get(f"/v1/scenes/tower/versions?before={before}")
    assert "'query.before' is" in _refused(answer, 400, "invalid_query")


def test_a_history_tells_every_move(client: TestClient) -> None:
    """From, to, how and by whom, oldest first; of all aliases or of one."""
    client.post("/v1/scenes/tower/rollback")
    client.put("/v1/scenes/tower/aliases/next", json={"version": 2})
    moves = client.get("/v1/scenes/tower/history").json()["moves"]
    steps = [
        (move["alias"], move["previous"], move["version"], move["action"], move["moved_by"])
        for move in moves
    ]
    assert steps == [
        ("live", None, 1, "publish", "ada"),
        ("live", 1, 2, "publish", "bob"),
        ("live", 2, 1, "rollback", "http"),
        ("next", None, 2, "alias", "http"),
    ]
    assert client.get("/v1/scenes/tower/history?alias=next").json()["moves"] == moves[3:]


def test_a_history_that_cannot_be_read_is_refused(client: TestClient) -> None:
    """A parameter that is unknown or no alias, and a scene that is not there."""
    path = "/v1/scenes/tower/history"
    assert "'query.aliaz'" in _refused(client.get(f"{path}?aliaz=live"), 400, "invalid_query")
    assert "'Live'" in _refused(client.get(f"{path}?alias=Live"), 400, "invalid_query")
    _refused(client.get("/v1/scenes/mill/history"), 404, "not_found")


def test_docs_list_every_route(client: TestClient, root: Path) -> None:
    """docs/registry.md names each route below /v1, and none that is not there."""
    paths = client.get("/openapi.json").json()["paths"]
    routes = {
        f"{method.upper()} {path}"
        for path, methods in paths.items()
        if path.startswith("/v1/")
        for method in methods
    }
    text = (root / "docs" / "registry.md").read_text()
    assert set(re.findall(r"^\| `([A-Z]+ /v1/\S+)` \|", text, re.MULTILINE)) == routes
