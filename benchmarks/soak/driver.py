"""Sends requests, moves aliases, probes and samples memory, all at once, until time is up."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import httpx

from benchmarks.soak.contents import Contents
from benchmarks.soak.ledger import AliasLedger
from benchmarks.soak.memory import MemorySample, resident_bytes
from benchmarks.soak.outcomes import Outcome, OutcomeKind, kind_of, read_pictures
from benchmarks.soak.pictures import Gallery, Kind
from benchmarks.soak.plan import Ask, Move
from registry import Registry, RegistryError

ALIAS = "live"
PROBES = ("/readyz", "/metrics")
PROBE_S = 10.0
# Work that is under way shows in these gauges, which must return to zero.
BUSY_GAUGES = ("realfill_completions_in_flight", "realfill_lane_jobs")
LONGEST_PAUSE_S = 5.0


@dataclass
class Record:
    """Everything that was seen; times are seconds since the start of the run.

    Attributes:
        sent: Indices of the requests, in order.
        probes: How many, and what each failure was.
        moves: How many aliases moved, and what each failure was.
    """

    ledger: AliasLedger
    gallery: Gallery = field(default_factory=Gallery)
    sent: list[int] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)
    probes: int = 0
    probe_failures: list[str] = field(default_factory=list)
    moves: int = 0
    move_failures: list[str] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """How many requests ended that way."""
        return sum(outcome.kind == kind for outcome in self.outcomes)


class Driver:
    """Drives one running server.

    Args:
        client: Bound to its address, without bounds on connections or time.
        contents: What it serves.
        record: Where everything that is seen goes.
        fields: Further form fields of every request.
        timeout_s: An answer that takes longer never comes.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        contents: Contents,
        record: Record,
        *,
        fields: dict[str, str],
        timeout_s: float,
    ) -> None:
        self.client = client
        self.contents = contents
        self.record = record
        self.fields = fields
        self.timeout_s = timeout_s
        self._began = time.perf_counter()
        # Seconds; a moving mean of the answers, for the moments at which clients leave.
        self._typical_s = 1.0

    def clock(self) -> float:
        """Seconds since the start of the run."""
        return time.perf_counter() - self._began

    async def send(self, ask: Ask) -> Outcome:
        """Send a request, see it through to its one outcome, and keep that."""
        began_s = self.clock()
        self.record.sent.append(ask.index)
        response: httpx.Response | None = None
        kind: OutcomeKind = "cancelled"
        detail: str | None = None
        try:
            async with asyncio.timeout(self.timeout_s):
                response = await self._post(ask)
            if response is not None:
                kind = kind_of(response.status_code)
        except TimeoutError:
            kind, detail = "hung", f"no answer within {self.timeout_s:g} s"
        except httpx.TransportError as error:
            kind, detail = "broken", f"{type(error).__name__}: {error}"
        outcome = Outcome(
            index=ask.index,
            scene=ask.scene,
            kind=kind,
            began_s=began_s,
            ended_s=self.clock(),
            asked_digest=ask.digest,
            retry_after=None if response is None else response.headers.get("retry-after"),
            detail=detail,
        )
        if response is not None:
            outcome = self._judge(ask, response, outcome)
        self.record.outcomes.append(outcome)
        return outcome

    async def _post(self, ask: Ask) -> httpx.Response | None:
        """The answer to a request, or None where its client left before."""
        image, mask = self.contents.targets[ask.scene]
        fields = {"seed": ask.seed, "candidates": ask.candidates, "steps": ask.steps}
        if not ask.as_image:
            fields["top"] = ask.candidates
        post = asyncio.create_task(
            self.client.post(
                f"/v1/scenes/{ask.reference}/complete",
                data={**{name: str(value) for name, value in fields.items()}, **self.fields},
                files={"image": ("image.png", image), "mask": ("mask.png", mask)},
                headers={"Accept": "image/png" if ask.as_image else "application/json"},
            )
        )
        patience_s = None if ask.cancel_after is None else ask.cancel_after * self._typical_s
        try:
            done, _ = await asyncio.wait({post}, timeout=patience_s)
        finally:
            # Closes the connection, which is how a client leaves; no effect on a finished one.
            post.cancel()
        if done:
            return post.result()
        await asyncio.wait({post})
        return None

    def _judge(self, ask: Ask, response: httpx.Response, outcome: Outcome) -> Outcome:
        """The outcome with what the response holds; its pictures go to the gallery."""
        if outcome.kind != "answer":
            return replace(outcome, detail=f"{response.status_code}: {response.text[:200]}")
        try:
            pictures = read_pictures(response, ask)
            for seed, file in pictures.files.items():
                self.record.gallery.add(Kind(ask.scene, pictures.digest, ask.steps, seed), file)
        except ValueError as error:
            return replace(outcome, kind="malformed", detail=str(error))
        self._typical_s += 0.2 * (outcome.latency_s - self._typical_s)
        return replace(outcome, digest=pictures.digest)

    async def work(self, asks: Iterator[Ask], until_s: float) -> None:
        """One client of a closed loop: a request after the other; a refused one pauses."""
        while self.clock() < until_s:
            outcome = await self.send(next(asks))
            if outcome.kind == "throttled":
                await asyncio.sleep(min(_seconds(outcome.retry_after), LONGEST_PAUSE_S))
            elif outcome.kind == "broken":
                await asyncio.sleep(1.0)

    async def arrive(self, asks: Iterator[Ask], due_s: Sequence[float]) -> None:
        """An open loop: every request leaves when it is due, none held back for an earlier one."""

        async def when_due(ask: Ask, at_s: float) -> None:
            await asyncio.sleep(at_s - self.clock())
            await self.send(ask)

        await asyncio.gather(*(when_due(next(asks), at_s) for at_s in due_s))

    async def one_by_one(self, asks: Sequence[Ask]) -> None:
        """Requests that have the server to themselves."""
        for ask in asks:
            await self.send(ask)

    async def move(
        self, moves: Iterator[Move], registry: Registry, every_s: float, until_s: float
    ) -> None:
        """Move an alias every so often."""
        for move in moves:
            await asyncio.sleep(every_s)
            if self.clock() >= until_s:
                return
            await self._move(move, registry)

    async def _move(self, move: Move, registry: Registry) -> None:
        ledger = self.record.ledger
        number = ledger.after(move.scene, move.turn)
        ledger.begin_move(move.scene, number, self.clock())
        try:
            if move.over_http:
                path = f"/v1/scenes/{move.scene}/aliases/{ALIAS}"
                answer = await self.client.put(path, json={"version": number}, timeout=PROBE_S)
                answer.raise_for_status()
            else:
                await asyncio.to_thread(registry.set_alias, move.scene, ALIAS, number, by="soak")
        except (httpx.HTTPError, RegistryError) as error:
            self.record.move_failures.append(f"{move.scene} to version {number}: {error!r}")
            return
        ledger.end_move(move.scene, self.clock())
        self.record.moves += 1

    async def probe(self, every_s: float = 1.0) -> None:
        """Ask for readiness and metrics every so often, until cancelled."""
        for path in itertools.cycle(PROBES):
            failure = None
            try:
                status = (await self.client.get(path, timeout=PROBE_S)).status_code
                failure = None if status == 200 else f"status {status}"
            except httpx.HTTPError as error:
                failure = repr(error)
            self.record.probes += 1
            if failure is not None:
                self.record.probe_failures.append(f"{path} at {self.clock():.1f} s: {failure}")
            await asyncio.sleep(every_s / len(PROBES))

    async def watch_memory(self, pid: int, every_s: float = 1.0) -> None:
        """Sample a process tree's memory every so often, until cancelled."""
        while True:
            self.record.memory.append(MemorySample(self.clock(), resident_bytes(pid)))
            await asyncio.sleep(every_s)

    async def idle(self, patience_s: float) -> tuple[str, str | None]:
        """Wait until the server has nothing under way.

        Returns:
            The last metrics, and what still was under way, or None.
        """
        until = self.clock() + patience_s
        while True:
            text, busy = await self._under_way()
            if busy is None or self.clock() > until:
                return text, busy
            await asyncio.sleep(0.2)

    async def _under_way(self) -> tuple[str, str | None]:
        try:
            text = (await self.client.get("/metrics", timeout=PROBE_S)).text
        except httpx.HTTPError as error:
            return "", f"its metrics cannot be had ({error!r})"
        return text, still_busy(text)


def still_busy(metrics: str) -> str | None:
    """What the gauges of the exposition say is under way; None where nothing is."""
    values = dict(
        line.rsplit(" ", 1) for line in metrics.splitlines() if line and not line.startswith("#")
    )
    for gauge in BUSY_GAUGES:
        if float(values.get(gauge, math.nan)) != 0:
            return f"{gauge} is {values.get(gauge, 'absent')}"
    return None


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdecimal() else 1.0
