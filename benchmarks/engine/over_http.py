"""Parts of the engine's benchmark that ask a real server, whose packages the others do without."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from benchmarks.engine.bench import Bench
from benchmarks.engine.peers import measure_infer
from benchmarks.engine.timing import quantile
from benchmarks.record import Row


def bench_service(bench: Bench) -> list[Row]:
    """What a request takes beyond its job on the engine."""
    from benchmarks.engine.service import PEER, measure_overhead

    with tempfile.TemporaryDirectory(prefix="realfill-bench-") as folder:
        overheads = measure_overhead(
            bench.base, bench.base_name, Path(folder), requests=bench.requests, rank=bench.rank
        )
    rows = []
    for image, overhead in overheads.items():
        p50 = median(overhead.request_s) - median(overhead.engine_s)
        name = "service.overhead_p50_ms" + ("" if image == "square" else f".{image}")
        rows.append(bench.keep(name, 1000 * p50, "ms", better="lower", peer=PEER))
        rows.append(
            bench.keep(
                f"service.request_p50_ms.{image}",
                1000 * median(overhead.request_s),
                "ms",
                better="lower",
                peer=PEER,
                peer_value=1000 * median(overhead.engine_s),
            )
        )
    return rows


def bench_requests(bench: Bench) -> list[Row]:
    """Whole requests with ranking, beside diffusers with naive ranking and the public script."""
    from benchmarks.engine.requests import PEER, measure_requests

    with tempfile.TemporaryDirectory(prefix="realfill-bench-") as folder:
        measured = measure_requests(
            bench.base,
            bench.base_name,
            Path(folder),
            samples=bench.samples,
            steps=bench.steps,
            repeats=bench.repeats,
            rank=bench.rank,
            matcher=bench.matcher,
        )
    kind = f"{bench.samples}x{bench.steps}"
    if bench.matcher != "nano":
        kind += f".{Path(bench.matcher).stem}"
    peer_s = [sum(both) for both in zip(measured.drawn_s, measured.ranked_s, strict=True)]
    rows = [
        bench.keep(
            f"e2e.p{percent}_s.{kind}",
            quantile(measured.request_s, percent),
            "s",
            better="lower",
            peer=PEER,
            peer_value=quantile(peer_s, percent),
        )
        for percent in (20, 50, 80)
    ]
    for stage in measured.stages_ms[0]:
        value = median(stages[stage] for stages in measured.stages_ms)
        rows.append(bench.keep(f"e2e.{stage}_p50_ms.{kind}", value, "ms", better="lower"))
    ours_s = median(measured.request_s)
    ratio = median(peer_s) / ours_s
    rows.append(bench.keep(f"e2e.ratio_batched.{kind}", ratio, "x", peer=PEER, ratio=ratio))
    infer = measure_infer(bench.base, images=bench.samples, repeats=2)
    ratio = (median(infer.seconds) + median(measured.ranked_s)) / ours_s
    peer = f"{infer.peer}; then kornia's LoFTR pair by pair"
    rows.append(bench.keep(f"e2e.ratio_infer.{kind}", ratio, "x", peer=peer, ratio=ratio))
    return rows
