"""Sends a plan of requests to a running service and keeps one sample for each."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from benchmarks.load.plan import Arrival

Outcome = Literal["ok", "throttled", "rejected", "server_error", "timeout", "connection"]


@dataclass(frozen=True)
class Payload:
    """What a request for one scene carries: two image files and further form fields."""

    image: tuple[str, bytes]
    mask: tuple[str, bytes]
    fields: Mapping[str, str]

    @property
    def size_bytes(self) -> int:
        return len(self.image[1]) + len(self.mask[1])


@dataclass(frozen=True)
class Sample:
    """One request. Times are seconds since the start of the run.

    ``latency_s`` counts from when the request was due, so that waiting for a late generator or
    behind slow answers is part of it; ``lag_s`` is the generator's own lateness. ``timings`` is
    what the service says of its stages in ms, as ``queue;dur=3.1, sample;dur=80.2``, and
    ``partial`` whether a deadline took candidates from the answer.
    """

    index: int
    scene: str
    scheduled_s: float
    sent_s: float
    finished_s: float
    status: int | None
    outcome: Outcome
    retry_after: str | None
    timings: str | None
    partial: bool
    error: str | None

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.scheduled_s

    @property
    def lag_s(self) -> float:
        return self.sent_s - self.scheduled_s


def read_payload(image: Path, mask: Path, fields: Mapping[str, str]) -> Payload:
    """Read the two files of a scene once, before the run."""
    return Payload(
        image=(image.name, image.read_bytes()), mask=(mask.name, mask.read_bytes()), fields=fields
    )


def is_loopback(url: str) -> bool:
    """Whether the address is this machine's own: ``localhost`` or a loopback address."""
    host = httpx.URL(url).host
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def warm_up(
    url: str, payloads: Mapping[str, Payload], *, times: int, timeout_s: float
) -> list[Sample]:
    """Ask for every scene ``times`` times, one request after the other, before the run."""
    samples = []
    async with _client(url) as client:
        for scene, payload in payloads.items():
            for number in range(times):
                arrival = Arrival(at_s=0.0, scene=scene, seed=number)
                start = time.perf_counter()
                samples.append(await _send(client, -1, arrival, payload, timeout_s, start))
    return samples


async def drive(
    url: str,
    plan: Sequence[Arrival],
    payloads: Mapping[str, Payload],
    *,
    timeout_s: float = 60.0,
    on_sample: Callable[[Sample], None] | None = None,
) -> list[Sample]:
    """Send every request of the plan when it is due, none held back for an earlier one.

    Args:
        url: Where the service listens, without a path.
        plan: Arrivals by time.
        payloads: What to send, by scene.
        timeout_s: Bound of one request, counted from its sending.
        on_sample: Called with each sample as its request ends.

    Returns:
        One sample per arrival, in the order of the plan.
    """
    async with _client(url) as client:
        start = time.perf_counter()

        async def when_due(index: int, arrival: Arrival) -> Sample:
            await asyncio.sleep(start + arrival.at_s - time.perf_counter())
            payload = payloads[arrival.scene]
            sample = await _send(client, index, arrival, payload, timeout_s, start)
            if on_sample is not None:
                on_sample(sample)
            return sample

        return await asyncio.gather(*(when_due(i, arrival) for i, arrival in enumerate(plan)))


def _client(url: str) -> httpx.AsyncClient:
    # No bound on connections: a pool that makes requests wait would close the loop again.
    # No proxies from the environment: they would see the photos.
    return httpx.AsyncClient(
        base_url=url,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        timeout=httpx.Timeout(None),
        trust_env=False,
    )


async def _send(
    client: httpx.AsyncClient,
    index: int,
    arrival: Arrival,
    payload: Payload,
    timeout_s: float,
    start: float,
) -> Sample:
    sent = time.perf_counter()
    response: httpx.Response | None = None
    error: str | None = None
    outcome: Outcome
    try:
        async with asyncio.timeout(timeout_s):
            response = await client.post(
                f"/v1/scenes/{arrival.scene}/complete",
                data={"seed": str(arrival.seed), **payload.fields},
                files={"image": payload.image, "mask": payload.mask},
            )
        outcome = _outcome(response.status_code)
        if outcome != "ok":
            error = response.text[:300]
    except TimeoutError:
        outcome, error = "timeout", f"no answer within {timeout_s:g} s"
    except httpx.TransportError as broken:
        outcome, error = "connection", f"{type(broken).__name__}: {broken}"
    headers = httpx.Headers() if response is None else response.headers
    return Sample(
        index=index,
        scene=arrival.scene,
        scheduled_s=arrival.at_s,
        sent_s=sent - start,
        finished_s=time.perf_counter() - start,
        status=None if response is None else response.status_code,
        outcome=outcome,
        retry_after=headers.get("retry-after"),
        timings=headers.get("x-realfill-timings"),
        partial="x-realfill-partial" in headers,
        error=error,
    )


def _outcome(status: int) -> Outcome:
    if status < 300:
        return "ok"
    if status == 429:
        return "throttled"
    return "server_error" if status >= 500 else "rejected"
