"""One run from its conditions to its report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from benchmarks.load.driver import Payload, Sample, drive, warm_up
from benchmarks.load.plan import arrivals
from benchmarks.load.report import Conditions, summarize, table, write


def run(conditions: Conditions, payloads: Mapping[str, Payload], out: Path) -> list[Sample]:
    """Draw the plan, drive it, write the report and print its table."""
    plan = arrivals(
        conditions.scenes,
        rate_per_s=conditions.rate_per_s,
        duration_s=conditions.duration_s,
        zipf_s=conditions.zipf_s,
        seed=conditions.seed,
    )
    console = Console()
    asyncio.run(
        warm_up(conditions.url, payloads, times=conditions.warmup, timeout_s=conditions.timeout_s)
    )
    cpu = time.process_time()
    with Progress(console=console) as progress:
        task = progress.add_task(f"{len(plan)} requests", total=len(plan))
        samples = asyncio.run(
            drive(
                conditions.url,
                plan,
                payloads,
                timeout_s=conditions.timeout_s,
                on_sample=lambda _: progress.advance(task),
            )
        )
    summary = summarize(samples, conditions, cpu_s=time.process_time() - cpu)
    write(out, samples, summary)
    console.print(table(summary))
    click.echo(f"Report and raw samples: {out}")
    return samples
