"""Keys and values of prompts, which no step changes: made when a batch comes together."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DConditionModel
from torch import Tensor

from service.engine.fusion import plain_cross_attention
from service.engine.token_blocks import Place, PlainAttention

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
    layers = [] if "forward" in vars(unet) else plain_cross_attention(unet)
    return ProjectedPrompts(layers) if layers else None
