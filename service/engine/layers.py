"""Layers of a resident network that can weigh every sample of a batch differently.

On a CPU in float32 they also make a sample's value independent of its batch: the libraries below
choose algorithms by the number of rows, so that a sample alone and the same sample among sixteen
would differ in their last bits. Two choices are taken away from them: convolutions always run on
oneDNN with a weight packed once, and products of few rows are filled up to sixteen. Everything else
in a U-Net computes sample by sample anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Fewer rows than these are computed by other routines, with other roundings.
FEWEST_ROWS = 16


def is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether samples can be made independent of their batch, to the bit."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


class Exact:
    """One linear layer or convolution whose outcome for a sample depends on that sample alone."""

    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        self.module = module
        self._packed: Tensor | None = None
        self._of: tuple[int, int] = (0, 0)
        self._size: tuple[int, ...] | None = None

    def prepare(self, weight: Tensor) -> Tensor:
        """The form of a weight that ``compute`` takes: packed, for convolutions.

        It is packed for the size of pictures that the layer saw last; another size is computed
        with it too, but slowly.

        Args:
            weight: In the module's own shape, or as a matrix. [out, in * kh * kw]
        """
        module = self.module
        if isinstance(module, nn.Linear):
            return weight
        shaped = weight.detach().view(module.weight.shape).to_mkldnn()
        # The stubs of torch know neither the sizes nor that the last argument may be given.
        pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed: Tensor = pack(
            shaped, module.padding, module.stride, module.dilation, module.groups, self._size
        )
        return packed

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's outcome with a prepared weight."""
        module = self.module
        if isinstance(module, nn.Conv2d):
            outcome: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x.contiguous(),
                weight,
                module.bias,
                module.padding,
                module.stride,
                module.dilation,
                module.groups,
                "none",
                [],
                "",
            )
            return outcome
        rows = len(x)
        if x.dim() != 2 or rows >= FEWEST_ROWS:
            return F.linear(x, weight, module.bias)
        filled = torch.cat([x, x.new_zeros(FEWEST_ROWS - rows, x.shape[1])])
        return F.linear(filled, weight, module.bias)[:rows]

    def __call__(self, x: Tensor) -> Tensor:
        """The layer with its own weight, packed again where somebody has written to it."""
        weight = self.module.weight
        of = (weight.data_ptr(), weight._version)
        size = (1, *x.shape[1:])
        if self._packed is None or self._of != of or self._size != size:
            self._size = size
            self._packed, self._of = self.prepare(weight), of
        return self.compute(x, self._packed)


@dataclass
class Parting:
    """Which samples of the batch use which weights; shared by all layers of a network.

    Attributes:
        ends: Where each part of the batch ends.
        weights: For each part, the prepared weight of every layer, or None for the layer's own.
    """

    ends: tuple[int, ...] = ()
    weights: tuple[Sequence[Tensor] | None, ...] = ()


@dataclass
class PartedLayer:
    """An exact layer that follows a parting.

    Attributes:
        place: Where the layer's weight stands among those of a part.
    """

    exact: Exact
    parting: Parting
    place: int

    def __call__(self, x: Tensor) -> Tensor:
        """Each part of the batch with its own weight. [N, ...]"""
        parting = self.parting
        if len(parting.weights) <= 1:
            return self._part(x, parting.weights[0] if parting.weights else None)
        if x.dim() == 3 and isinstance(self.exact.module, nn.Linear):
            return self._in_place(x)
        parts, start = [], 0
        for end, weights in zip(parting.ends, parting.weights, strict=True):
            parts.append(self._part(x[start:end], weights))
            start = end
        return torch.cat(parts)

    def _in_place(self, x: Tensor) -> Tensor:
        """Products of rows, each part's written where it belongs. [N, T, in] -> [N, T, out]"""
        module, tokens = self.exact.module, x.shape[1]
        rows = x.reshape(-1, x.shape[2])
        out = rows.new_empty(len(rows), len(module.weight))
        start = 0
        for end, weights in zip(self.parting.ends, self.parting.weights, strict=True):
            weight = module.weight if weights is None else weights[self.place]
            part, into = rows[start * tokens : end * tokens], out[start * tokens : end * tokens]
            if module.bias is None:
                torch.mm(part, weight.t(), out=into)
            else:
                torch.addmm(module.bias, part, weight.t(), out=into)
            start = end
        return out.view(*x.shape[:2], -1)

    def _part(self, x: Tensor, weights: Sequence[Tensor] | None) -> Tensor:
        if weights is None:
            return self.exact(x)
        return self.exact.compute(x, weights[self.place])


@dataclass
class Installed:
    """Layers of a network that compute in another way until they are released."""

    modules: list[nn.Module] = field(default_factory=list)

    def install(self, module: nn.Module, forward: object) -> None:
        """Let a module compute by ``forward`` from now on."""
        module.forward = forward  # type: ignore[assignment]  # what it computes, not what it is
        self.modules.append(module)

    def release(self) -> None:
        """Give every module its own way back."""
        for module in self.modules:
            module.__dict__.pop("forward", None)
        self.modules.clear()


def install_exact(network: nn.Module, besides: Sequence[nn.Module] = ()) -> Installed:
    """Make all linear layers and convolutions of a network exact, except those given."""
    installed = Installed()
    apart = {id(module) for module in besides}
    for module in network.modules():
        plain = type(module) is nn.Linear or (
            type(module) is nn.Conv2d and module.padding_mode == "zeros"
        )
        if plain and id(module) not in apart:
            assert isinstance(module, nn.Linear | nn.Conv2d)
            installed.install(module, Exact(module))
    return installed
