"""One op at one size against torch, and against the machine's own limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine.timing import quantile, repeated, seconds_of

EAGER = "torch eager"
COMPILED = "torch.compile"
COPY = "copy of as many bytes"
PRODUCT = "as many flops in a large product"


@dataclass(frozen=True)
class Case:
    """An op at one size, and the same in plain torch.

    Attributes:
        op: Name of the op's folder.
        name: Of the size, as part of a row's name.
        ours: The op's dispatcher; returns what it wrote.
        peer: The same by torch alone; compiled, it is the second peer.
        inputs: Makes the arguments of both. Each contender has its own.
        moved_bytes: What must be read and written at least, each value once.
        flops: Multiplications and additions in matrix products; 0 where there are none.
        dtype: Type of the products.
    """

    op: str
    name: str
    ours: Callable[..., Tensor]
    peer: Callable[..., Tensor]
    inputs: Callable[[], tuple[Any, ...]]
    moved_bytes: int
    flops: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Timings:
    """Seconds of every call, for ours and for each peer, and the limits of the machine.

    Attributes:
        copy_s: For a copy that moves as many bytes as the case must.
        product_flops: Per second, in a large matrix product of the case's type.
        skipped: Why a peer was left out, one sentence each.
    """

    case: Case
    ours_s: list[float]
    peers_s: dict[str, list[float]]
    copy_s: list[float]
    product_flops: float
    skipped: list[str] = field(default_factory=list)

    @property
    def limit(self) -> tuple[str, float]:
        """What bounds the case on this machine, and the seconds that takes."""
        by_copy, by_product = median(self.copy_s), self.case.flops / self.product_flops
        return (COPY, by_copy) if by_copy >= by_product else (PRODUCT, by_product)

    def gb_per_s(self, seconds: Sequence[float]) -> float:
        """Bytes that must be moved, over the median, in 1e9 per second."""
        return self.case.moved_bytes / median(seconds) / 1e9


@torch.inference_mode()
def contest(
    case: Case,
    device: torch.device,
    *,
    repeats: int,
    product_flops: float,
    compiled: bool = True,
) -> Timings:
    """Time ours and its peers, after a look whether they agree.

    On a CPU they take turns, so that whatever else the machine does meets all alike. On CUDA each
    is timed by events, over cleared caches, without what Python takes to launch it.

    Args:
        repeats: Calls that count on a CPU; on CUDA Triton's do_bench decides.
        product_flops: Of `product_flops_per_s`, for the case's type.
        compiled: Whether torch.compile is a peer.

    Raises:
        RuntimeError: Ours and torch differ, so that timing them means nothing.
    """
    ours, eager = _bound(case.ours, case), _bound(case.peer, case)
    wanted = eager().double()
    _agree(case, "our op", ours().double(), wanted)
    contenders = {"ours": ours, EAGER: eager, COPY: _copy(case.moved_bytes, device)}
    skipped = []
    if compiled:
        fast = _bound(torch.compile(case.peer, dynamic=False), case)
        try:
            _agree(case, COMPILED, fast().double(), wanted)
            contenders[COMPILED] = fast
        except Exception as error:  # noqa: BLE001  Whatever stops a compiler, eager remains.
            reason = str(error).strip().partition("\n")[0]
            skipped.append(f"{case.op} {case.name} without {COMPILED}: {reason or type(error)}")
    seconds = in_turns(contenders, device, repeats)
    ours_s, copy_s = seconds.pop("ours"), seconds.pop(COPY)
    return Timings(case, ours_s, seconds, copy_s, product_flops, skipped)


def in_turns(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each contender's calls."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return {
            name: [ms / 1000 for ms in do_bench(work, return_mode="all")]
            for name, work in contenders.items()
        }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-2, repeats):
        for name, work in contenders.items():
            taken = seconds_of(work, device)
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


@torch.inference_mode()
def product_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """What the machine reaches in a large square matrix product, which is no op's to beat."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    fastest = quantile(repeated(lambda: torch.mm(left, right, out=out), 5, device), 20)
    return float(2 * side**3 / fastest)


def _bound(function: Callable[..., Tensor], case: Case) -> Callable[[], Tensor]:
    """A function with arguments of its own, which it may write to."""
    arguments = case.inputs()
    return lambda: function(*arguments)


def _copy(moved_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """Half of the bytes are read, half are written."""
    source = torch.ones(max(1, moved_bytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _agree(case: Case, contender: str, outcome: Tensor, wanted: Tensor) -> None:
    """Refuse to time what calculates something else than torch does."""
    apart = float((outcome - wanted).abs().max())
    # Long sums of float32 differ by more than an epsilon, and by far less than a mistake.
    allowed = max(8 * torch.finfo(case.dtype).eps, 1e-4) * float(wanted.abs().max())
    if not apart <= allowed:
        raise RuntimeError(
            f"{case.op} {case.name} by {contender} is {apart:.3g} from torch, allowed is "
            f"{allowed:.3g}: mend it before it is timed"
        )
