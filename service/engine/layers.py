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
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
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
        self._of_pictures = isinstance(module, nn.Conv2d)
        # A convolution of single pixels is a linear layer of them. As a convolution its packed
        # weight may be in another form than the library wants, which then converts it every time.
        self.convolves = isinstance(module, nn.Conv2d) and not _takes_single_pixels(module)
        self._own: Packed | None = None
        self._of: tuple[int, int] = (0, 0)
        self._size: tuple[int, ...] | None = None
        self._forms: dict[tuple[int, int], bytes] = {}
        # What PyTorch's compiler makes of such layers; the stubs of torch do not know them.
        self._op: Any = torch.ops.mkldnn._linear_pointwise.default
        geometry: tuple[Any, ...] = ()
        if isinstance(module, nn.Conv2d) and self.convolves:
            self._op = torch.ops.mkldnn._convolution_pointwise.default
            geometry = (module.padding, module.stride, module.dilation, module.groups)
        self._settings = (module.bias, *geometry, "none", [], "")

    def pack(self, weight: Tensor) -> Packed:
        """A weight as the layer computes with it.

        Args:
            weight: In the module's own shape, or as a matrix. [out, in * kh * kw]
        """
        if self.convolves:
            shaped = weight.detach().view(self.module.weight.shape)
            return Packed(self, self.packed_for(1, shaped), self.form(1))
        matrix = weight.detach().view(len(self.module.weight), -1)
        return Packed(self, torch.ops.mkldnn._reorder_linear_weight(matrix, FEWEST_ROWS), b"")

    def packed_for(self, samples: int, weight: Tensor) -> Tensor:
        """A convolution's weight in the form that the library wants; see ``form``."""
        module = self.module
        assert isinstance(module, nn.Conv2d)
        geometry = (module.padding, module.stride, module.dilation, module.groups)
        size = None if self._size is None else (samples, *self._size)
        # The stubs know neither the sizes nor that the last argument may be given.
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed: Tensor = reorder(weight.to_mkldnn(), *geometry, size)
        return packed

    def form(self, samples: int) -> bytes:
        """What the library wants a convolution's weight to be packed like.

        It depends on how many samples the calling thread computes and with how many cores, and on
        the size of pictures that the layer saw last. A weight in another form is converted by every
        call, which takes up to ten times as long as the convolution.
        """
        way = (torch.get_num_threads(), samples)
        if way not in self._forms:
            packed = self.packed_for(samples, self.module.weight.detach())
            form: Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
            self._forms[way] = bytes(form.tolist())
        return self._forms[way]

    @property
    def forms(self) -> int:
        """Forms that a weight was wanted in so far."""
        return max(1, len(set(self._forms.values())))

    def compute(self, x: Tensor, weight: Packed) -> Tensor:
        """The layer's outcome with a packed weight."""
        return self.compute_parts(x, [len(x)], [weight])

    def compute_parts(self, x: Tensor, sizes: list[int], weights: Sequence[Packed]) -> Tensor:
        """The layer's outcome where parts of the batch have weights of their own.

        Args:
            x: [N, ...]
            sizes: Of the parts; their sum is N.
            weights: One for each part.
        """
        if self._of_pictures:
            x = x.permute(0, 2, 3, 1).contiguous()
        parts = [
            self._compute_part(part, weight)
            for part, weight in zip(x.split(sizes), weights, strict=True)
        ]
        outcome = parts[0] if len(parts) == 1 else torch.cat(parts)
        return outcome.permute(0, 3, 1, 2) if self._of_pictures else outcome

    def _compute_part(self, x: Tensor, weight: Packed) -> Tensor:
        """One part; of pictures with channels last. [N, h, w, C] or [N, ..., C]"""
        if self.convolves:
            fitting = weight.for_samples(len(x))
            convolved: Tensor = self._op(x.permute(0, 3, 1, 2), fitting, *self._settings)
            return convolved.permute(0, 2, 3, 1)
        if x.numel() < FEWEST_ROWS * x.shape[-1]:
            rows = x.reshape(-1, x.shape[-1])
            blank = rows.new_zeros(FEWEST_ROWS - len(rows), rows.shape[1])
            filled: Tensor = self._op(torch.cat([rows, blank]), weight.first, *self._settings)
            return filled[: len(rows)].view(*x.shape[:-1], -1)
        outcome: Tensor = self._op(x, weight.first, *self._settings)
        return outcome

    def __call__(self, x: Tensor) -> Tensor:
        """The layer with its own weight."""
        return self.compute(x, self.own(x))

    def own(self, x: Tensor) -> Packed:
        """The layer's own weight, packed again where somebody has written to it."""
        weight = self.module.weight
        of = (weight.data_ptr(), weight._version)
        if self.convolves and self._size != x.shape[1:]:
            self._size, self._forms, self._own = x.shape[1:], {}, None
        if self._own is None or self._of != of:
            self._own, self._of = self.pack(weight), of
        return self._own


