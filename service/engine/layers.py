"""Layers of a resident network that can weigh every sample of a batch differently.

On a CPU they also make a sample's value independent of its batch: the libraries below
choose algorithms by the number of rows, so that a sample alone and the same sample among sixteen
would differ in their last bits. Two choices are taken away from them: all layers run on oneDNN with
weights packed once, and products of few rows are filled up to sixteen. Everything else in a U-Net
computes sample by sample anyway, or value by value in steps of 32 with AVX-512: what is left over
is computed by another routine, so that the features of a sample must be a multiple of 32, as those
of Stable Diffusion's U-Nets and of ``nano`` are. On AMD's processors oneDNN is also more than twice
as fast as the MKL that PyTorch takes for linear layers (docs/engine.md). Layers may multiply in
bfloat16 between activations in float32; what is said of bits holds either way.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Fewer rows than these are computed by other routines, with other roundings.
FEWEST_ROWS = 16


def is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether samples can be made independent of their batch, to the bit."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


class Exact:
    """A layer whose outcome for a sample depends on that sample alone.

    Args:
        module: A linear layer or a convolution.
        beside: Linear layers that read what it reads, and are computed with it as one: their
            weights stand below its own, their outcomes behind its own.
        products: What it multiplies in: weight, bias and what is read are rounded to it, and so is
            the outcome, which is handed on in the type of what was read.

    Attributes:
        modules: All of them.
        out_sizes: Channels of each one's outcome.
    """

    def __init__(
        self,
        module: nn.Linear | nn.Conv2d,
        *beside: nn.Linear,
        products: torch.dtype = torch.float32,
    ) -> None:
        self.module = module
        self.products = products
        self.modules = (module, *beside)
        # Here, since of a weight that a program asks for its size it would keep a copy.
        self.out_sizes = [len(module.weight) for module in self.modules]
        self._of_pictures = isinstance(module, nn.Conv2d)
        # A convolution of single pixels is a linear layer of them. As a convolution its packed
        # weight may be in another form than the library wants, which then converts it every time.
        self.convolves = isinstance(module, nn.Conv2d) and not _takes_single_pixels(module)
        self._own: Packed | None = None
        self._of: tuple[tuple[int, int], ...] = ()
        self._size: tuple[int, ...] | None = None
        self._forms: dict[tuple[int, int], bytes] = {}
        biases = [one.bias for one in self.modules if one.bias is not None]
        self._bias = torch.cat(biases) if beside and biases else module.bias
        if self._bias is not None:
            # Nothing is learnt here, and a program takes no parameter as a constant.
            self._bias = self._bias.detach().to(products)

    def pack(self, weight: Tensor) -> Packed:
        """A weight as the layer computes with it.

        Args:
            weight: In the module's own shape, or as a matrix. [out, in * kh * kw]
        """
        if self.convolves:
            shaped = weight.detach().view(self.module.weight.shape)
            return Packed(self, self.packed_for(1, shaped), self.form(1))
        matrix = weight.detach().view(sum(self.out_sizes), -1).to(self.products)
        return Packed(self, torch.ops.mkldnn._reorder_linear_weight(matrix, FEWEST_ROWS), b"")

    def packed_for(self, samples: int, weight: Tensor) -> Tensor:
        """A convolution's weight in the form that the library wants; see ``form``."""
        module = self.module
        assert isinstance(module, nn.Conv2d)
        geometry = (module.padding, module.stride, module.dilation, module.groups)
        size = None if self._size is None else (samples, *self._size)
        # The stubs know neither the sizes nor that the last argument may be given.
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed: Tensor = reorder(weight.to(self.products).to_mkldnn(), *geometry, size)
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

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's outcome with a weight that is packed for so many samples. [N, ...]"""
        if x.dtype == self.products:
            return self._computed(x, weight)
        return self._computed(x.to(self.products), weight).to(x.dtype)

    def compute_parts(
        self, x: Tensor, parts: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Tensor:
        """The layer's outcome for a batch in parts, each with a weight of its own.

        Args:
            x: What is read. [N, ...]
            parts: Tell by their first sizes how many samples each part has, the last ones perhaps
                none: so a program need not be told by numbers, which would be fixed in it.
            weights: Of each part, packed for so many samples.

        Returns:
            To the bit what ``compute`` gives for each part. [N, ...]
        """
        read = x.to(self.products)
        by = (list(parts), list(weights), self._bias)
        if not self._of_pictures:
            return self._rows_of_parts(read, x, *by)
        pixels = read.permute(0, 2, 3, 1).contiguous()
        if not self.convolves:
            return self._rows_of_parts(pixels, x, *by).permute(0, 3, 1, 2)
        return _scripted(_convolved_by_parts)(pixels.permute(0, 3, 1, 2), x, *by, *self._geometry())

    def _rows_of_parts(self, x: Tensor, like: Tensor, *by: Any) -> Tensor:
        return _scripted(_projected_by_parts)(x, like, *by, sum(self.out_sizes), FEWEST_ROWS)

    def _computed(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self._of_pictures:
            return self._of_rows(x, weight)
        pixels = x.permute(0, 2, 3, 1).contiguous()
        if not self.convolves:
            return self._of_rows(pixels, weight).permute(0, 3, 1, 2)
        pictures = pixels.permute(0, 3, 1, 2)
        return _scripted(_convolved)(pictures, weight, self._bias, *self._geometry())

    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """A convolution's padding, stride and dilation, and its groups."""
        module = self.module
        assert isinstance(module, nn.Conv2d)
        assert not isinstance(module.padding, str)
        return list(module.padding), list(module.stride), list(module.dilation), module.groups

    def _of_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """Rows of channels, filled up where they are few. [..., C]"""
        if x.numel() >= FEWEST_ROWS * x.shape[-1]:
            return _scripted(_projected)(x, weight, self._bias)
        rows = x.reshape(-1, x.shape[-1])
        # As many as one row needs: a program that was traced for few rows is run with more.
        blank = rows.new_zeros(FEWEST_ROWS - 1, rows.shape[1])
        filled = _scripted(_projected)(torch.cat([rows, blank]), weight, self._bias)
        return filled[: rows.shape[0]].view(*x.shape[:-1], -1)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer with its own weight."""
        return self.compute(x, self.own(x).for_samples(len(x)))

    def own(self, x: Tensor) -> Packed:
        """The layer's own weight for pictures of this size; see ``mine``."""
        if self.convolves and self._size != x.shape[1:]:
            self._size, self._forms, self._own = tuple(x.shape[1:]), {}, None
        return self.mine()

    def mine(self) -> Packed:
        """The layer's own weight, packed again where somebody has written to it."""
        of = tuple((module.weight.data_ptr(), module.weight._version) for module in self.modules)
        if self._own is None or self._of != of:
            weights = [module.weight for module in self.modules]
            whole = weights[0] if len(weights) == 1 else torch.cat(weights)
            self._own, self._of = self.pack(whole), of
        return self._own


def _projected(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
    """A linear layer with a packed weight. [..., C]"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """A convolution with a packed weight. [N, C, h, w]"""
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, "none", [], ""
    )


def _projected_by_parts(
    x: Tensor,
    like: Tensor,
    parts: list[Tensor],
    weights: list[Tensor],
    bias: Optional[Tensor],  # noqa: UP045
    width: int,
    fewest: int,
) -> Tensor:
    """A linear layer with a packed weight for each part, in the type of another. [N, ..., C]"""
    rows = x.reshape(-1, x.size(-1))
    each = rows.size(0) // len(x)
    sizes: list[int] = []
    for part in parts:
        sizes.append(each * len(part))
    outcome = torch.empty([rows.size(0), width], dtype=like.dtype)
    for read, written, weight in zip(  # noqa: B905
        rows.split_with_sizes(sizes), outcome.split_with_sizes(sizes), weights
    ):
        if len(written) > 0:
            if each < fewest:
                blank = torch.zeros([fewest - 1, rows.size(1)], dtype=rows.dtype)
                read = torch.cat([read, blank])
            made = torch.ops.mkldnn._linear_pointwise(read, weight, bias, "none", [], "")
            if each < fewest:
                made = made.narrow(0, 0, len(written))
            written.copy_(made)
    return outcome.view(list(x.shape[:-1]) + [width])


def _convolved_by_parts(
    x: Tensor,
    like: Tensor,
    parts: list[Tensor],
    weights: list[Tensor],
    bias: Optional[Tensor],  # noqa: UP045
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """A convolution with a packed weight for each part, in the type of another. [N, C, h, w]"""
    sizes: list[int] = []
    for part in parts:
        sizes.append(len(part))
    made: list[Tensor] = []
    for read, weight in zip(x.split_with_sizes(sizes), weights):  # noqa: B905
        if len(read) > 0:
            made.append(
                torch.ops.mkldnn._convolution_pointwise(
                    read, weight, bias, padding, stride, dilation, groups, "none", [], ""
                )
            )
    _, channels, height, width = made[0].shape
    pixels = torch.empty([len(x), height, width, channels], dtype=like.dtype)
    pictures = pixels.permute(0, 3, 1, 2)
    for written, outcome in zip(pictures.split_with_sizes(sizes), made):  # noqa: B905
        written.copy_(outcome)
    return pictures


@functools.cache
def _scripted(way: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A call of what PyTorch's compiler makes of layers, in a form that can be part of a program.

    The tracer of programs does not take the empty list in such a call; within a script it may be.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted: Callable[..., Tensor] = torch.jit.script(way)
        return scripted


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
        """The weight as the calling thread's layer wants it for so many samples."""
        if not self._layer.convolves:
            return self.first
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


def without_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A layer's outcome, and the bias that is still to be added: none where it adds that itself.

    For whoever adds something behind it anyway: a pass of its own over what a convolution gave is
    saved, and cuBLAS takes up to twice as long for a linear layer with a bias.

    Returns:
        [N, ...] and [C]
    """
    if "forward" not in vars(layer) and type(layer) is nn.Conv2d:
        return layer._conv_forward(x, layer.weight, None), layer.bias
    if "forward" not in vars(layer) and type(layer) is nn.Linear:
        return F.linear(x, layer.weight), layer.bias
    return layer(x), None


def exact_layers(network: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions of a network that can be exact."""
    return [
        module
        for module in network.modules()
        if type(module) is nn.Linear
        or (type(module) is nn.Conv2d and module.padding_mode == "zeros")
    ]


def install_exact(network: nn.Module, products: torch.dtype = torch.float32) -> Installed:
    """Make all linear layers and convolutions of a network exact, whatever they multiply in."""
    installed = Installed()
    for module in exact_layers(network):
        installed.install(module, Exact(module, products=products))
    return installed
