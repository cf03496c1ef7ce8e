"""Webhooks, sent to a real HTTP server in a thread: signatures, failures, duplicates."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from registry import InvalidReference, Registry, SignatureRefused
from registry.deliveries import MAX_ATTEMPTS, EndpointState, claim, forget, send_again, states
from registry.errors import NotFound
from registry.events import read_events
from registry.webhooks import Courier, retry_s, sign, verify
from tests.registry.capsules import capsule

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes ...").decode()
OLD_SECRET = "whsec_" + base64.b64encode(b"the one that was there before ..").decode()


@dataclass
class Receiver:
    """A server that keeps what it was sent, and answers as it is told to.

    Attributes:
        statuses: Answers to come; then 204. None hangs up without one.
    """

    url: str
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    statuses: list[int | None] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        """The ids of what came, in order."""
        return [headers["webhook-id"] for headers, _ in self.got]


def handler_of(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    """A handler that writes into the receiver."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
            status = receiver.statuses.pop(0) if receiver.statuses else 204
            if status is None:
                self.close_connection = True
                return
            self.send_response(status)
            if status == 302:
                self.send_header("location", receiver.url)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return Handler


@pytest.fixture
def servers() -> Iterator[Callable[[], Receiver]]:
    """Starts receivers."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start() -> Receiver:
        receiver = Receiver("")
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(receiver))
        receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        running.append((server, thread))
        return receiver

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


class Clock:
    """A time that goes on only when it is told to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 5, 4, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def full(registry: Registry) -> Registry:
    """A registry in which two things happened."""
    registry.publish(capsule(), by="ada")
    return registry


def courier(registry: Registry, clock: Clock, *receivers: Receiver) -> Courier:
    """A courier whose pauses are known, and whose receivers want all that ever happened."""
    urls = [receiver.url for receiver in receivers]
    return Courier(registry, urls, [SECRET], from_start=True, clock=clock, jitter=lambda: 0.0)


def counts(registry: Registry) -> list[tuple[int, int, int]]:
    """Delivered, waiting and given up at each endpoint."""
    return [(one.delivered, one.waiting, one.given_up) for one in states(registry.database)]


def test_events_arrive_signed(full: Registry, clock: Clock, servers: Any) -> None:
    """In order, once, with a body that says what happened and headers that prove it."""
    receiver = servers()
    carrier = courier(full, clock, receiver)
    assert [delivery.failure for delivery in carrier.round()] == [None, None]
    assert carrier.round() == []
    bodies = [json.loads(body) for _, body in receiver.got]
    assert [body["type"] for body in bodies] == ["version.published", "alias.moved"]
    assert bodies[0]["data"] | {"at": ""} == {
        "at": "",
        "by": "ada",
        "digest": full.resolve("tower").digest,
        "number": 1,
        "scene": "tower",
    }
    for headers, body in receiver.got:
        assert headers["content-type"] == "application/json"
        verify(headers, body, SECRET, now=clock.now)
    assert counts(full) == [(2, 0, 0)]
    carrier.close()


