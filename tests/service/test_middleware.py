"""The layers around the routes: ids, the last net, the body's limit, the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.metrics import Metrics
from service.middleware import JsonLines, LimitBody, RecordRequests


async def _echo_length(scope: Scope, receive: Receive, send: Send) -> None:
    received, more = 0, True
    while more:
        message = await receive()
        received += len(message.get("body", b""))
        more = message.get("more_body", False)
    await PlainTextResponse(str(received))(scope, receive, send)


async def _stubborn(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers 400 whatever happens to its body, as form parsers do."""
    try:
        await _echo_length(scope, receive, send)
    except Exception:  # noqa: BLE001 - that is the point
        await PlainTextResponse("bad form", 400)(scope, receive, send)


async def _raise(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("a secret")


def _client(app: ASGIApp, metrics: Metrics | None = None) -> TestClient:
    return TestClient(RecordRequests(LimitBody(app, 10), metrics or Metrics()))


def test_a_request_id_is_echoed_where_it_is_harmless() -> None:
    """A caller can find its request in the log; it cannot write into it."""
    client = _client(_echo_length)
    assert client.get("/", headers={"X-Request-Id": "a.B-9"}).headers["x-request-id"] == "a.B-9"
    made = client.get("/", headers={"X-Request-Id": 'x" y'}).headers["x-request-id"]
    assert len(made) == 32


def test_an_exception_is_answered_and_goes_no_further() -> None:
    """Above lies a layer that would wait for an answer for ever."""
    answer = _client(_raise).get("/")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


def test_a_body_at_the_limit_passes() -> None:
    """Ten bytes of ten."""
    assert _client(_echo_length).post("/", content=b"0" * 10).text == "10"


@pytest.mark.parametrize("app", [_echo_length, _stubborn])
def test_a_body_above_the_limit_is_413_whatever_the_app_makes_of_it(app: ASGIApp) -> None:
    """Also where the app answers first, and where no length was declared."""

    def chunks() -> Iterator[bytes]:
        yield from [b"0" * 6] * 3

    client = _client(app)
    for content in (b"0" * 11, chunks()):
        answer = client.post("/", content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        assert "10 bytes" in answer.json()["error"]["message"]


def test_a_route_that_does_not_exist_adds_no_series() -> None:
    """A scanner's paths do not fill the memory of the metrics."""
    metrics = Metrics()
    client = _client(_echo_length, metrics)
    for k in range(3):
        client.get(f"/scan/{k}")
    text = metrics.exposition().decode()
    assert 'realfill_requests_total{method="GET",route="unmatched",status="200"} 3.0' in text
    assert "scan" not in text


def test_a_log_line_is_one_json_object() -> None:
    """With the fields beside the event."""
    record = logging.LogRecord("service.requests", logging.INFO, "", 0, "request", (), None)
    record.fields = {"status": 200, "route": "/livez"}
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["event"] == "request"
    assert json.loads(line)["status"] == 200
