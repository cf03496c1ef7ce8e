"""The benchmark of the kernels: what is timed agrees with torch, and rows say what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks.kernels.__main__ import main
from benchmarks.kernels.cases import CASES, SIZES, Maker
from benchmarks.kernels.contest import COPY, EAGER, PRODUCT, Case, Timings, contest
from benchmarks.record import read_rows

CPU = torch.device("cpu")
MAKER = Maker(CPU, torch.float32, 2, SIZES["cpu"])


def doubling(factor: float = 2.0) -> Case:
    """A case of 1000 values that torch doubles, and our op multiplies by a factor."""

    def ours(x: Tensor) -> Tensor:
        return x * factor

    def peer(x: Tensor) -> Tensor:
        return x * 2.0

    return Case(
        "doubling", "x1000", ours, peer, lambda: (torch.ones(1000),), 8000, 0, torch.float32
    )


@pytest.mark.parametrize("op", list(CASES))
def test_every_case_agrees_with_torch_and_is_timed(op: str) -> None:
    """Each size of each op, ours and eager as often as asked for."""
    for case in CASES[op](MAKER):
        timings = contest(case, CPU, repeats=2, product_flops=1e9, compiled=False)
        assert len(timings.ours_s) == len(timings.peers_s[EAGER]) == len(timings.copy_s) == 2
        assert case.moved_bytes > 0


def test_what_calculates_something_else_is_not_timed() -> None:
    """A fast op with a wrong outcome has no time worth knowing."""
    with pytest.raises(RuntimeError, match=r"doubling x1000 by our op is 0\.1 from torch"):
        contest(doubling(2.1), CPU, repeats=1, product_flops=1e9, compiled=False)
    with pytest.raises(RuntimeError, match="mend it"):
        contest(doubling(float("nan")), CPU, repeats=1, product_flops=1e9, compiled=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_that_fails_is_left_out_with_a_sentence() -> None:
    """Where inductor finds no compiler, eager remains the peer."""
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        timings = contest(doubling(), CPU, repeats=1, product_flops=1e9)
    assert list(timings.peers_s) == [EAGER]
    assert len(timings.skipped) == 1
    assert timings.skipped[0].startswith("doubling x1000 without torch.compile: ")


def test_the_limit_is_the_slower_of_copy_and_product() -> None:
    """8000 bytes copied in 2 us, and a million flops at 1e12 per second, which take 1 us."""
    timings = Timings(replace(doubling(), flops=10**6), [4e-6], {}, [2e-6], 1e12)
    assert timings.limit == (COPY, 2e-6)
    assert replace(timings, product_flops=1e11).limit == (PRODUCT, 1e-5)
    assert timings.gb_per_s(timings.ours_s) == pytest.approx(2.0)


def test_the_command_records_its_rows(tmp_path: Path) -> None:
    """Percentiles beside torch, bytes, bandwidth and share of the limit, in agreement."""
    words = ["--batch", "2", "--repeats", "3", "--no-compile", "--op", "sampler_step"]
    words += ["--op", "segmented_lora", "--rows", str(tmp_path / "rows")]
    answer = CliRunner().invoke(main, words, catch_exceptions=False)
    assert answer.exit_code == 0
    assert "of copy" in answer.output
    rows = {row.name: row for row in read_rows(tmp_path / "rows")}
    stem = "kernels.segmented_lora.linear128x16"
    p20, p50, p80 = (rows[f"{stem}_p{percent}_ms"].value for percent in (20, 50, 80))
    assert 0 < p20 <= p50 <= p80
    assert rows[f"{stem}_p50_ms"].peer == EAGER
    # x once, out twice, and both factors of both samples.
    moved = 4 * 2 * 128 * (3 * 256 + 2 * 32)
    assert rows[f"{stem}_moved_mb"].value == moved / 1e6
    assert rows[f"{stem}_gb_per_s"].value == pytest.approx(moved / (p50 / 1000) / 1e9)
    assert rows["kernels.sampler_step.step_limit_pct"].peer == COPY


def test_without_a_gpu_the_command_says_so() -> None:
    """One sentence instead of a trace."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    answer = CliRunner().invoke(main, ["--device", "cuda"])
    assert answer.exit_code == 1
    assert "use --device cpu" in answer.output
