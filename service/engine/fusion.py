"""A U-Net whose small operations are joined with their neighbours, and which keeps one layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.add_layernorm import add_layernorm
from kernels.add_residual import add_residual
from kernels.geglu import geglu
from kernels.groupnorm_silu import groupnorm_silu
from service.engine.layers import Installed


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
        hidden, bias = _convolved(block.conv1, FusedNorm(block.norm1)(features))
        added = None if bias is None else bias.expand(len(features), -1)
        if temb is not None and block.time_emb_proj is not None:
            done = self.activated or block.skip_time_act
            of_time = block.time_emb_proj(temb if done else F.silu(temb))
            added = of_time if bias is None else of_time + bias
        hidden = FusedNorm(block.norm2)(hidden, added)
        hidden, bias = _convolved(block.conv2, block.dropout(hidden))
        kept = features
        if block.conv_shortcut is not None:
            kept, of_kept = _convolved(block.conv_shortcut, features)
            if bias is not None and of_kept is not None:
                # In float32: one of them in half precision would be rounded once more.
                bias = bias.float() + of_kept
            elif bias is None:
                bias = of_kept
        summed = kept + hidden if bias is None else add_residual(kept, hidden, bias)
        factor = block.output_scale_factor
        return summed if factor == 1 else summed / factor


def _convolved(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A convolution, and the bias that is still to be added: none where the layer adds it itself.

    Returns:
        [N, C, H, W] and [C]
    """
    if type(layer) is not nn.Conv2d or "forward" in vars(layer):
        return layer(x), None
    return layer._conv_forward(x, layer.weight, None), layer.bias


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
        fed: Tensor = block.ff(normed)
        return fed + summed


def _added_and_normed(
    norm: nn.LayerNorm, residual: Tensor, addend: Tensor | None
) -> tuple[Tensor, Tensor]:
    """residual + addend, and its norm. [N, L, C] each"""
    return add_layernorm(residual, addend, norm.weight, norm.bias, norm.eps)


