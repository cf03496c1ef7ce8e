"""The kernel of match_count finds the definition's matches, interpreted and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.launch import interpreted
from kernels.match_count import match_count
from kernels.match_count.reference import match_count_reference
from tests.kernels.interpreter import assert_passes_in_the_interpreter, in_interpreter

pytest.importorskip("triton", reason="Triton is there on Linux only")

SIZES = [(1, 1, 1), (1, 63, 16), (63, 341, 5), (341, 63, 64), (128, 130, 33)]
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def test_kernel_equals_reference_in_the_interpreter() -> None:
    """All tests of this file for the interpreter pass in a process that was started with it on."""
    assert_passes_in_the_interpreter(__file__)


@pytest.mark.skipif(interpreted(), reason="a process that interprets cannot compile")
@pytest.mark.parametrize("name", ["_log_sums", "_best"])
def test_kernel_compiles_for_hopper_without_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler accepts the kernels, which the interpreter alone does not prove."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.match_count import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "ROWS": kernel.BLOCK_ROWS,
        "COLUMNS": kernel.BLOCK_COLUMNS,
        "CHANNELS": kernel.BLOCK_CHANNELS,
    }
    numbers = {"n_rows": "i32", "n_columns": "i32", "n_channels": "i32", "scale": "fp32"}
    floats = {"log_rows": "*fp32", "log_columns": "*fp32", "row_best": "*fp32"}
    types = {"tokens0": "*fp32", "tokens1": "*fp32", **floats, "partner": "*i64"}
    types |= {"column_best": "*fp32", **numbers, **dict.fromkeys(constants, "constexpr")}
    function = getattr(kernel, name)
    compiled = triton.compile(
        ASTSource(function, {k: types[k] for k in function.arg_names}, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
    )
    # Products in float32, not in the shorter tf32.
    assert "fma.rn.f32" in compiled.asm["ptx"]
    assert "tf32" not in compiled.asm["ptx"]


def cells(
    rows: int, columns: int, channels: int, *, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Two images of two pairs, of which some cells are alike but for noise. [2, cells, C]"""
    generator = torch.Generator().manual_seed(rows * 1000 + columns + channels)

    def draw(count: int) -> Tensor:
        return torch.randn((2, count, channels), generator=generator, dtype=torch.float64)

    tokens0, tokens1 = draw(rows), draw(columns)
    shared = min(rows, columns) // 2
    tokens1[:, :shared] = tokens0[:, :shared] + 0.1 * draw(shared)
    return tokens0.to(device, dtype), tokens1.to(device, dtype)


def assert_matches_are_those_of_float64(tokens0: Tensor, tokens1: Tensor, scale: float) -> None:
    """Equal matches; confidences within twice the reference's error plus one epsilon."""
    confidence, partner = match_count(tokens0, tokens1, scale=scale, threshold=0.05)
    exact, truth = match_count_reference(tokens0.double(), tokens1.double(), scale, 0.05)
    near, _ = match_count_reference(tokens0, tokens1, scale, 0.05)
    assert (exact > 0).any()
    assert torch.equal(confidence > 0, exact > 0)
    assert torch.equal(partner[exact > 0], truth[exact > 0])
    error = (near.double() - exact).abs().max()
    # A logit of tens carries an error of that many epsilons into the exponent.
    epsilon = 64 * torch.finfo(torch.float32).eps
    assert float((confidence.double() - exact).abs().max()) <= float(2 * error + epsilon)


@in_interpreter
@pytest.mark.parametrize(("rows", "columns", "channels"), SIZES)
def test_matches_in_the_interpreter(rows: int, columns: int, channels: int) -> None:
    """Awkward sizes, many tiles and few, match as the materialised definition in float64."""
    tokens = cells(rows, columns, channels, device="cpu", dtype=torch.float32)
    assert_matches_are_those_of_float64(*tokens, scale=10 / channels**0.5)


@in_interpreter
def test_ties_in_the_interpreter() -> None:
    """A row takes the first of equal columns, and equal rows are all matched, across tiles too."""
    alike = torch.zeros(1, 150, 16)
    alike[0, :, 0] = 1
    alike[0, 5, 0], alike[0, 5, 1] = 0, 1
    other = alike.clone()
    other[0, 100:] = 0
    other[0, 100:, 2] = 1
    confidence, partner = match_count(alike, other, scale=200.0, threshold=0.0)
    truth = match_count_reference(alike.double(), other.double(), 200.0, 0.0)
    assert torch.equal(partner, truth[1])
    assert partner.unique().tolist() == [0, 5]
    assert (confidence > 0).all()
    torch.testing.assert_close(confidence.double(), truth[0])


@in_interpreter
def test_half_precision_and_views_in_the_interpreter() -> None:
    """Tokens in half precision that are not contiguous are read as they are."""
    tokens0, tokens1 = cells(20, 30, 8, device="cpu", dtype=torch.float16)
    views = tokens0.transpose(1, 2).contiguous().transpose(1, 2), tokens1
    assert not views[0].is_contiguous()
    assert_matches_are_those_of_float64(*views, scale=2.0)


# The interpreter computes in numpy, which warns of NaN.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@in_interpreter
def test_no_number_and_no_pair_in_the_interpreter() -> None:
    """NaN gives no match and stays within its pair; no pair at all gives nothing."""
    tokens0, tokens1 = cells(20, 30, 8, device="cpu", dtype=torch.float32)
    alone = match_count(tokens0[1:], tokens1[1:], scale=2.0, threshold=0.05)
    tokens0[0] = torch.nan
    confidence, _ = match_count(tokens0, tokens1, scale=2.0, threshold=0.05)
    assert confidence[0].tolist() == [0.0] * 20
    assert torch.equal(confidence[1:], alone[0])
    assert match_count(tokens0[:0], tokens1[:0], scale=1.0, threshold=0.2)[0].shape == (0, 20)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns", "channels"), [*SIZES, (4096, 4000, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_on_a_gpu(rows: int, columns: int, channels: int, dtype: torch.dtype) -> None:
    """Compiled, in every type, matches are the definition's, and the same every time."""
    tokens = cells(rows, columns, channels, device="cuda", dtype=dtype)
    scale = 10 / channels**0.5
    assert_matches_are_those_of_float64(*tokens, scale=scale)
    again = [match_count(*tokens, scale=scale, threshold=0.05) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0])


@pytest.mark.gpu
def test_a_pair_at_512_px_needs_megabytes_on_a_gpu() -> None:
    """4096 cells on either side leave no matrix behind."""
    tokens = cells(4096, 4096, 256, device="cuda", dtype=torch.float32)
    match_count(*tokens, scale=0.5, threshold=0.2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    match_count(*tokens, scale=0.5, threshold=0.2)
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**20
