"""A part of the engine's benchmark that fails leaves a plain base to the parts after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from benchmarks.engine import __main__ as parts
from benchmarks.engine import mixing, peers, rates, swaps
from benchmarks.engine.adapters import random_adapter
from benchmarks.engine.attention import measure_attention
from benchmarks.engine.bench import Bench
from benchmarks.engine.mixing import measure_apart, measure_mixing, measure_waits
from benchmarks.engine.peers import Extrapolation
from realfill.base import Base
from service.engine import Engine, Job, Runner, Sampled, Swapper
from tests.tiny import tiny_base


def bench_infer(base: Base) -> None:
    bench = Bench(
        base=base,
        base_name="tiny",
        rank=2,
        batches=(1,),
        steps=1,
        samples=1,
        repeats=1,
        requests=1,
        matcher="nano",
        rows=Path("never written"),
    )
    parts.bench_infer(bench)


MEASURES: dict[str, Callable[[Base], object]] = {
    "mixing": lambda base: measure_mixing(base, scenes=2, samples=2, rank=2, repeats=1),
    "no room": lambda base: measure_mixing(base, scenes=2, samples=2, rank=2, repeats=1),
    "apart": lambda base: measure_apart(base, scenes=2, samples=2, rank=2, repeats=1),
    "attention": lambda base: measure_attention(base, samples=2, rank=2, repeats=1),
    "rate": lambda base: rates.sample_steps_per_s(base, 1, steps=1, repeats=1),
    "diffusers": lambda base: rates.compare(base, samples=1, steps=1, repeats=1),
    "compiled": lambda base: rates.compare_compiled(base, samples=1, steps=1, repeats=1),
    "swap": lambda base: swaps.measure_swaps(base, rank=2, repeats=1, peer_repeats=1),
    "infer": bench_infer,
}


def fails(*args: object, **details: object) -> None:
    raise RuntimeError("no luck")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("name", MEASURES)
def test_a_part_that_fails_gives_its_base_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the layers stay the runner's own, and the next part measures something else."""
    released: list[Runner] = []
    release = Runner.release

    def noted(runner: Runner) -> None:
        released.append(runner)
        release(runner)

    monkeypatch.setattr(Runner, "release", noted)
    monkeypatch.setattr(Runner, "run", fails)
    monkeypatch.setattr(Runner, "begin" if name == "no room" else "step", fails)
    monkeypatch.setattr(rates, "loop", fails)
    monkeypatch.setattr(swaps, "seconds_of", fails)
    monkeypatch.setattr(parts, "measure_infer", lambda *a, **k: Extrapolation("peer", [1.0]))
    with pytest.raises(RuntimeError, match="no luck"):
        MEASURES[name](tiny_base())
    assert len(released) == 1


SWAPS: dict[str, Callable[[Base], object]] = {
    "merge": lambda base: swaps._merged(base, {"1" * 64: random_adapter(base, rank=2, seed=1)}, 1),
    "PEFT": lambda base: peers.measure_mixed(base, batch=2, rank=2, repeats=1),
}


@pytest.mark.parametrize("name", SWAPS)
def test_a_swap_that_fails_is_taken_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are the base's again, though timing them went wrong."""
    applied: list[str | None] = []
    apply = Swapper.apply

    def noted(swapper: Swapper, digest: str | None, adapter: object) -> None:
        applied.append(digest)
        apply(swapper, digest, adapter)  # type: ignore[arg-type]

    def fails_on_a_scene(work: Callable[[], object], *args: object, **details: object) -> None:
        work()
        fails()

    monkeypatch.setattr(Swapper, "apply", noted)
    for module in (swaps, peers):
        monkeypatch.setattr(module, "repeated", fails_on_a_scene)
    with pytest.raises(RuntimeError, match="no luck"):
        SWAPS[name](tiny_base())
    assert applied[-1] is None
    assert applied[-2] is not None


def test_waits_beside_a_job_that_is_over_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle lane would pass for a busy one; more steps than the job has are refused at once."""
    base = tiny_base()
    with pytest.raises(RuntimeError, match=r"takes 809 steps .* have 800: give fewer"):
        measure_waits(base, samples=1, steps=200, repeats=4)
    monkeypatch.setattr(mixing, "MANY_STEPS", 20)
    submit = Engine.submit

    def late(engine: Engine, job: Job) -> Future[Sampled]:
        if len(job.seeds) == 1 and job.on_step is not None:
            # Until the large job has made its steps.
            time.sleep(1.5)
        return submit(engine, job)

    monkeypatch.setattr(Engine, "submit", late)
    with pytest.raises(RuntimeError, match="was over before"):
        measure_waits(base, samples=2, steps=1, repeats=2)


def test_more_steps_than_a_sample_has_are_refused() -> None:
    """On a CPU once for each timing, and twice where weights are merged in place."""
    base = tiny_base()
    with pytest.raises(RuntimeError, match=r"takes 801 steps .* have 800"):
        measure_mixing(base, scenes=1, samples=1, rank=2, repeats=800)
    with pytest.raises(RuntimeError, match=r"takes 802 steps .* have 800"):
        measure_mixing(base, scenes=1, samples=1, rank=2, repeats=401, application="segmented")
    with pytest.raises(RuntimeError, match=r"takes 801 steps .* have 800"):
        measure_attention(base, samples=1, rank=2, repeats=800)
