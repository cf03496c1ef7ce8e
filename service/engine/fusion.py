"""Which blocks of a network are replaced by those that move fewer bytes, and keep one layout."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from service.engine.attention import Attend, attend_by_torch
from service.engine.layers import Installed
from service.engine.picture_blocks import (
    ActivatedTimes,
    DoubledPictures,
    FusedNorm,
    FusedPictures,
    KeptLayout,
    already_done,
)
from service.engine.token_blocks import FusedGates, FusedResiduals, PlainAttention


def install_fusion(unet: UNet2DConditionModel, attend: Attend = attend_by_torch) -> Installed:
    """Let a U-Net's blocks move fewer bytes, until they are released.

    Group norms are fused with their SiLU and with what is added before, additions with the layer
    norm behind them, gates with their features; the timestep's SiLU is done once for all blocks.
    The norms before attention have no SiLU. There the gain is the layout: torch's own would turn
    channels-last features round, and they would be turned back for the linear layer behind. For the
    same reason what leaves a transformer keeps its layout. Pictures are doubled by copies. Blocks
    of other kinds than SD2's stay as they are.

    Args:
        unet: To install them in.
        attend: How its tokens attend to tokens.
    """
    installed = install_attention(unet, attend)
    activated = times_are_plain(unet)
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
        if isinstance(block, GEGLU):
            installed.install(block, FusedGates(block))
        if isinstance(block, Upsample2D) and _doubles(block):
            installed.install(block, DoubledPictures(block))
    _fuse_last_norm(unet, installed)
    return installed


def install_attention(unet: UNet2DConditionModel, attend: Attend) -> Installed:
    """Let tokens attend to tokens in another way, where SD2's way is plain, until released."""
    installed = Installed()
    for block in unet.modules():
        if isinstance(block, Attention) and _is_plain_attention(block):
            installed.install(block, PlainAttention(block, attend))
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
        if isinstance(block, Upsample2D) and _doubles(block):
            installed.install(block, DoubledPictures(block))
        _fuse_last_norm(block, installed)
    return installed


def install_fusions(
    autoencoder: nn.Module, unet: UNet2DConditionModel | None, attend: Attend
) -> list[Installed]:
    """Those of both networks, or the autoencoder's alone."""
    installed = [install_picture_fusion(autoencoder)]
    return installed if unet is None else [*installed, install_fusion(unet, attend)]


def largest_attention(unet: UNet2DConditionModel, cells: int) -> tuple[int, int, int, int]:
    """What eight samples' first attention takes. (N, L, H, W)

    Args:
        unet: The network.
        cells: Of a picture, by which its tokens are counted before it is made smaller.
    """
    first = next(module for module in unet.modules() if isinstance(module, Attention))
    return 8, cells, first.heads, first.inner_dim // first.heads


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


def _doubles(layer: Upsample2D) -> bool:
    """Whether a layer is nearest neighbours and a convolution, and nothing besides."""
    plain = layer.norm is None and not layer.use_conv_transpose and layer.interpolate
    return bool(plain and layer.use_conv and layer.name == "conv")


def _adds_time(block: ResnetBlock2D) -> bool:
    """Whether a residual block adds the timestep's embedding."""
    return block.time_emb_proj is not None and block.time_embedding_norm == "default"


def times_are_plain(unet: UNet2DConditionModel) -> bool:
    """Whether every reader of the timestep's embedding does its SiLU first, and adds nothing."""
    blocks = [block for block in unet.modules() if isinstance(block, ResnetBlock2D)]
    besides = (unet.class_embedding, unet.time_embed_act, unet.config.addition_embed_type)
    return all(one is None for one in besides) and all(
        _is_plain_resnet(block) and _adds_time(block) and not block.skip_time_act
        for block in blocks
    )


def plain_cross_attention(unet: UNet2DConditionModel) -> list[PlainAttention]:
    """All that reads prompts in a fused U-Net; nothing where something else reads them too."""
    config = unet.config
    if any(config[name] is not None for name in ("encoder_hid_dim_type", "addition_embed_type")):
        return []
    found = []
    for module in unet.modules():
        way = vars(module).get("forward")
        if isinstance(module, Attention) and module.is_cross_attention:
            if not isinstance(way, PlainAttention):
                return []
            found.append(way)
        if isinstance(module, BasicTransformerBlock) and (
            not isinstance(way, FusedResiduals) or module.only_cross_attention
        ):
            return []
    return found


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
