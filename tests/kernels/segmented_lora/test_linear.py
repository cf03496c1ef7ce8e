"""A linear layer with its terms: in torch, in Triton's interpreter, for Hopper and on a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.launch import interpreted
from kernels.segmented_lora import MAX_FUSED_RANK, segmented_linear
from tests.kernels.interpreter import assert_passes_in_the_interpreter, in_interpreter

pytest.importorskip("triton", reason="Triton is there on Linux only")
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

# Tokens, in, out.
SIZES = [(1, 63, 341), (63, 341, 1), (100, 1, 63), (70, 48, 130), (150, 80, 336)]
# What SD2's attention has at 64x64 latents.
SD2_SIZES = [
    (4096, 320, 320),
    (1024, 640, 640),
    (256, 1280, 1280),
    (64, 1280, 1280),
    (77, 1024, 320),
    (77, 1024, 1280),
]
RANKS = [16, 1, 17, 32, 16]
SLOTS = [2, -1, 0, 2]


def test_kernel_equals_float64_in_the_interpreter() -> None:
    """The tests of this file that are marked so pass in the interpreter."""
    assert_passes_in_the_interpreter(__file__)


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def layer(
    tokens: int, depth: int, columns: int, rank: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Any]:
    """Four samples, a layer, three slots of one packed buffer: outcomes and terms are about 1."""
    row = rank * (depth + columns)
    packed = draw(rank, 3, row + 16)
    packed[:, : rank * depth] /= depth**0.5
    packed[:, rank * depth : row] /= rank**0.5
    packed = packed.to(device, dtype)
    return {
        "x": draw(1, 4, tokens, depth).to(device, dtype),
        "weight": (draw(2, columns, depth) / depth**0.5).to(device, dtype),
        "bias": draw(3, columns).to(device, dtype),
        "lora_A": packed[:, : rank * depth].unflatten(1, (rank, depth)),
        "lora_B": packed[:, rank * depth : row].unflatten(1, (columns, rank)),
        "slots": torch.tensor(SLOTS, device=device),
        "scales": torch.tensor([2.0, 0.5, -1.0], device=device),
    }


def assert_rounded_once(out: Tensor, given: dict[str, Any]) -> None:
    """Off from float64 by no more than its sums and roundings explain, value by value.

    A sum of n terms in float32 is off by n epsilons of their magnitudes at most. What lies between
    the factors keeps ten bits of half precision. A layer and its term that are added in half
    precision, as those of wide ranks are, are rounded twice.
    """
    x, weight, lora_A, lora_B = (
        given[name].double() for name in ("x", "weight", "lora_A", "lora_B")
    )
    wanted, magnitude = x @ weight.T, x.abs() @ weight.T.abs()
    if given["bias"] is not None:
        wanted += given["bias"].double()
        magnitude += given["bias"].double().abs()
    plain, shortened = wanted.clone(), torch.zeros_like(wanted)
    for n, slot in enumerate(given["slots"].tolist()):
        if slot >= 0:
            scale = float(given["scales"][slot])
            down = x[n] @ lora_A[slot].T
            wanted[n] += scale * down @ lora_B[slot].T
            shortened[n] = abs(scale) * down.abs() @ lora_B[slot].T.abs()
            wide = x[n].abs() @ lora_A[slot].T.abs()
            magnitude[n] += abs(scale) * wide @ lora_B[slot].T.abs()
    half = out.dtype != torch.float32
    roundings = wanted.abs()
    if given["lora_A"].shape[1] > MAX_FUSED_RANK:
        roundings = roundings + plain.abs()
    bound = torch.finfo(out.dtype).eps / 2 * roundings
    bound += (sum(lora_A.shape[1:]) + 4) * torch.finfo(torch.float32).eps * magnitude
    bound += half * 2.0**-10 * shortened
    assert bool(((out.double() - wanted).abs() <= 1.01 * bound).all())


def rows_of(given: dict[str, Any], samples: list[int]) -> dict[str, Any]:
    """The same layer with some of the samples."""
    return {**given, "x": given["x"][samples], "slots": given["slots"][samples]}


def assert_a_sample_is_the_same_anywhere(given: dict[str, Any]) -> None:
    """Alone, at another place, beside none with an adapter: the same bits."""
    together = segmented_linear(**given)
    for samples in ([3], [1], [3, 1, 0, 2], [2, 2]):
        assert torch.equal(segmented_linear(**rows_of(given, samples)), together[samples])
    slots = given["slots"].clone()
    slots[[0, 2]] = -1
    assert torch.equal(segmented_linear(**{**given, "slots": slots})[[1, 3]], together[[1, 3]])


def assert_only_its_own_slot_counts(given: dict[str, Any]) -> None:
    """Without an adapter it is the plain layer, whatever slots hold; wrong slots give NaN."""
    from kernels.segmented_lora.linear import segmented_linear_kernel

    none = {**given, "slots": torch.full_like(given["slots"], -1)}
    plain = segmented_linear_kernel(**none)
    assert_rounded_once(plain, none)
    spoilt = {name: given[name] + torch.nan for name in ("lora_A", "lora_B")}
    assert torch.equal(segmented_linear_kernel(**{**none, **spoilt}), plain)
    wrong = torch.tensor([-2, -1, 3, 0], device=given["slots"].device)
    out = segmented_linear_kernel(**{**given, "slots": wrong})
    assert out[[0, 2]].isnan().all()
    assert torch.equal(out[1], plain[1])
    assert out[3].isfinite().all()


@pytest.mark.skipif(interpreted(), reason="about the reference")
@pytest.mark.parametrize(("tokens", "depth", "columns"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_on_a_cpu(tokens: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    """The reference, with and without a bias; factors may be of another type than the layer."""
    given = layer(tokens, depth, columns, 16, dtype)
    assert_rounded_once(segmented_linear(**given), given)
    mixed = {name: given[name].float() for name in ("lora_A", "lora_B")}
    given = {**given, **mixed, "bias": None}
    out = segmented_linear(**given)
    assert (out.dtype, out.shape) == (dtype, (4, tokens, columns))
    assert_rounded_once(out, given)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": torch.ones(12, 3)}, r"pass \[N, T, in\] and \[out, in\]"),
        ({"weight": torch.ones(5, 4)}, r"weight \(5, 4\); pass"),
        ({"bias": torch.ones(4)}, r"bias is \(4,\); pass \[out\], here \(5,\), or None"),
        ({"weight": torch.ones(5, 3).half()}, "weight is torch.float16 and x torch.float32"),
        ({"bias": torch.ones(5, device="meta")}, "bias is on meta, but x on cpu; move it"),
        ({"lora_A": torch.ones(2, 16, 5)}, r"pass \[L, R, 3\]"),
        ({"slots": torch.tensor([0, 2, 0])}, "slot 2 is out of range; use -1 to 1"),
        (
            {
                "lora_A": torch.ones(0, 16, 3),
                "lora_B": torch.ones(0, 5, 16),
                "slots": torch.full((3,), -1),
                "scales": torch.ones(0),
            },
            "lora_A has no slot",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    """Each fault is named with the value and what to pass."""
    arguments: dict[str, Any] = {
        "x": torch.ones(3, 4, 3),
        "weight": torch.ones(5, 3),
        "bias": None,
        "lora_A": torch.ones(2, 16, 3),
        "lora_B": torch.ones(2, 5, 16),
        "slots": torch.tensor([0, 1, -1]),
        "scales": torch.ones(2),
    }
    with pytest.raises(ValueError, match=says):
        segmented_linear(**{**arguments, **changes})


def test_empty_batches_give_empty_outcomes() -> None:
    """No sample, or no token, is no work."""
    given = layer(4, 3, 5, 16, torch.float32)
    assert segmented_linear(**{**given, "x": torch.zeros(4, 0, 3)}).shape == (4, 0, 5)
    assert segmented_linear(**rows_of(given, [])).shape == (0, 4, 5)


@in_interpreter
@pytest.mark.parametrize(
    ("tokens", "depth", "columns", "rank"),
    [(*sizes, rank) for sizes, rank in zip(SIZES, RANKS, strict=True)],
)
def test_layers_in_the_interpreter(tokens: int, depth: int, columns: int, rank: int) -> None:
    """Awkward sizes and ranks, with and without a bias, and a transposed input."""
    given = layer(tokens, depth, columns, rank, torch.float32)
    assert_rounded_once(segmented_linear(**given), given)
    turned = given["x"].transpose(1, 2).contiguous().transpose(1, 2)
    given = {**given, "bias": None, "x": turned}
    assert_rounded_once(segmented_linear(**given), given)


@in_interpreter
def test_every_tile_in_the_interpreter() -> None:
    """The tiles of half precision compute the same layer."""
    from kernels.segmented_lora.linear import TILES, segmented_linear_kernel

    given = layer(150, 70, 330, 16, torch.float32)
    for tile in TILES.values():
        assert_rounded_once(segmented_linear_kernel(**given, tile=tile), given)


@in_interpreter
def test_a_sample_is_the_same_anywhere_in_the_interpreter() -> None:
    """Alone, among others, at another place: the same bits."""
    assert_a_sample_is_the_same_anywhere(layer(40, 48, 70, 16, torch.float32))


@in_interpreter
def test_only_its_own_slot_counts_in_the_interpreter() -> None:
    """Slot -1 is the plain layer beside anything, and a wrong slot is not another scene's."""
    assert_only_its_own_slot_counts(layer(40, 48, 70, 16, torch.float32))


