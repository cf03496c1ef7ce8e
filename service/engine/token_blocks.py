"""Blocks of tokens whose small operations are joined with their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from kernels.add_layernorm import add_layernorm
from kernels.add_residual import add_residual
from kernels.geglu import geglu
from service.engine.attention import Attend, attend_by_torch
from service.engine.layers import without_bias


@dataclass
class FusedResiduals:
    """A transformer block whose additions are joined with the layer norms behind them."""

    block: BasicTransformerBlock

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Tokens. [N, L, C]"""
        block, options = self.block, cross_attention_kwargs or {}
        prompts = encoder_hidden_states
        summed, normed = _added_and_normed(block.norm1, hidden_states, None)
        attended = block.attn1(
            normed,
            encoder_hidden_states=prompts if block.only_cross_attention else None,
            attention_mask=attention_mask,
            **options,
        )
        summed, normed = _added_and_normed(block.norm2, summed, attended)
        attended = block.attn2(
            normed, encoder_hidden_states=prompts, attention_mask=encoder_attention_mask, **options
        )
        summed, normed = _added_and_normed(block.norm3, summed, attended)
        fed, bias = _fed(block.ff, normed)
        return fed + summed if bias is None else _added(summed, fed, bias)


def _fed(layer: FeedForward, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a feed-forward gives, and the bias that is still to be added to it."""
    # Gates, dropout and the way back, unless something else follows.
    if type(layer) is not FeedForward or "forward" in vars(layer) or len(layer.net) != 3:
        return layer(tokens), None
    gates, dropout, back = layer.net
    return without_bias(back, dropout(gates(tokens)))


def _added(summed: Tensor, fed: Tensor, bias: Tensor) -> Tensor:
    """Both and a bias, as of pictures one pixel wide. [N, L, C] twice, and [C]"""
    residual, features = (tokens.transpose(1, 2)[..., None] for tokens in (summed, fed))
    return add_residual(residual, features, bias)[..., 0].transpose(1, 2)


def _added_and_normed(
    norm: nn.LayerNorm, residual: Tensor, addend: Tensor | None
) -> tuple[Tensor, Tensor]:
    """residual + addend, and its norm. [N, L, C] each"""
    return add_layernorm(residual, addend, norm.weight, norm.bias, norm.eps)


@dataclass(frozen=True)
class Place:
    """Where in prompts that are projected already one layer's keys and values lie.

    Each lies in one piece, as a layer of its own would leave it for attention to read.

    Attributes:
        first: Channel that the keys begin with, of those of all layers one behind the other.
        width: Channels of the keys, and of the values behind them.
    """

    first: int
    width: int

    def of(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, as views. [W, N, K] to [N, K, C] twice"""
        _, samples, tokens = projected.shape
        both = projected[self.first : self.first + 2 * self.width]
        keys, values = both.view(2, samples, tokens, self.width).unbind()
        return keys, values


@dataclass
class PlainAttention:
    """Attention as SD2 has it, without the division of its outcome by 1.

    Attributes:
        attention: The layer as it is written.
        attend: How tokens attend to tokens.
        place: Where in projected prompts its own part is, if it ever takes any.
    """

    attention: Attention
    attend: Attend = attend_by_torch
    place: Place | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        projected: bool = False,
        **options: Any,
    ) -> Tensor:
        """Tokens that attended to tokens, or to prompts. [N, L, C] and [N, K, D] to [N, L, C]

        ``projected`` says that the prompts are keys and values already.
        """
        attention = self.attention
        if attention_mask is not None:
            own = partial(Attention.forward, attention)
            masked: Tensor = own(hidden_states, encoder_hidden_states, attention_mask, **options)
            return masked
        query = attention.to_q(hidden_states)
        if projected and encoder_hidden_states is not None:
            assert self.place is not None
            key, value = self.place.of(encoder_hidden_states)
        else:
            seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key, value = attention.to_k(seen), attention.to_v(seen)
        by_head = (tokens.unflatten(-1, (attention.heads, -1)) for tokens in (query, key, value))
        attended = self.attend(*by_head)
        out, dropout = attention.to_out
        outcome: Tensor = dropout(out(attended.flatten(2)))
        return outcome


@dataclass
class FusedGates:
    """A feed-forward's first half, whose gates are opened in one pass over what it projects."""

    layer: GEGLU

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Features times the GELU of their gates. [N, L, C] to [N, L, H]"""
        return geglu(self.layer.proj(hidden_states))
