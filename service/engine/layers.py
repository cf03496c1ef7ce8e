"""Layers of a resident network that can weigh every sample of a batch differently.

On a CPU in float32 they also make a sample's value independent of its batch: the libraries below
choose algorithms by the number of rows, so that a sample alone and the same sample among sixteen
would differ in their last bits. Two choices are taken away from them: all layers run on oneDNN with
weights packed once, and products of few rows are filled up to sixteen. Everything else in a U-Net
computes sample by sample anyway. On AMD's processors oneDNN is also more than twice as fast as the
MKL that PyTorch takes for linear layers (docs/engine.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Fewer rows than these are computed by other routines, with other roundings.
FEWEST_ROWS = 16


def is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether samples can be made independent of their batch, to the bit."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


class Exact:
    """One linear layer or convolution whose outcome for a sample depends on that sample alone."""

    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        self.module = module
        self._convolves = isinstance(module, nn.Conv2d)
        self._packed: Tensor | None = None
        self._of: tuple[int, int] = (0, 0)
        self._size: tuple[int, ...] | None = None
        # What PyTorch's compiler makes of such layers; the stubs of torch do not know them.
        self._op: Any = torch.ops.mkldnn._linear_pointwise.default
        geometry: tuple[Any, ...] = ()
        if isinstance(module, nn.Conv2d):
            self._op = torch.ops.mkldnn._convolution_pointwise.default
            geometry = (module.padding, module.stride, module.dilation, module.groups)
        self._settings = (module.bias, *geometry, "none", [], "")

    def prepare(self, weight: Tensor) -> Tensor:
        """The form of a weight that ``compute`` takes: packed.

        Convolutions pack it for the size of pictures that the layer saw last; another size is
        computed with it too, but slowly.

        Args:
            weight: In the module's own shape, or as a matrix. [out, in * kh * kw]
        """
        module = self.module
        shaped = weight.detach().view(module.weight.shape)
        if isinstance(module, nn.Linear):
            linear: Tensor = torch.ops.mkldnn._reorder_linear_weight(shaped, FEWEST_ROWS)
            return linear
        # The stubs know neither the sizes nor that the last argument may be given.
        pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        geometry = (module.padding, module.stride, module.dilation, module.groups)
        packed: Tensor = pack(shaped.to_mkldnn(), *geometry, self._size)
        return packed

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's outcome with a prepared weight."""
        if self._convolves:
            x = x.contiguous(memory_format=torch.channels_last)
        elif x.numel() < FEWEST_ROWS * x.shape[-1]:
            rows = x.reshape(-1, x.shape[-1])
            blank = rows.new_zeros(FEWEST_ROWS - len(rows), rows.shape[1])
            filled: Tensor = self._op(torch.cat([rows, blank]), weight, *self._settings)
            return filled[: len(rows)].view(*x.shape[:-1], -1)
        outcome: Tensor = self._op(x, weight, *self._settings)
        return outcome

    def __call__(self, x: Tensor) -> Tensor:
        """The layer with its own weight."""
        return self.compute(x, self.own(x))

    def own(self, x: Tensor) -> Tensor:
        """The layer's own weight, packed again where somebody has written to it."""
        weight = self.module.weight
        of = (weight.data_ptr(), weight._version)
        size = (1, *x.shape[1:])
        if self._packed is None or self._of != of or self._size != size:
            self._size = size
            self._packed, self._of = self.prepare(weight), of
        return self._packed


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
        exact, parting = self.exact, self.parting
        weights = [
            exact.own(x) if part is None else part[self.place] for part in parting.weights
        ] or [exact.own(x)]
        if len(weights) == 1:
            return exact.compute(x, weights[0])
        sizes = [end - start for start, end in itertools.pairwise((0, *parting.ends))]
        parts = zip(x.split(sizes), weights, strict=True)
        return torch.cat([exact.compute(part, weight) for part, weight in parts])


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
