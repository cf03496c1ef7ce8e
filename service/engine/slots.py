"""Device memory for the adapters of one rank: a slot of fixed size for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from service.engine.arena import Tier
from service.engine.staging import StagedAdapter, as_matrix

# Ranks are padded to a multiple of what one matrix instruction takes, and no further.
RANK_STEP = 16


def padded(rank: int) -> int:
    """The rank of the class that an adapter belongs to."""
    return -(-rank // RANK_STEP) * RANK_STEP


class RankClass:
    """One device buffer with a slot of fixed size for each adapter of up to one rank.

    Attributes:
        rank: Of the class, a multiple of 16; smaller adapters are padded with zeros.
        scales: alpha / rank of the adapter in each slot. [L], float32
    """

    def __init__(
        self, modules: Mapping[str, nn.Linear | nn.Conv2d], rank: int, budget_bytes: int
    ) -> None:
        self.rank = rank
        weight = next(iter(modules.values())).weight
        self._shapes: dict[str, tuple[int, int]] = {}
        self._offsets: dict[str, int] = {}
        size = 0
        for path, module in modules.items():
            rows, columns = as_matrix(module.weight).shape
            self._shapes[path], self._offsets[path] = (rows, columns), size
            size += rank * (rows + columns)
        # The base's own type, which one kernel can multiply beside the weights.
        self._dtype = weight.dtype if weight.is_cuda else torch.float32
        # Merging convolutions takes a copy of lora_A in the order of their weights in memory.
        copied = sum(
            rank * columns
            for path, (_, columns) in self._shapes.items()
            if not modules[path].weight.is_contiguous()
        )
        self.slot_bytes = (size + copied) * self._dtype.itemsize
        count = max(1, budget_bytes // self.slot_bytes)
        self._buffer = torch.zeros(count, size, dtype=self._dtype, device=weight.device)
        self.scales = torch.zeros(count, device=weight.device)
        self._free = list(range(count))[::-1]
        self.tier: Tier[Slot] = Tier(
            count * self.slot_bytes, on_evict=lambda slot: self._vacate(slot.row)
        )

    def put(self, staged: StagedAdapter, prepare: Callable[[StagedAdapter], None]) -> Slot:
        """Copy an adapter into a free slot; zeros where it has no factors.

        Args:
            prepare: Told the adapter as it lies there; if it fails the slot is free again.
        """
        row = self._free.pop()
        try:
            slot = self._filled(row, staged)
            prepare(slot.staged)
        except BaseException:
            self._vacate(row)
            raise
        return slot

    def _filled(self, row: int, staged: StagedAdapter) -> Slot:
        for path, (lora_A, lora_B) in staged.factors.items():
            to_A, to_B = self.factors(path)
            to_A[row, : len(lora_A)].copy_(lora_A)
            to_B[row, :, : len(lora_A)].copy_(lora_B)
        self.scales[row] = staged.scale
        factors = {path: tuple(f[row] for f in self.factors(path)) for path in staged.factors}
        held = StagedAdapter(staged.digest, staged.scale, factors)  # type: ignore[arg-type]
        return Slot(self, row, held)

    def _vacate(self, row: int) -> None:
        """Leave nothing of an adapter in its slot."""
        self._buffer[row].zero_()
        self._free.append(row)

    def factors(self, path: str) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B of a module in every slot. [L, R, in] and [L, out, R]"""
        (rows, columns), start = self._shapes[path], self._offsets[path]
        middle, end = start + self.rank * columns, start + self.rank * (rows + columns)
        lora_A = self._buffer[:, start:middle].view(-1, self.rank, columns)
        return lora_A, self._buffer[:, middle:end].view(-1, rows, self.rank)


@dataclass(frozen=True, eq=False)
class Slot:
    """One adapter's place.

    Attributes:
        staged: Its factors, as views of the slot.
    """

    rank_class: RankClass
    row: int
    staged: StagedAdapter
