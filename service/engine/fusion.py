"""A U-Net on a GPU: norms and gates in one pass with what is behind them, and one layout kept."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

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

    def __call__(self, x: Tensor) -> Tensor:
        """norm(x), or silu(norm(x)). [N, C, H, W]"""
        norm = self.norm
        return groupnorm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=self.silu)


def silu_of_timesteps(x: Tensor) -> Tensor:
    """SiLU of a timestep's embedding; features come with theirs done. [N, D] or [N, C, H, W]"""
    return x if x.dim() == 4 else F.silu(x)


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


def install_fusion(unet: UNet2DConditionModel) -> Installed:
    """Fuse group norms with their SiLU, and gates with their features, until they are released.

    The norms before attention have none. There the gain is the layout: torch's own would turn
    channels-last features round, and they would be turned back for the linear layer behind. For
    the same reason what leaves a transformer keeps its layout.
    """
    installed = Installed()
    for block in unet.modules():
        plain = isinstance(block, ResnetBlock2D) and block.time_embedding_norm == "default"
        if plain and isinstance(block.nonlinearity, nn.SiLU):
            for norm in (block.norm1, block.norm2):
                installed.install(norm, FusedNorm(norm))
            installed.install(block.nonlinearity, silu_of_timesteps)
        if isinstance(block, Transformer2DModel) and isinstance(block.norm, nn.GroupNorm):
            installed.install(block.norm, FusedNorm(block.norm, silu=False))
            installed.install(block, KeptLayout(block), "_get_output_for_continuous_inputs")
        if isinstance(block, GEGLU):
            installed.install(block, FusedGates(block))
    if isinstance(unet.conv_norm_out, nn.GroupNorm) and isinstance(unet.conv_act, nn.SiLU):
        installed.install(unet.conv_norm_out, FusedNorm(unet.conv_norm_out))
        installed.install(unet.conv_act, silu_of_timesteps)
    return installed
