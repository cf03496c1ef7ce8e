"""Blocks of pictures whose small operations are joined with their neighbours, in one layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.add_residual import add_residual
from kernels.groupnorm_silu import groupnorm_silu
from service.engine.layers import without_bias


@dataclass
class FusedNorm:
    """A group norm whose outcome lies in memory as its input does.

    Attributes:
        silu: Whether the SiLU after it is already done.
    """

    norm: nn.GroupNorm
    silu: bool = True

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """norm(x), or silu(norm(x)), with something added to x before. [N, C, H, W] and [N, C]"""
        norm, silu = self.norm, self.silu
        return groupnorm_silu(
            x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu, added=added
        )


def already_done(x: Tensor) -> Tensor:
    """An activation that what is before it has done."""
    return x


@dataclass
class FusedPictures:
    """A residual block that writes its features down only where a convolution reads or makes them.

    What torch adds in passes of their own is added where something reads anyway: the timestep and
    the bias of the first convolution by the second norm, the biases of the others by the addition
    that ends the block. A division by a factor of 1 is left out.

    Attributes:
        activated: Whether the timestep's embedding comes with its SiLU already done.
    """

    block: ResnetBlock2D
    activated: bool = False

    def __call__(self, features: Tensor, temb: Tensor | None, *_: Any, **__: Any) -> Tensor:
        """Features, given the timestep's embedding if there is one. [N, C, H, W] and [N, D]"""
        block = self.block
        hidden, bias = without_bias(block.conv1, FusedNorm(block.norm1)(features))
        added = None if bias is None else bias.expand(len(features), -1)
        if temb is not None and block.time_emb_proj is not None:
            done = self.activated or block.skip_time_act
            of_time = block.time_emb_proj(temb if done else F.silu(temb))
            added = of_time if bias is None else of_time + bias
        hidden = FusedNorm(block.norm2)(hidden, added)
        hidden, bias = without_bias(block.conv2, block.dropout(hidden))
        kept = features
        if block.conv_shortcut is not None:
            kept, of_kept = without_bias(block.conv_shortcut, features)
            if bias is not None and of_kept is not None:
                # In float32: one of them in half precision would be rounded once more.
                bias = bias.float() + of_kept
            elif bias is None:
                bias = of_kept
        summed = kept + hidden if bias is None else add_residual(kept, hidden, bias)
        factor = block.output_scale_factor
        return summed if factor == 1 else summed / factor


@dataclass
class KeptLayout:
    """How a transformer's tokens become pictures again, laid out as they lie: channels last.

    diffusers' own way copies them to channels first, for a residual block that would turn them
    back, and adds the residual, which lies otherwise, element by element.
    """

    transformer: Transformer2DModel

    def __call__(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        """Pictures of tokens [N, h * w, C], with the residual added. [N, C, h, w]"""
        project = self.transformer.proj_out
        tokens, bias = hidden_states, None
        if self.transformer.use_linear_projection:
            tokens, bias = without_bias(project, tokens)
        pictures = tokens.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not self.transformer.use_linear_projection:
            pictures, bias = without_bias(project, pictures)
        return pictures + residual if bias is None else add_residual(residual, pictures, bias)


@dataclass
class DoubledPictures:
    """Pictures of twice the size, and the convolution behind them.

    On an H200 torch's own kernel for channels-last features ran at a tenth of the memory's rate.
    """

    layer: Upsample2D

    def __call__(self, features: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
        """Every pixel four times, convolved. [N, C, H, W] to [N, D, 2 H, 2 W]"""
        if output_size is not None or not features.is_cuda:
            own: Tensor = Upsample2D.forward(self.layer, features, output_size)
            return own
        convolved: Tensor = self.layer.conv(doubled(features))
        return convolved


def doubled(features: Tensor) -> Tensor:
    """Nearest neighbours at twice the size, channels-last. [N, C, H, W] to [N, C, 2 H, 2 W]

    Copied in the widest pieces that the channels are made of, at most sixteen bytes.
    """
    pixels = features.permute(0, 2, 3, 1).contiguous()
    n, height, width, channels = pixels.shape
    for kind in (torch.complex128, torch.int64, torch.int32):
        if channels * pixels.element_size() % kind.itemsize == 0:
            pixels = pixels.view(kind)
            break
    spread = pixels[:, :, None, :, None].expand(n, height, 2, width, 2, -1)
    copied = spread.reshape(n, 2 * height, 2 * width, -1).view(features.dtype)
    return copied.permute(0, 3, 1, 2)


@dataclass
class ActivatedTimes:
    """The timestep's embedding with the SiLU that every residual block would do for itself."""

    embedding: TimestepEmbedding

    def __call__(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embeddings. [N, C] to [N, D]"""
        embedded: Tensor = TimestepEmbedding.forward(self.embedding, sample, condition)
        return F.silu(embedded)
