"""The engine's benchmark on a tiny base: every part measures what it says."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.engine.__main__ import main
from benchmarks.engine.adapters import random_adapter, random_capsule
from benchmarks.engine.rates import compare, compare_compiled, fits_pipeline, job_of, loop, pipeline
from benchmarks.engine.swaps import measure_swaps
from benchmarks.engine.timing import quantile, repeated
from benchmarks.record import read_rows
from realfill.capsule import read_capsule
from service.engine import Runner, Swapper
from tests.tiny import save_tiny_base, tiny_base

CPU = torch.device("cpu")
# diffusers' scheduler hands a tensor to numpy.
NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_warm_up_calls_are_made_but_not_counted() -> None:
    """Three calls that count after two that do not, each followed by its clearing up."""
    calls: list[str] = []
    seconds = repeated(
        lambda: calls.append("work"), 3, CPU, warm_up=2, after=lambda: calls.append("after")
    )
    assert len(seconds) == 3
    assert calls == ["work", "after"] * 5
    assert quantile([1.0, 2.0, 3.0], 50) == 2.0


def test_random_capsules_are_sound_and_reach_every_target_module() -> None:
    """They can be read for their base, and are as large as trained ones."""
    base = tiny_base()
    read = read_capsule(random_capsule(base, "bench", rank=4, seed=0), base)
    assert set(read.adapter.factors) == set(Swapper(base.unet, base.adapter_modules).module_paths)


def test_the_swap_is_compared_with_diffusers_on_equal_models() -> None:
    """Both ways give the same predictions, and the U-Net is plain again afterwards."""
    base = tiny_base()
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    swaps = measure_swaps(base, rank=2, repeats=4, peer_repeats=2)
    assert len(swaps.ours_s) == 4
    assert len(swaps.peer_s) == 2
    assert len(swaps.bring_s) == 10
    assert len(swaps.merge_s) == 4
    assert swaps.difference < 0.01
    after = base.unet.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@NUMPY
def test_the_loop_of_diffusers_samples_what_the_engine_samples() -> None:
    """From the same seeds, one image at a time or in a batch, up to rounding."""
    base = tiny_base()
    job = job_of(base, samples=2, steps=3)
    ours = Runner(base).run(job).samples
    for batch in (1, 2):
        assert torch.allclose(loop(base, job, batch=batch), ours, atol=1e-3)


@NUMPY
def test_the_pipeline_is_the_peer_where_it_takes_the_base() -> None:
    """A base of four latent channels fits; the job has one comparison with each peer."""
    base = tiny_base()
    assert fits_pipeline(base)
    assert pipeline(base, job_of(base, samples=2, steps=2))().shape == (2, 3, 32, 32)
    peers = [of.peer for of in compare(base, samples=2, steps=2, repeats=1)]
    assert "StableDiffusionInpaintPipeline" in peers[0]
    assert peers[1].endswith("one batch")


@NUMPY
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_the_command_records_its_rows(tmp_path: Path) -> None:
    """Every part but the server's, from the command line."""
    words = ["--base", str(save_tiny_base(tmp_path / "base")), "--rows", str(tmp_path / "rows")]
    words += ["--steps", "1", "--samples", "2", "--repeats", "1", "--rank", "2"]
    words += ["--largest", "4"]
    parts = ("swap", "rate", "mixed", "apart", "attention", "threads", "lane", "diffusers", "infer")
    for part in parts:
        words += ["--part", part]
    answer = CliRunner().invoke(main, words, catch_exceptions=False)
    assert answer.exit_code == 0
    rows = {row.name: row for row in read_rows(tmp_path / "rows")}
    assert rows["swap.ratio_load_lora"].ratio == rows["swap.ratio_load_lora"].value
    assert rows["swap.p50_ms"].peer_value is not None
    assert rows["swap.ratio_hotswap"].value > 0
    assert rows["engine.join_p50_ms"].peer_value is not None
    assert {
        "engine.sample_steps_per_s.b4",
        "engine.peak_flops_pct.b4",
        "engine.mixed_overhead_pct",
        "engine.mixed_overhead_pct.paper",
        "engine.apart_ms.s2",
        "engine.attention_step_ms.sdpa",
        "engine.peft_mixed_overhead_pct",
        "engine.idle_team_pct.one",
        "engine.idle_team_pct.mixed",
        "engine.lone_overhead_pct",
        "engine.first_candidate_p50_ms",
        "engine.memory_bytes",
        "engine.ratio_diffusers",
        "engine.ratio_infer",
        "swap.bring_p50_ms",
        "swap.merge_p50_ms",
    } <= set(rows)


@pytest.mark.slow
@NUMPY
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_the_compiled_loop_samples_what_the_plain_one_samples() -> None:
    """The peer is a fair one: it draws the same pictures, and compiling is timed apart."""
    base = tiny_base()
    job = job_of(base, samples=2, steps=2)
    compiled = replace(base, unet=torch.compile(copy.deepcopy(base.unet)))
    assert torch.allclose(loop(compiled, job, batch=2), loop(base, job, batch=2), atol=1e-3)
    found = compare_compiled(base, samples=2, steps=1, repeats=2)
    assert found.compile_s > max(found.comparison.peer_s)
    assert len(found.comparison.ours_s) == 2


@pytest.mark.slow
def test_the_overhead_is_measured_on_a_real_server(tmp_path: Path) -> None:
    """A request takes longer than its job alone."""
    words = ["--base", str(save_tiny_base(tmp_path / "base")), "--rows", str(tmp_path / "rows")]
    words += ["--part", "service", "--requests", "5", "--rank", "2"]
    answer = CliRunner().invoke(main, words, catch_exceptions=False)
    assert answer.exit_code == 0
    rows = {row.name: row for row in read_rows(tmp_path / "rows")}
    assert rows["service.overhead_p50_ms"].value > 0
    assert rows["service.request_p50_ms.photo"].ratio is not None


@pytest.mark.slow
@NUMPY
def test_whole_requests_are_measured_on_a_real_server(tmp_path: Path) -> None:
    """Ranked by a matcher, beside both peers, and by stage."""
    words = ["--base", str(save_tiny_base(tmp_path / "base")), "--rows", str(tmp_path / "rows")]
    words += ["--part", "e2e", "--samples", "2", "--steps", "2", "--repeats", "2", "--rank", "2"]
    answer = CliRunner().invoke(main, words, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    rows = {row.name: row for row in read_rows(tmp_path / "rows")}
    assert rows["e2e.p50_s.2x2"].peer_value is not None
    assert rows["e2e.rank_p50_ms.2x2"].value > 0
    stages = ("read", "sample", "decode", "rank", "encode")
    total = sum(rows[f"e2e.{stage}_p50_ms.2x2"].value for stage in stages)
    assert total < 1.2 * 1000 * rows["e2e.p50_s.2x2"].value
    assert rows["e2e.ratio_infer.2x2"].value > rows["e2e.ratio_batched.2x2"].value


def test_random_adapters_differ_by_seed() -> None:
    """Swapping between two of them writes every weight anew."""
    base = tiny_base()
    first, second = (random_adapter(base, rank=2, seed=seed) for seed in range(2))
    path = next(iter(first.factors))
    assert not torch.equal(first.factors[path][0], second.factors[path][0])
