"""``python -m benchmarks.load.compare``: goodput beside a server written in an afternoon.

Both servers run at once, over one registry, and are asked in turns: first one request after the
other, which says how many a server could answer per second, then in an open loop at shares of that
and above it. A server's goodput is the best that it reached at any rate.
"""

from __future__ import annotations

import asyncio
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import click
import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.command import Measurement, on_gpu
from benchmarks.engine.adapters import random_capsule
from benchmarks.engine.requests import references_of
from benchmarks.engine.service import SERVE, hole, png, square_of
from benchmarks.engine.timing import alone
from benchmarks.load.driver import Outcome, Payload, Sample, drive, warm_up
from benchmarks.load.local import free_port, serving
from benchmarks.load.plan import arrivals
from benchmarks.load.report import Conditions, summarize, write
from benchmarks.record import ROWS, Row, record, table_of
from realfill.base import Base, load_base
from realfill.errors import RealFillError
from registry import Registry
from registry.reader import PAGE
from service.libraries import begin_as_served

PEER = (
    "diffusers' models and scheduler, candidates in one batch, a LoRA file loaded where the scene "
    "changes, kornia's LoFTR pair by pair, one request at a time"
)
Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
OURS, THEIRS = "ours", "peer"
# Of what a server answers per second one request after the other.
SHARES = (0.6, 0.8, 1.0, 1.25)
CANDIDATES = 4
# Outcomes that are no overload.
FAULTS: tuple[Outcome, ...] = ("server_error", "rejected", "connection")
START_S = 300.0
TIMEOUT_S = 120.0
# Two pictures of one scene and seed may differ by so much of what two scenes differ by: one server
# blends its seam, and samplers round in their own ways.
ALLOWED = 0.5
Positive = click.FloatRange(min=0, min_open=True)


@dataclass(frozen=True)
class Load:
    """What both servers are asked.

    Attributes:
        duration_s: Of each rate.
        slo_s: Within which an answer is good.
    """

    payloads: Mapping[str, Payload]
    duration_s: float
    slo_s: float
    zipf: float
    seed: int


@dataclass
class Server:
    """One of the two.

    Attributes:
        out: For its log, and for the report and the samples of each rate.
        alone_s: Of each request that had the server to itself.
        levels: What ``summarize`` says of each rate.
    """

    name: str
    url: str
    out: Path
    alone_s: list[float] = field(default_factory=list)
    levels: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rate_alone_per_s(self) -> float:
        """Answers per second, one after the other."""
        return 1 / median(self.alone_s)

    @property
    def best(self) -> dict[str, Any]:
        """The rate at which most answers per second were good."""
        return max(self.levels, key=lambda level: float(level["goodput_per_s"]))


def publish(base: Base, folder: Path, scenes: int, rank: int) -> list[str]:
    """Scenes of random adapters and three references in a registry; their names."""
    photos = references_of(base.size_px)
    extras = {f"references.{k}": photo for k, photo in enumerate(photos)}
    # Of one length, so that none is part of another: diffusers matches parts of names.
    names = [f"scene_{k:04}" for k in range(scenes)]
    registry = Registry.open(folder)
    try:
        for seed, name in enumerate(names):
            registry.publish(random_capsule(base, name, rank=rank, seed=seed, extras=extras))
    finally:
        registry.close()
    return names


def payload_of(base: Base, candidates: int, steps: int) -> Payload:
    """A photograph of the base's size with a hole in its middle."""
    # The sampler that both have.
    fields = {"candidates": str(candidates), "steps": str(steps), "sampler": "dpm++2m"}
    square = square_of(base.size_px)
    mask = png(hole(square).expand(3, -1, -1))
    return Payload(("target.png", png(square)), ("mask.png", mask), fields)


def check_same_work(urls: Sequence[str], scenes: Sequence[str], payload: Payload) -> None:
    """Ask both servers for two scenes, and see that their pictures tell the same of each.

    Raises:
        RuntimeError: A server refuses, or they do not draw the same.
    """
    # Without the seam's care, which the peer does not take.
    bare = {"candidates": "1", "seed": "0", "seamless": "false", "feather_px": "0"}
    pictures = []
    for url in urls:
        for scene in scenes[:2]:
            answer = httpx.post(
                f"{url}/v1/scenes/{scene}/complete",
                data={**payload.fields, **bare},
                files={"image": payload.image, "mask": payload.mask},
                timeout=TIMEOUT_S,
                trust_env=False,
            )
            if answer.status_code != 200:
                raise RuntimeError(f"{url} answers {answer.status_code}: {answer.text[:300]}")
            with Image.open(io.BytesIO(answer.content)) as picture:
                pictures.append(np.asarray(picture.convert("RGB"), np.float32))
    check_alike(pictures[:2], pictures[2:])


