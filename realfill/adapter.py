"""An adapter: what LoRA changes in one network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA weights of one network.

    Attributes:
        factors: lora_A [R, in] and lora_B [out, R] by module path; of a convolution, `in` runs
            over channels, rows and columns of its kernel.
        scale: What their product is multiplied with, alpha / rank.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    scale: float

    def page_locked(self) -> Adapter:
        """The same in memory that a CUDA device fetches by itself, at its bus's full rate.

        In one piece, of which the factors are views.
        """
        return self.over(self.in_one_piece().pin_memory())

    def in_one_piece(self) -> Tensor:
        """All factors' values, one after the other; their own memory where they lie so. [n]"""
        tensors = [tensor.detach() for pair in self.factors.values() for tensor in pair]
        first = tensors[0]
        memory, end = first.untyped_storage().data_ptr(), first.storage_offset()
        for tensor in tensors:
            here = tensor.untyped_storage().data_ptr() == memory and tensor.storage_offset() == end
            if not (here and tensor.is_contiguous() and tensor.dtype == first.dtype):
                return torch.cat([tensor.reshape(-1) for tensor in tensors])
            end += tensor.numel()
        return first.as_strided((end - first.storage_offset(),), (1,))

    def over(self, flat: Tensor) -> Adapter:
        """The same factors as views of all values. [n]"""
        parts = iter(
            flat.split([tensor.numel() for pair in self.factors.values() for tensor in pair])
        )
        factors = {
            path: (next(parts).view(a.shape), next(parts).view(b.shape))
            for path, (a, b) in self.factors.items()
        }
        return Adapter(factors, self.scale)