@dataclass(frozen=True)
class Place:
    """Where in prompts that are projected already the keys and values of one layer lie.

    Attributes:
        keys: First channel of them.
        values: First channel of them, which stand behind the keys.
        stop: The channel behind the last value.
    """

    keys: int
    values: int
    stop: int

    def taken_from(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, as views. [N, K, D] to [N, K, C] twice"""
        return projected[..., self.keys : self.values], projected[..., self.values : self.stop]


@dataclass
class PlainAttention:
    """Attention as SD2 has it, without the division of its outcome by 1.

    Attributes:
        place: Where in projected prompts its own part is, if it ever takes any.
    """

    attention: Attention
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
            key, value = self.place.taken_from(encoder_hidden_states)
        else:
            seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key, value = attention.to_k(seen), attention.to_v(seen)
        query, key, value = (
            tokens.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for tokens in (query, key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        out, dropout = attention.to_out
        outcome: Tensor = dropout(out(attended.transpose(1, 2).flatten(2)))
        return outcome


@dataclass
class FusedGates:
    """A feed-forward's first half, whose gates are opened in one pass over what it projects."""

    layer: GEGLU

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Features times the GELU of their gates. [N, L, C] to [N, L, H]"""
        return geglu(self.layer.proj(hidden_states))


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
        tokens = project(hidden_states) if self.transformer.use_linear_projection else hidden_states
        pictures = tokens.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not self.transformer.use_linear_projection:
            pictures = project(pictures)
        summed: Tensor = pictures + residual
        return summed


@dataclass
class ActivatedTimes:
    """The timestep's embedding with the SiLU that every residual block would do for itself."""

    embedding: TimestepEmbedding

    def __call__(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embeddings. [N, C] to [N, D]"""
        embedded: Tensor = TimestepEmbedding.forward(self.embedding, sample, condition)
        return F.silu(embedded)


def install_fusion(unet: UNet2DConditionModel) -> Installed:
    """Let a U-Net's blocks move fewer bytes, until they are released.

    Group norms are fused with their SiLU and with what is added before, additions with the layer
    norm behind them, gates with their features; the timestep's SiLU is done once for all blocks.
    The norms before attention have no SiLU. There the gain is the layout: torch's own would turn
    channels-last features round, and they would be turned back for the linear layer behind. For the
    same reason what leaves a transformer keeps its layout. Blocks of other kinds than SD2's stay as
    they are.
    """
    installed = Installed()
    activated = _times_are_plain(unet)
    if activated:
        installed.install(unet.time_embedding, ActivatedTimes(unet.time_embedding))
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D) and _is_plain_resnet(block) and _adds_time(block):
            installed.install(block, FusedPictures(block, activated))
        if isinstance(block, Transformer2DModel) and isinstance(block.norm, nn.GroupNorm):
            installed.install(block.norm, FusedNorm(block.norm, silu=False))
            installed.install(block, KeptLayout(block), "_get_output_for_continuous_inputs")
        if isinstance(block, BasicTransformerBlock) and _is_plain_transformer(block):
            installed.install(block, FusedResiduals(block))
        if isinstance(block, Attention) and _is_plain_attention(block):
            installed.install(block, PlainAttention(block))
        if isinstance(block, GEGLU):
            installed.install(block, FusedGates(block))
    _fuse_last_norm(unet, installed)
    return installed


def install_picture_fusion(autoencoder: nn.Module) -> Installed:
    """Let the residual blocks of an autoencoder move fewer bytes, until they are released.

    As those of a U-Net, without timesteps. Blocks of other kinds than SD2's stay as they are.
    """
    installed = Installed()
    for block in autoencoder.modules():
        timeless = isinstance(block, ResnetBlock2D) and block.time_emb_proj is None
        if timeless and _is_plain_resnet(block):
            installed.install(block, FusedPictures(block))
        _fuse_last_norm(block, installed)
    return installed


def _fuse_last_norm(network: nn.Module, installed: Installed) -> None:
    """The norm and the activation before the last convolution, where there are such."""
    norm, act = (getattr(network, name, None) for name in ("conv_norm_out", "conv_act"))
    if isinstance(norm, nn.GroupNorm) and isinstance(act, nn.SiLU):
        installed.install(norm, FusedNorm(norm))
        installed.install(act, already_done)


def _is_plain_resnet(block: ResnetBlock2D) -> bool:
    """Whether a residual block has norms and a SiLU, and keeps the size of its pictures."""
    return (
        # Those that scale and shift by the timestep are of another kind; "group" is a decoder's.
        block.time_embedding_norm in ("default", "group")
        and all(type(norm) is nn.GroupNorm for norm in (block.norm1, block.norm2))
        and block.upsample is None
        and block.downsample is None
        and isinstance(block.nonlinearity, nn.SiLU)
    )


def _adds_time(block: ResnetBlock2D) -> bool:
    """Whether a residual block adds the timestep's embedding."""
    return block.time_emb_proj is not None and block.time_embedding_norm == "default"


def _times_are_plain(unet: UNet2DConditionModel) -> bool:
    """Whether every reader of the timestep's embedding does its SiLU first, and adds nothing."""
    blocks = [block for block in unet.modules() if isinstance(block, ResnetBlock2D)]
    besides = (unet.class_embedding, unet.time_embed_act, unet.config.addition_embed_type)
    return all(one is None for one in besides) and all(
        _is_plain_resnet(block) and _adds_time(block) and not block.skip_time_act
        for block in blocks
    )


def _is_plain_transformer(block: BasicTransformerBlock) -> bool:
    """Whether a block is self attention, cross attention and feed-forward behind layer norms."""
    norms = (block.norm1, block.norm2, block.norm3)
    return (
        block.norm_type == "layer_norm"
        and block.attn2 is not None
        and block.pos_embed is None
        and block._chunk_size is None
        and not hasattr(block, "fuser")
        and all(type(norm) is nn.LayerNorm and "forward" not in vars(norm) for norm in norms)
    )


def _is_plain_attention(attention: Attention) -> bool:
    """Whether attention runs torch's function on what its layers project, and nothing besides."""
    besides = (attention.spatial_norm, attention.group_norm, attention.norm_cross)
    return (
        type(attention.processor) is AttnProcessor2_0
        and all(not norm for norm in (*besides, attention.norm_q, attention.norm_k))
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )
