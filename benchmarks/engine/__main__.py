"""``python -m benchmarks.engine``: swaps, sample-steps and the service's overhead, as rows."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich.console import Console

from benchmarks.command import Measurement, on_gpu
from benchmarks.engine import peers, swaps
from benchmarks.engine.attention import measure_attention
from benchmarks.engine.bench import Bench, running
from benchmarks.engine.limits import flops_per_sample_step, peak_flops_per_s
from benchmarks.engine.mixing import (
    PAPER_RANK,
    Mixing,
    captures_after_start,
    measure_apart,
    measure_lone,
    measure_mixing,
    measure_waits,
    paper_like,
)
from benchmarks.engine.over_http import bench_requests, bench_service
from benchmarks.engine.peers import measure_hotswap, measure_infer, measure_mixed
from benchmarks.engine.rates import compare, compare_compiled, job_of, sample_steps_per_s
from benchmarks.engine.swaps import measure_swaps
from benchmarks.engine.timing import alone, idle_team, quantile, repeated
from benchmarks.record import ROWS, Row, table_of
from realfill.base import Base, load_base
from realfill.errors import RealFillError
from realfill.precision import serving_precision
from service.engine.layers import is_exact
from service.engine.runner import Application
from service.libraries import begin_as_served

BATCHES = (1, 2, 4, 8, 16)
RANKS = {"nano": 32}
PEAK = "a large matrix product in the same run"
PERCENTS = (20, 50, 80, 99)


def bench_swap(bench: Bench) -> list[Row]:
    """Swap to an adapter that lies ready, that is in host memory, and by diffusers."""
    measured = measure_swaps(
        bench.base, rank=bench.rank, repeats=20 * bench.repeats, peer_repeats=bench.repeats
    )
    ours, theirs = measured.ours_s, measured.peer_s
    rows = []
    for percent in PERCENTS:
        value = 1000 * quantile(ours, percent)
        # The p99 of the peer's few repeats would be their maximum, and says little.
        peer = {"peer": swaps.PEER, "peer_value": 1000 * quantile(theirs, percent)}
        details = peer if percent < 99 else {}
        rows.append(bench.keep(f"swap.p{percent}_ms", value, "ms", better="lower", **details))
    ratio = median(theirs) / median(ours)
    rows.append(bench.keep("swap.ratio_load_lora", ratio, "x", peer=swaps.PEER, ratio=ratio))
    for name, seconds in (("bring", measured.bring_s), ("merge", measured.merge_s)):
        value = 1000 * median(seconds)
        slower = bench.keep(
            f"swap.{name}_p50_ms",
            value,
            "ms",
            better="lower",
            peer=swaps.PEER,
            peer_value=1000 * median(theirs),
        )
        rows.append(slower)
    hotswap = measure_hotswap(bench.base, rank=bench.rank, repeats=bench.repeats).peer_s
    ratio = median(hotswap) / median(ours)
    rows.append(bench.keep("swap.ratio_hotswap", ratio, "x", peer=peers.HOTSWAP, ratio=ratio))
    return rows


def bench_rate(bench: Bench) -> list[Row]:
    """Sample-steps per second of a batch, encoding of the masked image included."""
    rows = []
    flops, peak = flops_per_sample_step(bench.base), peak_flops_per_s(bench.base)
    # The largest first: it is the one with a target.
    for batch in reversed(bench.batches):
        rates = sample_steps_per_s(bench.base, batch, steps=bench.steps, repeats=bench.repeats)
        name = f"engine.sample_steps_per_s.b{batch}"
        rows.append(bench.keep(name, median(rates), "sample-steps/s"))
        share = 100 * median(rates) * flops / peak
        rows.append(bench.keep(f"engine.peak_flops_pct.b{batch}", share, "%", peer=PEAK))
    return rows


def bench_diffusers(bench: Bench) -> list[Row]:
    """One job, encoding and decoding included, against diffusers at equal steps and seeds."""
    compared = compare(bench.base, samples=bench.samples, steps=bench.steps, repeats=bench.repeats)
    first, batched = compared
    rows = [
        bench.keep(name, of.ratio, "x", peer=of.peer, ratio=of.ratio)
        for name, of in (
            ("engine.ratio_diffusers", first),
            ("engine.ratio_diffusers_batched", batched),
        )
    ]
    rows += [
        bench.keep(
            f"engine.job_p{percent}_s",
            quantile(first.ours_s, percent),
            "s",
            better="lower",
            peer=first.peer,
            peer_value=quantile(first.peer_s, percent),
        )
        for percent in (20, 50, 80)
    ]
    return rows


def bench_compiled(bench: Bench) -> list[Row]:
    """One job against diffusers with a compiled U-Net, and what compiling takes."""
    found = compare_compiled(
        bench.base, samples=bench.samples, steps=bench.steps, repeats=bench.repeats
    )
    of = found.comparison
    return [
        bench.keep("engine.ratio_compiled", of.ratio, "x", peer=of.peer, ratio=of.ratio),
        bench.keep("engine.compile_s", found.compile_s, "s", better="lower"),
    ]


def bench_mixed(bench: Bench) -> list[Row]:
    """A step of as many scenes as samples against one scene, and the same by PEFT."""
    rows, samples = [], max(bench.batches)
    options: list[tuple[str, Base, int, Application]] = [
        ("", bench.base, bench.rank, "auto"),
        (".segmented", bench.base, bench.rank, "segmented"),
        (".paper", paper_like(bench.base), PAPER_RANK, "auto"),
        (".paper_segmented", paper_like(bench.base), PAPER_RANK, "segmented"),
    ]
    exact = is_exact(bench.base.device, bench.base.dtype)
    measured = set()
    for suffix, base, rank, way in options:
        what = (base.adapter_modules, rank, way != "segmented" and exact)
        if what in measured:
            # As on a GPU with a base whose adapters are the paper's anyway.
            continue
        measured.add(what)
        mixing = measure_mixing(
            base, scenes=samples, samples=samples, rank=rank, repeats=bench.repeats, application=way
        )
        one_ms, mixed_ms = (1000 * median(s) for s in (mixing.one_s, mixing.mixed_s))
        overhead = bench.keep(
            f"engine.mixed_overhead_pct{suffix}", mixing.overhead_pct, "%", better="lower"
        )
        step = bench.keep(
            f"engine.mixed_step_ms{suffix}",
            mixed_ms,
            "ms",
            better="lower",
            peer=f"{samples} samples of one scene",
            peer_value=one_ms,
        )
        rows += [overhead, step]
    peft = measure_mixed(bench.base, batch=samples, rank=bench.rank, repeats=bench.repeats)
    pct = 100 * (median(peft.mixed_s) / median(peft.fused_s) - 1)
    rows.append(bench.keep("engine.peft_mixed_overhead_pct", pct, "%", better="lower"))
    return rows


def bench_apart(bench: Bench) -> list[Row]:
    """Scenes of several samples in calls of their own, against one call for all."""
    rows, samples = [], max(bench.batches)
    for scenes in sorted({samples // 8, samples // 4, samples // 2} - {0, 1}):
        measured = measure_apart(
            bench.base, scenes=scenes, samples=samples, rank=bench.rank, repeats=bench.repeats
        )
        rows.append(
            bench.keep(
                f"engine.apart_ms.s{samples // scenes}",
                1000 * median(measured.apart_s),
                "ms",
                better="lower",
                peer=f"{scenes} scenes in one call",
                peer_value=1000 * median(measured.together_s),
            )
        )
    return rows


def bench_attention(bench: Bench) -> list[Row]:
    """A step by each implementation of attention that runs here, beside torch's own."""
    samples = max(bench.batches)
    seconds = measure_attention(bench.base, samples=samples, rank=bench.rank, repeats=bench.repeats)
    ms = {way: 1000 * median(taken) for way, taken in seconds.items()}
    return [
        bench.keep(
            f"engine.attention_step_ms.{way}",
            value,
            "ms",
            better="lower",
            peer="sdpa",
            peer_value=ms["sdpa"],
        )
        for way, value in ms.items()
    ]


def bench_threads(bench: Bench) -> list[Row]:
    """What a second team of threads costs the lane, though it has nothing to do."""
    samples = max(bench.batches)

    def mixing() -> Mixing:
        return measure_mixing(
            bench.base, scenes=samples, samples=samples, rank=bench.rank, repeats=bench.repeats
        )

    lone = mixing()
    with idle_team():
        beside = mixing()
    return [
        bench.keep(
            f"engine.idle_team_pct.{name}",
            100 * (median(theirs) / median(ours) - 1),
            "%",
            better="lower",
            peer="the same step without another thread's team",
        )
        for name, ours, theirs in (
            ("one", lone.one_s, beside.one_s),
            ("mixed", lone.mixed_s, beside.mixed_s),
        )
    ]


def bench_lane(bench: Bench) -> list[Row]:
    """What the lane adds to a lone job, and what a small one waits for beside a large one."""
    lone = measure_lone(bench.base, samples=bench.samples, steps=bench.steps, repeats=bench.repeats)
    waits = measure_waits(
        bench.base, samples=max(bench.batches) - 1, steps=bench.steps, repeats=bench.repeats
    )
    milliseconds = {
        "engine.join_p50_ms": (waits.join_s, "a step of the large job alone", waits.step_s),
        "engine.first_candidate_p50_ms": (waits.answer_s, "an idle lane", waits.idle_s),
    }
    rows = [
        bench.keep(
            "engine.lone_overhead_pct",
            lone.overhead_pct,
            "%",
            better="lower",
            target=3.0,
            peer="the same job without a lane",
        )
    ]
    rows += [
        bench.keep(
            name,
            1000 * median(ours),
            "ms",
            better="lower",
            peer=peer,
            peer_value=1000 * median(theirs),
        )
        for name, (ours, peer, theirs) in milliseconds.items()
    ]
    captures = captures_after_start(bench.base, samples=max(bench.batches))
    rows.append(bench.keep("engine.captures_after_warmup", captures, "captures", better="lower"))
    rows.append(bench.keep("engine.memory_bytes", _memory_bytes(bench), "B", better="lower"))
    return rows