def test_a_known_signature() -> None:
    """The example of the Standard Webhooks specification's reference libraries."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    signature = sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', [secret])
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_forged_and_stale_webhooks_are_refused() -> None:
    """Another body, id, secret or time; and signatures while a secret is being replaced."""
    now = datetime(2026, 5, 4, 12, tzinfo=UTC)
    at = int(now.timestamp())
    headers = {
        "webhook-id": "evt_1",
        "webhook-timestamp": str(at),
        "webhook-signature": sign("evt_1", at, b"{}", [OLD_SECRET, SECRET]),
    }
    verify(headers, b"{}", SECRET, now=now)
    verify(headers, b"{}", OLD_SECRET, now=now)
    other = "whsec_" + base64.b64encode(bytes(32)).decode()
    for changed, body, secret in (
        (headers, b"{ }", SECRET),
        (headers | {"webhook-id": "evt_2"}, b"{}", SECRET),
        (headers | {"webhook-timestamp": str(at + 1)}, b"{}", SECRET),
        (headers | {"webhook-signature": "v1,\xe9"}, b"{}", SECRET),
        (headers, b"{}", other),
        ({}, b"{}", SECRET),
    ):
        with pytest.raises(SignatureRefused):
            verify(changed, body, secret, now=now)
    with pytest.raises(SignatureRefused, match="301 s off"):
        verify(headers, b"{}", SECRET, now=now + timedelta(seconds=301))


def test_a_refused_event_is_sent_again(full: Registry, clock: Clock, servers: Any) -> None:
    """After 5, 10, 20 seconds; the same id and bytes each time, and a new signature."""
    receiver = servers()
    receiver.statuses = [500, 204, None, 302, 204]
    carrier = courier(full, clock, receiver)
    first, second = carrier.round()
    assert first.failure == "answered 500"
    assert second.failure is None
    for pause, failure in ((5, "RemoteProtocolError"), (10, "answered 302"), (20, None)):
        assert carrier.round() == []
        clock.advance(pause)
        (delivery,) = carrier.round()
        assert (failure or "") in (delivery.failure or "")
        assert (delivery.due is None) == (failure is None)
    retried = [got for got in receiver.got if got[0]["webhook-id"] == first.event.message_id]
    assert len({body for _, body in retried}) == 1
    assert len({headers["webhook-signature"] for headers, _ in retried}) == len(retried) == 4
    assert (delivery.event, delivery.attempts) == (first.event, 4)
    assert states(full.database) == [EndpointState(receiver.url, 2, 0, 0, None)]


def test_an_unreachable_endpoint_is_an_attempt(full: Registry, clock: Clock) -> None:
    """Nobody listens: the event waits, and its row says why, without the address's secrets."""
    nobody = Receiver("http://user:password@127.0.0.1:9/hook?token=x")
    (delivery, _) = courier(full, clock, nobody).round()
    assert delivery.failure == "ConnectError: [Errno 111] Connection refused"
    assert delivery.endpoint == "http://127.0.0.1:9/hook"
    assert states(full.database) == [
        EndpointState("http://127.0.0.1:9/hook", 0, 2, 0, delivery.failure)
    ]


def test_one_that_took_an_event_is_not_asked_again(
    full: Registry, clock: Clock, servers: Any
) -> None:
    """While the other endpoint refuses, and also by a courier that knows only the rows."""
    good, bad = servers(), servers()
    bad.statuses = [503] * 4
    courier(full, clock, good, bad).round()
    clock.advance(5)
    courier(full, clock, good, bad).round()
    assert (len(good.ids), len(bad.ids)) == (2, 4)
    assert sorted(counts(full)) == [(0, 2, 0), (2, 0, 0)]
    clock.advance(10)
    courier(full, clock, good, bad).round()
    assert (len(good.ids), len(bad.ids)) == (2, 6)
    assert counts(full) == [(2, 0, 0)] * 2


def test_a_new_endpoint_begins_with_the_next_event(
    full: Registry, clock: Clock, servers: Any
) -> None:
    """What happened before is not sent, unless it is asked for when the endpoint is first named."""
    late, early = servers(), servers()
    first = Courier(full, [late.url], [SECRET], clock=clock)
    assert first.new == (late.url,)
    assert first.round() == []
    full.retire("tower", full.publish(capsule(seed=1), alias=None).number)
    assert courier(full, clock, late, early).new == (early.url,)
    assert courier(full, clock, late, early).new == ()
    courier(full, clock, early, late).round()
    ids = [event.message_id for event in read_events(full)]
    assert (late.ids, early.ids) == (ids[2:], ids)


def test_one_address_is_one_endpoint(full: Registry, clock: Clock, servers: Any) -> None:
    """Its password and query may change, and nothing is sent twice; two at once are refused."""
    receiver = servers()
    courier(full, clock, receiver).round()
    receiver.url += "?token=new"
    assert courier(full, clock, receiver).round() == []
    full.publish(capsule(seed=1), alias=None)
    assert len(courier(full, clock, receiver).round()) == 1
    assert "token" not in str(states(full.database))
    with pytest.raises(InvalidReference, match="give them two paths"):
        Courier(full, [receiver.url, f"{receiver.url}er"], [SECRET])