def check_alike(ours: Sequence[Pixels], theirs: Sequence[Pixels]) -> None:
    """Two servers' pictures of the same two scenes.

    Raises:
        RuntimeError: They differ by too much of what the scenes differ by.
    """
    between = min(float(np.abs(one - other).mean()) for one, other in (ours, theirs))
    apart = max(float(np.abs(one - other).mean()) for one, other in zip(ours, theirs, strict=True))
    if apart > ALLOWED * between:
        raise RuntimeError(
            f"the servers' pictures of a scene differ by {apart:.2f} of 255 and those of two "
            f"scenes by {between:.2f}: they do not draw the same, and cannot be compared"
        )


def measure(servers: Sequence[Server], load: Load, on_step: Callable[[str], object]) -> None:
    """Ask both servers in turns, and keep what they did in them.

    Raises:
        RuntimeError: A request that had the server to itself was refused, or a server erred.
    """
    for turn in range(2):
        for server in servers:
            on_step(f"{server.name}, one request after the other")
            samples = asyncio.run(warm_up(server.url, load.payloads, times=1, timeout_s=TIMEOUT_S))
            _check_answered(samples)
            if turn > 0:
                server.alone_s += [sample.latency_s for sample in samples]
    for place, share in enumerate(SHARES):
        for server in servers:
            rate = share * server.rate_alone_per_s
            on_step(f"{server.name}, {rate:.2f} requests per second")
            ask_at(server, load, rate, place=place)


def _check_answered(samples: Sequence[Sample]) -> None:
    refused = next((sample for sample in samples if sample.outcome != "ok"), None)
    if refused is not None:
        raise RuntimeError(f"a request alone ended as {refused.outcome}: {refused.error}")


def ask_at(server: Server, load: Load, rate_per_s: float, *, place: int) -> None:
    """Ask a server at one rate, and keep what it did; ``place`` is that of the rate's share.

    Raises:
        RuntimeError: It erred or died. Being late and refusing with 429 is what overload does.
    """
    out = server.out / f"{SHARES[place]:g}"
    level = _level(server.url, load, rate_per_s, load.seed + place, out)
    for outcome in FAULTS:
        if count := level["outcomes"][outcome]:
            raise RuntimeError(
                f"{server.name}: {count} requests ended as {outcome.replace('_', ' ')} at"
                f" {rate_per_s:.2f} per second (first error: {level['first_error']}): see {out} and"
                " the server's log, and measure again"
            )
    server.levels.append(level)


def _level(url: str, load: Load, rate_per_s: float, seed: int, out: Path) -> dict[str, Any]:
    """One rate for a while; ends with the last answer."""
    scenes = tuple(load.payloads)
    plan = arrivals(
        scenes, rate_per_s=rate_per_s, duration_s=load.duration_s, zipf_s=load.zipf, seed=seed
    )
    conditions = Conditions(
        url=url,
        rate_per_s=rate_per_s,
        duration_s=load.duration_s,
        zipf_s=load.zipf,
        seed=seed,
        warmup=2,
        timeout_s=TIMEOUT_S,
        slo_s=load.slo_s,
        scenes=scenes,
        payload_bytes={name: payload.size_bytes for name, payload in load.payloads.items()},
        fields=next(iter(load.payloads.values())).fields,
    )
    cpu = time.process_time()
    samples = asyncio.run(drive(url, plan, load.payloads, timeout_s=TIMEOUT_S))
    summary = summarize(samples, conditions, cpu_s=time.process_time() - cpu)
    write(out, samples, summary)
    return summary


def table(servers: Sequence[Server], slo_s: float) -> Table:
    """What each server did at each rate."""
    lines = Table(title=f"Goodput within {slo_s:g} s", title_justify="left")
    for title in ("server", "offered /s", "good /s", "good", "p50", "slowest"):
        lines.add_column(title, justify="left" if title == "server" else "right")
    for server in servers:
        alone_s = median(server.alone_s)
        lines.add_row(f"{server.name}, one by one", "", "", "", f"{alone_s:.2f} s", "")
        for level in server.levels:
            latency, share = level["latency_s"], level["good_share"]
            lines.add_row(
                server.name,
                f"{level['offered_per_s']:.2f}",
                f"{level['goodput_per_s']:.2f}",
                "" if share is None else f"{share:.0%}",
                *("" if latency[k] is None else f"{latency[k]:.2f} s" for k in ("p50", "max")),
            )
    return lines


def rows_of(servers: Sequence[Server], slo_s: float, kind: str, path: Path) -> list[Row]:
    """What is recorded."""
    ours, theirs = servers
    good, peer_good = (float(server.best["goodput_per_s"]) for server in servers)
    if peer_good == 0:
        raise RuntimeError(
            f"no answer of the peer came within {slo_s:g} s, so that there is no ratio: raise --slo"
        )
    ratio = good / peer_good
    peer = f"{PEER}; at most {slo_s:g} s"
    return [
        record(f"load.goodput_ratio_peer{kind}", ratio, "x", peer=peer, ratio=ratio, path=path),
        record(
            f"load.goodput_per_s{kind}",
            good,
            "answers/s",
            peer=peer,
            peer_value=peer_good,
            path=path,
        ),
        record(
            f"load.alone_p50_s{kind}",
            median(ours.alone_s),
            "s",
            better="lower",
            peer=PEER,
            peer_value=median(theirs.alone_s),
            path=path,
        ),
    ]


@contextmanager
def both(
    registry: Path, base_name: str, device: str, matcher: str, out: Path
) -> Iterator[list[Server]]:
    """Both servers over one registry, for the length of the block.

    Raises:
        RuntimeError: One did not start; its log stays in ``out``.
    """
    with ExitStack() as stack:
        servers = []
        for name, program in ((OURS, ["-c", SERVE]), (THEIRS, ["-m", "benchmarks.load.peer"])):
            port = free_port()
            server = Server(name, f"http://127.0.0.1:{port}", out / name)
            words = [sys.executable, *program, "--registry", str(registry), "--port", str(port)]
            words += ["--base", base_name, "--device", device, "--matcher", matcher]
            log = server.out / "server.log"
            stack.enter_context(serving(words, server.url, log=log, start_s=START_S))
            servers.append(server)
        yield servers


def _told(params: Mapping[str, Any]) -> set[str]:
    return {"candidates", "steps", *on_gpu(params)}


@click.command(cls=Measurement, free=_told)
@click.option("--base", "base_name", default="nano", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--scenes", type=click.IntRange(min=2, max=PAGE), default=8, show_default=True)
@click.option("--rank", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--candidates", type=click.IntRange(min=1), default=CANDIDATES, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="By default as many as the base's own.")
@click.option("--matcher", default="nano", show_default=True, help="LoFTR that ranks for both.")
@click.option("--slo", type=Positive, default=3.0, show_default=True, help="Seconds.")
@click.option("--duration", type=Positive, default=60.0, show_default=True, help="Of each rate.")
@click.option("--zipf", type=click.FloatRange(min=0), default=1.0, help="0 for equal popularity.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), default=ROWS)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("load-out"))
def main(
    base_name: str,
    device: str,
    scenes: int,
    rank: int,
    candidates: int,
    steps: int | None,
    matcher: str,
    slo: float,
    duration: float,
    zipf: float,
    seed: int,
    rows: Path,
    out: Path,
) -> None:
    """Load this service and a simple one in turns, and record how many good answers each gives.

    Both serve the same scenes of random adapters. Four rates for each, of a minute by default.
    """
    try:
        base = alone(partial(load_base, base_name))
        asked = (candidates, steps or base.steps)
        payload = payload_of(base, *asked)
        with tempfile.TemporaryDirectory(prefix="realfill-load-") as folder:
            registry = Path(folder)
            names = alone(partial(publish, base, registry, scenes, rank))
            with both(registry, base_name, device, matcher, out) as servers:
                check_same_work([server.url for server in servers], names, payload)
                load = Load(dict.fromkeys(names, payload), duration, slo, zipf, seed)
                with Progress(console=Console(stderr=True)) as progress:
                    task = progress.add_task("", total=4 + 2 * len(SHARES))
                    measure(
                        servers,
                        load,
                        lambda said: progress.update(task, advance=1, description=said),
                    )
        Console().print(table(servers, slo))
        kind = "" if asked == (CANDIDATES, base.steps) else f".{asked[0]}x{asked[1]}"
        kind += ".cuda" if device == "cuda" else ""
        Console().print(table_of(rows_of(servers, slo, kind, rows)))
    except (RuntimeError, RealFillError, httpx.TransportError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    begin_as_served()
    main()