def compiled_for(capability: int, tile: Any, half: str, **fixed: Any) -> Any:
    """The kernel as a launch on SD2's layers compiles it, where all sizes are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.segmented_lora import linear

    fixed |= {"TOKENS": tile.tokens, "COLUMNS": tile.columns, "TAIL": tile.tail}
    fixed |= {"DEPTH": tile.depth, "PRECISION": "tf32", "EVEN": True}
    fixed |= dict.fromkeys(("x_depth", "w_depth", "a_depth", "b_rank"), 1)
    pointers = dict.fromkeys(("out", "x", "weight", "bias", "lora_A", "lora_B"), f"*{half}")
    pointers |= {"slots": "*i64", "scales": "*fp32"}
    names = linear._linear.arg_names
    types = {n: "constexpr" if n in fixed else pointers.get(n, "i32") for n in names}
    sixteenths = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(names) if n not in fixed}
    return triton.compile(
        ASTSource(linear._linear, types, constexprs=fixed, attrs=sixteenths),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )


@pytest.mark.skipif(interpreted(), reason="a process that interprets cannot compile")
@pytest.mark.parametrize(
    ("half", "fixed"),
    [
        ("bf16", {"RANK": 16}),
        ("bf16", {"RANK": 32, "bias": None}),
        ("fp16", {"RANK": 16, "n_tokens": 1, "n_columns": 1, "depth": 1, "rank": 1, "n_slots": 1}),
    ],
)
def test_the_kernel_compiles_for_hopper_without_a_gpu(
    half: str, fixed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products run on the units that are asynchronous, loads beside them; no register is spilled.

    Sizes of 1 are constants to the compiler, for which the bare kernel must be right too.
    """
    import triton

    from kernels.segmented_lora.linear import TILES

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for tile in TILES.values():
        compiled = compiled_for(90, tile, half, **fixed)
        ptx = compiled.asm["ptx"]
        if "depth" not in fixed:
            assert f"wgmma.mma_async.sync.aligned.m64n{tile.columns}k16" in ptx
            assert f"wgmma.mma_async.sync.aligned.m64n{fixed['RANK']}k16" in ptx
            assert "cp.async.cg" in ptx
        assert compiled.metadata.shared <= 227 * 1024
        (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", tmp_path / "cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert " STACK:0 " in usage.stdout
        assert " LOCAL:0 " in usage.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "depth", "columns", "rank"),
    [(*sizes, 16) for sizes in [*SIZES, *SD2_SIZES]]
    + [(*sizes, rank) for sizes in (SIZES[3], SD2_SIZES[1]) for rank in (17, 32, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_on_a_gpu(
    tokens: int, depth: int, columns: int, rank: int, dtype: torch.dtype
) -> None:
    """Compiled, in every type, rounded once; of a transposed input the same bits."""
    given = layer(tokens, depth, columns, rank, dtype, "cuda")
    if depth != columns:
        given["bias"] = None
    out = segmented_linear(**given)
    assert_rounded_once(out, given)
    given["x"] = given["x"].transpose(1, 2).contiguous().transpose(1, 2)
    if rank <= MAX_FUSED_RANK and dtype != torch.float32:
        assert torch.equal(segmented_linear(**given), out)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "depth", "columns"), [*SIZES, *SD2_SIZES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sample_is_the_same_anywhere_on_a_gpu(
    tokens: int, depth: int, columns: int, dtype: torch.dtype
) -> None:
    """The same bits at every place, and only its own slot counts."""
    given = layer(tokens, depth, columns, 16, dtype, "cuda")
    if depth != columns:
        given["bias"] = None
    assert_a_sample_is_the_same_anywhere(given)
    assert_only_its_own_slot_counts(given)


# Bytes of shared memory that one program may have, by CUDA's documentation.
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}


@pytest.mark.skipif(interpreted(), reason="a process that interprets cannot compile")
@pytest.mark.parametrize(
    ("capability", "rank"), [(80, 16), (89, 16), (89, 128), (90, 128), (120, 32)]
)
def test_a_tile_fits_the_gpu_that_it_is_chosen_for(
    capability: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is reckoned for it is what the compiler takes, and no more than there is."""
    from kernels.segmented_lora.linear import Multiprocessor, tile_for

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    asynchronous = capability == 90
    multiprocessor = Multiprocessor(SHARED_BYTES[capability], asynchronous)
    tile = tile_for(4096, rank, multiprocessor)
    compiled = compiled_for(capability, tile, "bf16", RANK=rank)
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert compiled.metadata.shared == tile.shared_bytes(rank, multiprocessor)


def test_small_gpus_get_small_tiles() -> None:
    """And large ones large tiles, but for layers of few tokens."""
    from kernels.segmented_lora.linear import TILES, Multiprocessor, tile_for

    ada, hopper = Multiprocessor(99 * 1024, False), Multiprocessor(227 * 1024, True)
    assert tile_for(4096, 16, hopper) == tile_for(4096, 128, hopper) == TILES[128]
    assert tile_for(64, 16, hopper) == TILES[1]
    assert tile_for(4096, 16, ada) == tile_for(64, 16, ada) == TILES[1]
