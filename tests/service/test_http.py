"""The catalogue, publishing, aliases, probes, and the one error shape of everything else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from realfill.base import Base
from realfill.capsule import read_capsule
from service.http import create_app
from service.road import Road
from service.settings import Settings
from tests.fakes import road_of
from tests.tiny import tiny_base, tiny_capsule

CAPSULE = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def capsules(base: Base) -> list[bytes]:
    return [tiny_capsule(base, "tower", seed) for seed in range(2)]


@pytest.fixture
def road(base: Base, tmp_path: Path) -> Road:
    return road_of(base, tmp_path)


@pytest.fixture
def client(road: Road) -> Iterator[TestClient]:
    with TestClient(create_app(road, Settings())) as client:
        yield client


def _refused(answer: Any, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"code", "message", "request_id"}
    assert answer.json()["error"]["code"] == code
    return str(answer.json()["error"]["message"])


def _publish(client: TestClient, capsule: bytes, query: str = "") -> Any:
    return client.post(f"/v1/scenes/tower/versions{query}", content=capsule, headers=CAPSULE)


def test_a_published_capsule_is_listed(client: TestClient, capsules: list[bytes]) -> None:
    """Version 1 of its scene, and the alias live points to it."""
    answer = _publish(client, capsules[0])
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == "/v1/scenes/tower/versions/1"
    assert (answer.json()["version"], answer.json()["aliases"]) == (1, ["live"])
    assert client.get("/v1/scenes").json()["scenes"][0]["name"] == "tower"
    assert client.get("/v1/scenes/tower").json()["aliases"] == {"live": 1}


def test_versions_come_newest_first_and_in_pages(client: TestClient, capsules: list[bytes]) -> None:
    """`before` turns the page."""
    for capsule in capsules:
        _publish(client, capsule)
    path = "/v1/scenes/tower/versions"
    assert [v["version"] for v in client.get(path).json()["versions"]] == [2, 1]
    page = client.get(path, params={"before": 2, "limit": 1}).json()["versions"]
    assert [v["version"] for v in page] == [1]


def test_an_alias_of_choice_leaves_live_alone(client: TestClient, capsules: list[bytes]) -> None:
    """A candidate version can be looked at before it goes live."""
    _publish(client, capsules[0])
    _publish(client, capsules[1], "?alias=candidate")
    assert client.get("/v1/scenes/tower").json()["aliases"] == {"candidate": 2, "live": 1}


def test_an_alias_moves_only_from_where_it_was_expected(
    client: TestClient, capsules: list[bytes]
) -> None:
    """Two operators cannot undo each other unawares."""
    for capsule in capsules:
        _publish(client, capsule)
    path = "/v1/scenes/tower/aliases/live"
    moved = client.put(path, json={"version": 1}, headers={"If-Match": '"2"'})
    assert moved.json() == {"scene": "tower", "alias": "live", "version": 1}
    assert moved.headers["etag"] == '"1"'
    late = client.put(path, json={"version": 2}, headers={"If-Match": '"2"'})
    _refused(late, 412, "precondition_failed")
    assert client.put(path, json={"version": 2}).status_code == 200


def test_a_protected_alias_is_told_from_one_that_moved(
    client: TestClient, road: Road, capsules: list[bytes]
) -> None:
    """409 with a code of its own, whichever way it would move and whatever If-Match says."""
    _publish(client, capsules[0])
    _publish(client, capsules[1], "?alias=candidate")
    road.registry.protect("tower")
    path = "/v1/scenes/tower/aliases/live"
    for headers in ({}, {"If-Match": '"1"'}, {"If-Match": '"2"'}):
        _refused(client.put(path, json={"version": 2}, headers=headers), 409, "protected")
    _refused(_publish(client, capsules[1]), 409, "protected")
    assert client.get("/v1/scenes/tower").json()["aliases"] == {"candidate": 2, "live": 1}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"version": "one"}, "'body.version' is 'one'"),
        ({"version": 0}, "'body.version' is 0"),
        ({}, "'body.version' is {}: field required"),
        ({"version": 1, "force": True}, "'body.force' is unknown"),
    ],
)
def test_a_bad_alias_body_is_refused(client: TestClient, body: Any, sentence: str) -> None:
    """FastAPI's own validation, in our shape."""
    answer = client.put("/v1/scenes/tower/aliases/live", json=body)
    assert sentence in _refused(answer, 422, "invalid_request")


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", ""])
def test_json_of_another_declared_type_is_refused(client: TestClient, kind: str) -> None:
    """As curl sends it unless told otherwise: 415 with the header that is wanted."""
    answer = client.put(
        "/v1/scenes/tower/aliases/live", content=b'{"version": 1}', headers={"Content-Type": kind}
    )
    assert "'Content-Type: application/json'" in _refused(answer, 415, "unsupported_media")