class Packed:
    """A weight of an exact layer, in every form in which the library has wanted it so far.

    Args:
        layer: Whose weight it is.
        first: The weight, packed.
        form: Its form; empty where there is but one.
    """

    def __init__(self, layer: Exact, first: Tensor, form: bytes) -> None:
        self.first = first
        self._layer = layer
        self._by_form = {form: first}

    def for_samples(self, samples: int) -> Tensor:
        """The weight as the calling thread's convolution of so many samples wants it."""
        form = self._layer.form(samples)
        fitting = self._by_form.get(form)
        if fitting is None:
            fitting = self._layer.packed_for(samples, self.first.to_dense())
            self._by_form[form] = fitting
        return fitting

    @property
    def versions(self) -> int:
        """How often somebody has written to it."""
        if len(self._by_form) == 1:
            return self.first._version
        return sum(weight._version for weight in self._by_form.values())


def _takes_single_pixels(module: nn.Conv2d) -> bool:
    """Whether a convolution mixes the channels of every pixel by itself."""
    return (module.kernel_size, module.stride, module.padding, module.groups) == (
        (1, 1), (1, 1), (0, 0), 1,
    )  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Which consecutive samples of a batch use which weights.

    Attributes:
        ends: Where each part ends; of no matter where there is but one.
        weights: For each part, the packed weight of every layer, or None for the layer's own.
    """

    ends: tuple[int, ...] = ()
    weights: tuple[Sequence[Packed] | None, ...] = (None,)

    def sizes(self, count: int) -> list[int]:
        """Samples of each part, in a batch of so many."""
        return [count] if len(self.weights) == 1 else self._sizes

    @cached_property
    def _sizes(self) -> list[int]:
        """Asked for by every layer in every step."""
        return [end - start for start, end in itertools.pairwise((0, *self.ends))]

    def between(self, start: int, stop: int) -> Parts:
        """The parts, or what is left of them, of the samples from one place to another."""
        if len(self.weights) == 1:
            return self
        kept = [
            (min(end, stop) - start, weights)
            for (begin, end), weights in zip(
                itertools.pairwise((0, *self.ends)), self.weights, strict=True
            )
            if begin < stop and end > start
        ]
        return Parts(tuple(end for end, _ in kept), tuple(weights for _, weights in kept))

    def pieces(self, count: int, most: int) -> Iterator[tuple[int, int, Parts]]:
        """Pieces of a batch within which there is one set of weights: start, stop, parts."""
        start = 0
        for size, weights in zip(self.sizes(count), self.weights, strict=True):
            stop = start + size
            for first in range(start, stop, most):
                yield first, min(first + most, stop), Parts(weights=(weights,))
            start = stop


class Parting(threading.local):
    """The parts that the layers of a network go by; each thread has its own."""

    parts = Parts()

    @contextmanager
    def by(self, parts: Parts) -> Iterator[None]:
        """The calling thread goes by these parts, and then by those of before."""
        before, self.parts = self.parts, parts
        try:
            yield
        finally:
            self.parts = before


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
        exact, parts, place = self.exact, self.parting.parts, self.place
        weights = [exact.own(x) if part is None else part[place] for part in parts.weights]
        return exact.compute_parts(x, parts.sizes(len(x)), weights)


@dataclass
class PiecewiseBlock:
    """A block of layers that takes a few samples through all of them before the next few.

    What passes between its layers is then still in the cache when it is read, and is nowhere put
    together for the whole batch. For blocks that widen their input, such as feed-forward ones.

    Attributes:
        forward: The block's own way; samples must not depend on each other in it.
        samples: Most that go through it at once.
    """

    forward: Callable[..., Tensor]
    parting: Parting
    samples: int

    def __call__(self, x: Tensor, *others: object, **options: object) -> Tensor:
        """The block's outcome. [N, ...]"""
        outcomes = []
        for start, stop, parts in self.parting.parts.pieces(len(x), self.samples):
            with self.parting.by(parts):
                outcomes.append(self.forward(x[start:stop], *others, **options))
        return outcomes[0] if len(outcomes) == 1 else torch.cat(outcomes)


@dataclass
class Installed:
    """Modules of a network that compute in another way until they are released.

    Attributes:
        methods: Which methods of which modules were replaced.
    """

    methods: list[tuple[nn.Module, str]] = field(default_factory=list)

    def install(self, module: nn.Module, way: object, method: str = "forward") -> None:
        """Let a module's method go another way from now on."""
        setattr(module, method, way)
        self.methods.append((module, method))

    def release(self) -> None:
        """Give every module its own way back."""
        for module, method in self.methods:
            module.__dict__.pop(method, None)
        self.methods.clear()


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