def test_a_forgotten_endpoint_is_owed_nothing(full: Registry, clock: Clock, servers: Any) -> None:
    """Neither what waited nor what comes; named again, it is new."""
    gone, kept = servers(), servers()
    courier(full, clock, gone, kept)
    forget(full.database, [gone.url])
    full.publish(capsule(seed=1), alias=None)
    assert [one.endpoint for one in states(full.database)] == [kept.url]
    assert counts(full) == [(0, 3, 0)]
    assert Courier(full, [gone.url], [SECRET], clock=clock).round() == []
    with pytest.raises(NotFound, match="no endpoint http://nobody/ in"):
        forget(full.database, [kept.url, "http://nobody/"])
    with pytest.raises(NotFound, match="--status"):
        states(full.database, ["http://nobody/"])
    assert len(courier(full, clock, kept).round()) == 3


def test_a_courier_that_died_loses_nothing(full: Registry, clock: Clock, servers: Any) -> None:
    """Its claim runs out, and another one sends the event."""
    receiver = servers()
    second = courier(full, clock, receiver)
    claimed = claim(full.database, receiver.url, clock.now)
    assert [delivery.attempts for delivery in claimed] == [1, 1]
    assert second.round() == []
    clock.advance(240)
    assert [delivery.failure for delivery in second.round()] == [None, None]
    assert len(receiver.ids) == 2


def test_couriers_side_by_side_send_each_event_once(
    registry: Registry, clock: Clock, servers: Any
) -> None:
    """Threads that share a registry: claims keep them apart."""
    for seed in range(5):
        registry.publish(capsule(seed=seed))
    receivers = [servers(), servers()]

    def carry() -> None:
        courier(registry, clock, *receivers).round()

    threads = [threading.Thread(target=carry) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [event.message_id for event in read_events(registry)]
    assert len(ids) == 10
    assert [sorted(receiver.ids) for receiver in receivers] == [sorted(ids)] * 2


def test_an_event_is_given_up_in_the_end(full: Registry, clock: Clock, servers: Any) -> None:
    """After the last attempt it waits for a person, who lets it be sent again to that endpoint."""
    good, bad = servers(), servers()
    bad.statuses = [500] * 2 * MAX_ATTEMPTS
    carrier = courier(full, clock, good, bad)
    for _ in range(MAX_ATTEMPTS):
        last = carrier.round()
        clock.advance(7 * 3600)
    assert [delivery.due for delivery in last] == [None, None]
    assert carrier.round() == []
    assert sorted(counts(full)) == [(0, 0, 2), (2, 0, 0)]
    assert states(full.database, [bad.url])[0].failure == "answered 500"
    assert send_again(full.database, [good.url]) == 0
    assert send_again(full.database, [bad.url]) == 2
    assert [delivery.failure for delivery in carrier.round()] == [None, None]
    assert send_again(full.database, [bad.url]) == 0
    assert (len(good.ids), counts(full)) == (2, [(2, 0, 0)] * 2)


def test_pauses_double_up_to_a_bound() -> None:
    """Two days in all, so that a weekend's outage is mostly bridged."""
    pauses = [retry_s(attempts, 0.0) for attempts in range(1, MAX_ATTEMPTS)]
    assert pauses[:3] == [5, 10, 20]
    assert max(pauses) == 6 * 3600
    assert 40 * 3600 < sum(pauses) < 60 * 3600
    assert retry_s(1, 0.99) < 1.25 * 5


@pytest.mark.parametrize(
    ("urls", "secrets", "sentence"),
    [
        (["ftp://host/x"], [SECRET], "is no address"),
        (["host/x"], [SECRET], "is no address"),
        (["http://[::1/x"], [SECRET], "is no address"),
        (["http://host/" + "x" * 500], [SECRET], "at most 500 characters"),
        ([], [SECRET], "need an endpoint and a secret"),
        (["http://host"], [], "need an endpoint and a secret"),
        (["http://host"], ["whsec_short"], "is malformed"),
        (["http://host"], ["whsec_" + "%" * 40], "is malformed"),
    ],
)
def test_wrong_settings_are_refused(
    registry: Registry, urls: list[str], secrets: list[str], sentence: str
) -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidReference, match=sentence):
        Courier(registry, urls, secrets)
