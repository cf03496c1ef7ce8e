"""The driver against a real HTTP server: open loop, complete payloads, every failure counted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from benchmarks.load.driver import Payload, Sample, drive, is_loopback, warm_up
from benchmarks.load.plan import Arrival
from tests.benchmarks.load.serving import SLOW_S, Seen, served

PAYLOAD = Payload(
    image=("target.png", b"i" * 300), mask=("mask.png", b"m" * 40), fields={"steps": "8"}
)


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="module")
def url(seen: Seen) -> Iterator[str]:
    with served(seen) as address:
        yield address


def driven(url: str, plan: list[Arrival], timeout_s: float = 10.0) -> list[Sample]:
    payloads = {arrival.scene: PAYLOAD for arrival in plan}
    return asyncio.run(drive(url, plan, payloads, timeout_s=timeout_s))


def test_request_carries_both_files_and_the_fields(url: str, seen: Seen) -> None:
    """The service receives image, mask, the run's fields and the arrival's own seed."""
    (sample,) = driven(url, [Arrival(at_s=0.0, scene="tower", seed=17)])
    assert seen.requests[-1] == {
        "scene": "tower", "seed": "17", "steps": "8", "image": 300, "mask": 40,
    }  # fmt: skip
    assert (sample.outcome, sample.status) == ("ok", 200)
    assert sample.timings == "sample;dur=1.5"
    (late,) = driven(url, [Arrival(at_s=0.0, scene="late", seed=0)])
    assert (sample.partial, late.partial) == (False, True)


def test_requests_leave_when_due_however_slow_the_answers(url: str) -> None:
    """Ten requests of 0.4 s, due 0.02 s apart, overlap: all end long before 4 s."""
    plan = [Arrival(at_s=k * 0.02, scene="slow", seed=k) for k in range(10)]
    samples = driven(url, plan)
    assert all(sample.outcome == "ok" for sample in samples)
    assert samples[-1].sent_s < samples[0].finished_s
    assert max(sample.finished_s for sample in samples) < 10 * SLOW_S
    assert all(sample.latency_s >= SLOW_S * 0.99 for sample in samples)


def test_samples_keep_the_order_of_the_plan(url: str) -> None:
    """A slow first request does not change places with a quick second one."""
    plan = [Arrival(0.0, "slow", 0), Arrival(0.05, "tower", 1)]
    reported: list[str] = []
    samples = asyncio.run(
        drive(
            url,
            plan,
            {"slow": PAYLOAD, "tower": PAYLOAD},
            on_sample=lambda sample: reported.append(sample.scene),
        )
    )
    assert [sample.scene for sample in samples] == ["slow", "tower"]
    assert [sample.index for sample in samples] == [0, 1]
    assert reported == ["tower", "slow"]


@pytest.mark.parametrize(
    ("scene", "outcome", "status"),
    [("busy", "throttled", 429), ("broken", "server_error", 500), ("absent", "rejected", 404)],
)
def test_refusals_are_told_apart(url: str, scene: str, outcome: str, status: int) -> None:
    """429, 5xx and other 4xx are different outcomes, each with the server's own words."""
    (sample,) = driven(url, [Arrival(0.0, scene, 0)])
    assert (sample.outcome, sample.status) == (outcome, status)
    assert sample.error in {"queue full", "no luck", "no such scene"}
    assert sample.retry_after == ("3" if scene == "busy" else None)


def test_answer_that_never_comes_is_a_timeout(url: str) -> None:
    """The bound counts from the sending and has no status."""
    (sample,) = driven(url, [Arrival(0.1, "hung", 0)], timeout_s=0.3)
    assert (sample.outcome, sample.status) == ("timeout", None)
    assert 0.3 <= sample.finished_s - sample.sent_s < 2


def test_refused_connection_is_counted_and_the_run_goes_on() -> None:
    """Where nobody listens every request is a sample, not a crash."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        samples = driven(url, [Arrival(0.0, "tower", 0), Arrival(0.01, "tower", 1)])
    assert [sample.outcome for sample in samples] == ["connection", "connection"]
    assert samples[0].error is not None
    assert samples[0].error.startswith("ConnectError")


def test_warm_up_asks_for_each_scene_in_turn(url: str, seen: Seen) -> None:
    """Two requests for each of two scenes, before any that counts."""
    before = len(seen.requests)
    payloads = {"tower": PAYLOAD, "bridge": PAYLOAD}
    asyncio.run(warm_up(url, payloads, times=2, timeout_s=5))
    scenes = [request["scene"] for request in seen.requests[before:]]
    assert scenes == ["tower", "tower", "bridge", "bridge"]


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("http://127.0.0.1:3000", True),
        ("http://127.8.9.1:3000", True),
        ("http://localhost:3000", True),
        ("http://[::1]:3000", True),
        ("http://0.0.0.0:3000", False),
        ("http://192.168.0.4:3000", False),
        ("http://localhost.example.org", False),
        ("http://127.0.0.1.example.org", False),
        ("http://127.0.0.1@example.org", False),
        ("nonsense", False),
    ],
)
def test_only_this_machine_is_loopback(url: str, own: bool) -> None:
    """Names that merely look like it do not pass."""
    assert is_loopback(url) is own
