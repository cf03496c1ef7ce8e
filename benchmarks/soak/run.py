"""One soak from its settings to its findings."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.load.local import STOP_S, free_port, serving
from benchmarks.load.plan import arrivals
from benchmarks.soak.contents import Contents
from benchmarks.soak.driver import Driver, Record
from benchmarks.soak.ledger import AliasLedger
from benchmarks.soak.plan import Ask, Shape, asks, moves
from benchmarks.soak.verdict import Ending
from registry import Registry

SERVE = "from service.cli import serve; serve()"
START_S = 240.0
IDLE_S = 30.0


@dataclass(frozen=True)
class Soak:
    """What a soak is.

    Attributes:
        base: Name or folder, as the server's setting.
        duration_s: Of the load.
        scenes: How many.
        scale: Of their adapters.
        workers: Clients of the closed loop.
        rate_per_s: Arrivals of an open loop, which then replaces the closed one.
        zipf_s: Of the scenes' popularity.
        cancel_share: Share of requests whose client leaves.
        move_every_s: Between alias moves.
        rechecks: Kinds of pictures that are asked for once more, alone, after the load.
        timeout_s: An answer that takes longer never comes.
        max_growth_pct: Of memory after the warm-up.
        seed: Of everything that is drawn.
        environment: Settings of the server.
        fields: Further form fields of every request.
    """

    base: str
    duration_s: float
    scenes: int = 50
    scale: float = 1.0
    workers: int = 8
    rate_per_s: float | None = None
    zipf_s: float = 1.0
    cancel_share: float = 0.1
    move_every_s: float = 1.0
    rechecks: int = 50
    timeout_s: float = 120.0
    max_growth_pct: float = 2.0
    seed: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """What a soak saw.

    Attributes:
        metrics: The server's exposition after the last request.
        stop_s: How long the server took to stop.
    """

    record: Record
    ending: Ending
    metrics: str
    stop_s: float


Watch = Callable[[Driver], None]


def soak(plan: Soak, contents: Contents, registry: Path, out: Path, watch: Watch) -> Findings:
    """Start the server, load it, recheck pictures, stop it.

    Args:
        plan: The soak.
        contents: What the registry holds.
        registry: Its folder.
        out: For the server's log.
        watch: Called twice a second with the driver.

    Raises:
        RuntimeError: The server did not start.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [sys.executable, "-c", SERVE, "--registry", str(registry), "--port", str(port)]
    words += ["--base", plan.base]
    record = Record(AliasLedger(contents.digests))
    environment = {**os.environ, **plan.environment}
    with serving(
        words, url, log=out / "server.log", start_s=START_S, environment=environment
    ) as server:
        opened = Registry.open(registry)
        try:
            metrics, busy = asyncio.run(_drive(plan, contents, record, url, server, opened, watch))
        finally:
            opened.close()
        died = server.poll() is not None
        asked = time.perf_counter()
    stop_s = time.perf_counter() - asked
    # `realfill serve` ends with 0 however hard it was told to; its time tells whether it obeyed.
    status = server.returncode if stop_s < STOP_S else None
    return Findings(record, Ending(status, busy, died), metrics, stop_s)


async def _drive(
    plan: Soak,
    contents: Contents,
    record: Record,
    url: str,
    server: subprocess.Popen[bytes],
    registry: Registry,
    watch: Watch,
) -> tuple[str, str | None]:
    """The load, then the rechecks; the last metrics and what was still under way."""
    async with _client(url) as client:
        driver = Driver(
            client, contents, record, fields=dict(plan.fields), timeout_s=plan.timeout_s
        )
        beside = [
            asyncio.create_task(work)
            for work in (driver.probe(), driver.watch_memory(server.pid), _show(driver, watch))
        ]
        load = asyncio.create_task(_load(plan, driver, registry))
        try:
            # A server that ends by itself ends the soak.
            while not load.done() and server.poll() is None:
                await asyncio.wait({load}, timeout=1.0)
            if not load.done():
                return "", None
            await load
            # Memory and probes tell of the load, not of the quiet after it.
            for task in beside[:2]:
                task.cancel()
            await driver.one_by_one(rechecks(record, plan))
            return await driver.idle(IDLE_S)
        finally:
            await _end([load, *beside])


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel tasks; what failed in one of them before is raised."""
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended


async def _load(plan: Soak, driver: Driver, registry: Registry) -> None:
    """Requests and alias moves until time is up and the last answer is there."""
    shape = Shape(driver.contents.scenes, zipf_s=plan.zipf_s, cancel_share=plan.cancel_share)
    asked = asks(shape, plan.seed)
    moved = moves(driver.contents.versions, plan.seed)
    if plan.rate_per_s is None:
        work = [driver.work(asked, plan.duration_s) for _ in range(plan.workers)]
    else:
        due = arrivals(
            shape.scenes,
            rate_per_s=plan.rate_per_s,
            duration_s=plan.duration_s,
            zipf_s=plan.zipf_s,
            seed=plan.seed,
        )
        work = [driver.arrive(asked, [arrival.at_s for arrival in due])]
    await asyncio.gather(*work, driver.move(moved, registry, plan.move_every_s, plan.duration_s))


def rechecks(record: Record, plan: Soak) -> list[Ask]:
    """Some of the pictures that were answered under load, each to be drawn again alone."""
    kinds = record.gallery.kinds
    chosen = random.Random(f"rechecks {plan.seed}").sample(kinds, min(plan.rechecks, len(kinds)))
    first = len(record.sent)
    return [
        Ask(first + k, kind.scene, kind.seed, 1, kind.steps, digest=kind.digest)
        for k, kind in enumerate(chosen)
    ]


async def _show(driver: Driver, watch: Watch) -> None:
    while True:
        watch(driver)
        await asyncio.sleep(0.5)


def _client(url: str) -> httpx.AsyncClient:
    # As the load driver's: no bound on connections, no proxies from the environment.
    return httpx.AsyncClient(
        base_url=url,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        timeout=httpx.Timeout(None),
        trust_env=False,
    )