def _memory_bytes(bench: Bench) -> float:
    """The most that this process has held so far, on the device or, without one, in memory."""
    if bench.base.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bench_infer(bench: Bench) -> list[Row]:
    """The public script's settings for the same number of images."""
    infer = measure_infer(bench.base, images=max(bench.batches), repeats=bench.repeats)
    job = job_of(bench.base, samples=max(bench.batches), steps=bench.steps)
    with running(bench.base) as runner:
        ours_s = repeated(lambda: runner.run(job), bench.repeats, bench.base.device)
    ratio = median(infer.seconds) / median(ours_s)
    return [bench.keep("engine.ratio_infer", ratio, "x", peer=infer.peer, ratio=ratio)]


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "swap": bench_swap,
    "rate": bench_rate,
    "mixed": bench_mixed,
    "apart": bench_apart,
    "attention": bench_attention,
    "threads": bench_threads,
    "lane": bench_lane,
    "diffusers": bench_diffusers,
    "infer": bench_infer,
    "service": bench_service,
    "e2e": bench_requests,
    "compiled": bench_compiled,
}


def _told(params: Mapping[str, Any]) -> set[str]:
    """Parameters of which rows' names tell; those of whole requests tell of their sizes."""
    sizes = {"samples", "steps"} if params["parts"] == ("e2e",) else set()
    return {"requests", "matcher", "precision", *sizes, *on_gpu(params)}


@click.command(cls=Measurement, free=_told)
@click.option("--base", "base_name", default="nano", show_default=True, help="As for load_base.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="As for the service; rows of any other have it in their names.",
)
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Default: all."
)
@click.option("--rank", type=click.IntRange(1, 128), help="Of adapters: 32 on nano, else 8.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--samples", type=click.IntRange(min=1), default=4, help="Seeds of a job.")
@click.option("--largest", type=click.IntRange(min=2), default=16, help="Of the batches.")
@click.option("--repeats", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--requests", type=click.IntRange(min=1), default=40, show_default=True)
@click.option(
    "--matcher", default="nano", show_default=True, help="Of the part e2e, LoFTR's weights."
)
@click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), default=ROWS)
def main(
    base_name: str,
    device: str,
    precision: str,
    parts: tuple[str, ...],
    rank: int | None,
    steps: int,
    samples: int,
    largest: int,
    repeats: int,
    requests: int,
    matcher: str,
    rows: Path,
) -> None:
    """Measure swap, engine and service on this machine, and record the rows."""
    console = Console()
    measured: list[Row] = []
    failures: list[str] = []
    try:
        # As the service does it.
        numbers = serving_precision(device, precision)._asdict()
        bench = Bench(
            base=alone(partial(load_base, base_name, device=device, **numbers)),
            variant="" if precision == "auto" else f".{precision}",
            base_name=base_name,
            rank=rank or RANKS.get(base_name, 8),
            batches=tuple(size for size in BATCHES if size <= largest),
            steps=steps,
            samples=samples,
            repeats=repeats,
            requests=requests,
            matcher=matcher,
            rows=rows,
        )
    except (RealFillError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for name in parts or PARTS:
        try:
            with console.status(f"measuring {name}"):
                measured += alone(partial(PARTS[name], bench))
        except (RealFillError, RuntimeError) as error:
            # The other parts are none the worse for it.
            failures.append(f"{name}: {error}")
    if measured:
        console.print(table_of(measured))
    if failures:
        raise click.ClickException("; ".join(failures))


if __name__ == "__main__":
    # Peers too compute in this process.
    begin_as_served()
    main()
