"""Keys and values of prompts, which no step changes: made when a batch comes together."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor

from service.engine.token_blocks import FusedResiduals, Place, PlainAttention

# Goes with the tensor to the U-Net.
TOLD = {"cross_attention_kwargs": {"projected": True}}


class ProjectedPrompts:
    """What all cross attention of a fused U-Net takes of its prompts, layer by layer in one tensor.

    The U-Net takes that tensor in the place of its prompts when it is ``TOLD`` so.

    Args:
        layers: Attention that reads prompts, as the U-Net computes it.

    Attributes:
        width: Channels of all keys and values.
    """

    def __init__(self, layers: Sequence[PlainAttention]) -> None:
        self._layers = layers
        self.width = 0
        for layer in layers:
            layer.place = Place(self.width, layer.attention.to_k.out_features)
            self.width += 2 * layer.place.width

    def project(self, prompts: Tensor, out: Tensor) -> None:
        """Write keys and values of each sample's prompt, by the weights as they are composed.

        Args:
            prompts: [N, K, D]
            out: Laid out as only ``Place`` knows. [width, N, K]
        """
        for layer in self._layers:
            assert layer.place is not None
            keys, values = layer.place.of(out)
            keys.copy_(layer.attention.to_k(prompts))
            values.copy_(layer.attention.to_v(prompts))


def projected_prompts(unet: UNet2DConditionModel) -> ProjectedPrompts | None:
    """For a U-Net that ``install_fusion`` fused; None where something else reads prompts too."""
    config = unet.config
    if "forward" in vars(unet) or any(
        config[name] is not None for name in ("encoder_hid_dim_type", "addition_embed_type")
    ):
        return None
    layers = []
    for module in unet.modules():
        way = vars(module).get("forward")
        if isinstance(module, Attention) and module.is_cross_attention:
            if not isinstance(way, PlainAttention):
                return None
            layers.append(way)
        if isinstance(module, BasicTransformerBlock) and (
            not isinstance(way, FusedResiduals) or module.only_cross_attention
        ):
            return None
    return ProjectedPrompts(layers) if layers else None
