"""GroupNorm and the SiLU after it in one pass, in every residual block of a U-Net on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.groupnorm_silu import groupnorm_silu
from service.engine.layers import Installed


@dataclass
class NormWithSilu:
    """A group norm that has its SiLU already done."""

    norm: nn.GroupNorm

    def __call__(self, x: Tensor) -> Tensor:
        """silu(norm(x)). [N, C, H, W]"""
        norm = self.norm
        return groupnorm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def silu_of_timesteps(x: Tensor) -> Tensor:
    """SiLU of a timestep's embedding; features come with theirs done. [N, D] or [N, C, H, W]"""
    return x if x.dim() == 4 else F.silu(x)


def install_fusion(unet: UNet2DConditionModel) -> Installed:
    """Fuse all pairs of group norm and SiLU, until they are released."""
    installed = Installed()
    for block in unet.modules():
        plain = isinstance(block, ResnetBlock2D) and block.time_embedding_norm == "default"
        if plain and isinstance(block.nonlinearity, nn.SiLU):
            for norm in (block.norm1, block.norm2):
                installed.install(norm, NormWithSilu(norm))
            installed.install(block.nonlinearity, silu_of_timesteps)
    if isinstance(unet.conv_norm_out, nn.GroupNorm) and isinstance(unet.conv_act, nn.SiLU):
        installed.install(unet.conv_norm_out, NormWithSilu(unet.conv_norm_out))
        installed.install(unet.conv_act, silu_of_timesteps)
    return installed