def test_an_alias_to_an_unknown_version_is_not_found(
    client: TestClient, capsules: list[bytes]
) -> None:
    """404 from the registry."""
    _publish(client, capsules[0])
    answer = client.put("/v1/scenes/tower/aliases/live", json={"version": 7})
    _refused(answer, 404, "not_found")


def test_a_capsule_for_another_base_is_refused(client: TestClient, road: Road) -> None:
    """409, and nothing is published."""
    answer = _publish(client, tiny_capsule(tiny_base(seed=1), "tower"))
    _refused(answer, 409, "adapter_mismatch")
    assert road.registry.scenes() == []


def test_a_capsule_with_nan_is_refused(
    client: TestClient, road: Road, base: Base, capsules: list[bytes]
) -> None:
    """422, and nothing is published."""
    sound = read_capsule(capsules[0], base)
    factor = next(iter(sound.adapter.factors.values()))[1]
    pattern = factor.flatten()[:8].numpy().tobytes()
    position = capsules[0].index(pattern)
    nan = torch.full((8,), float("nan"), dtype=factor.dtype).numpy().tobytes()
    tampered = capsules[0][:position] + nan + capsules[0][position + len(nan) :]
    _refused(_publish(client, tampered), 422, "invalid_capsule")
    assert road.registry.scenes() == []


def test_a_capsule_with_a_flipped_byte_is_refused(
    client: TestClient, road: Road, capsules: list[bytes]
) -> None:
    """The capsule knows the digest of its own tensors."""
    tampered = bytearray(capsules[0])
    tampered[-5] ^= 1
    _refused(_publish(client, bytes(tampered)), 422, "invalid_capsule")
    assert road.registry.scenes() == []


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04pickle" * 50])
def test_bytes_that_are_no_capsule_are_refused(client: TestClient, content: bytes) -> None:
    """Nor is anything unpickled."""
    _refused(_publish(client, content), 422, "invalid_capsule")


def test_a_form_for_a_capsule_is_refused(client: TestClient) -> None:
    """415, with the way to send it."""
    answer = client.post("/v1/scenes/tower/versions", files={"capsule": b"x"})
    assert "--data-binary" in _refused(answer, 415, "unsupported_media")


@pytest.mark.parametrize("path", ["/v1/scenes/bridge", "/v1/scenes/bridge/versions"])
def test_an_unknown_scene_is_not_found(client: TestClient, path: str) -> None:
    """404 with the registry's sentence."""
    assert "bridge" in _refused(client.get(path), 404, "not_found")


def test_an_unknown_route_is_404_in_our_shape(client: TestClient) -> None:
    """It is told apart from an unknown scene by its code."""
    _refused(client.get("/v2/scenes"), 404, "route_not_found")


def test_a_wrong_method_is_405_in_our_shape(client: TestClient) -> None:
    """With the header Allow, as HTTP wants it."""
    answer = client.delete("/v1/scenes")
    _refused(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"


@pytest.mark.parametrize("limit", ["0", "1001", "ten"])
def test_a_bad_page_is_refused(client: TestClient, limit: str) -> None:
    """Pages have 1 to 1000 rows."""
    answer = client.get("/v1/scenes", params={"limit": limit})
    assert "limit" in _refused(answer, 400, "invalid_query")


def test_probes_tell_life_from_readiness(road: Road) -> None:
    """Before the lane runs, and after it has ended, the service is alive and not ready."""
    client = TestClient(create_app(road, Settings()))
    assert client.get("/livez").status_code == 200
    _refused(client.get("/readyz"), 503, "engine_closed")
    with client:
        assert client.get("/readyz").json() == {"status": "ready"}
        assert client.head("/readyz").status_code == 200
    _refused(client.get("/readyz"), 503, "engine_closed")


def test_probes_tell_that_the_lane_has_failed(road: Road) -> None:
    """Only a new process mends it, so it counts as dead and not just as busy."""
    client = TestClient(create_app(road, Settings()))
    with client:
        road.engine.failure = RuntimeError("device lost")
        for probe in ("/livez", "/readyz"):
            _refused(client.get(probe), 503, "engine_closed")


def test_metrics_are_labelled_by_route_template(client: TestClient) -> None:
    """A scene's name is no label."""
    client.get("/v1/scenes/bridge")
    text = client.get("/metrics").text
    assert (
        'realfill_requests_total{method="GET",route="/v1/scenes/{scene}",status="404"} 1.0' in text
    )
    assert "bridge" not in text
    assert "realfill_lane_jobs 0.0" in text


def test_openapi_describes_the_form_and_the_error(client: TestClient) -> None:
    """A generated client sees the fields, the image types and the one error shape."""
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/v1/scenes/{scene}/complete"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["image", "mask"]
    assert {"image", "mask", "seed", "steps", "sampler"} <= set(form["properties"])
    assert {"image/png", "application/json"} <= set(operation["responses"]["200"]["content"])
    assert operation["responses"]["4XX"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/ErrorView"
    }


def test_a_version_and_its_file_have_the_digest_as_etag(
    client: TestClient, capsules: list[bytes]
) -> None:
    """What is known need not be sent again."""
    digest = _publish(client, capsules[0]).json()["digest"]
    path = "/v1/scenes/tower/versions/1"
    seen = client.get(path)
    assert (seen.json()["digest"], seen.headers["etag"]) == (digest, f'"sha256:{digest}"')
    file = client.get(f"{path}/file")
    assert file.content == capsules[0]
    assert file.headers["content-disposition"] == 'attachment; filename="tower-1.safetensors"'
    again = client.get(f"{path}/file", headers={"If-None-Match": f'"x", {file.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    _refused(client.get("/v1/scenes/tower/versions/7"), 404, "not_found")
    _refused(client.get("/v1/scenes/tower/versions/one/file"), 422, "invalid_request")


def test_rollback_goes_back_from_where_it_was_expected(
    client: TestClient, capsules: list[bytes]
) -> None:
    """The alias's ETag is asked for, and given back with If-Match."""
    for capsule in capsules:
        _publish(client, capsule)
    etag = client.get("/v1/scenes/tower/aliases/live").headers["etag"]
    assert etag == '"2"'
    path = "/v1/scenes/tower/rollback"
    _refused(client.post(path, headers={"If-Match": '"1"'}), 412, "precondition_failed")
    back = client.post(path, headers={"If-Match": etag})
    assert (back.json()["version"], back.headers["etag"]) == (1, '"1"')
    _refused(client.post(path), 404, "not_found")


def test_rollbacks_at_once_go_back_once(client: TestClient, base: Base) -> None:
    """Four operators with the same If-Match: one is answered, three are told that they are late."""
    for seed in range(5):
        _publish(client, tiny_capsule(base, "tower", seed))

    def roll_back(_: int) -> int:
        path = "/v1/scenes/tower/rollback"
        return int(client.post(path, headers={"If-Match": '"5"'}).status_code)

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(roll_back, range(4))) == [200, 412, 412, 412]
    assert client.get("/v1/scenes/tower").json()["aliases"] == {"live": 4}


def test_a_version_is_retired_when_no_alias_points_to_it(
    client: TestClient, capsules: list[bytes]
) -> None:
    """409 before, and hidden after."""
    for capsule in capsules:
        _publish(client, capsule)
    _refused(client.delete("/v1/scenes/tower/versions/2"), 409, "conflict")
    assert client.delete("/v1/scenes/tower/versions/1").json()["version"] == 1
    _refused(client.get("/v1/scenes/tower/versions/1"), 404, "not_found")
    assert [v["version"] for v in client.get("/v1/scenes/tower/versions").json()["versions"]] == [2]
