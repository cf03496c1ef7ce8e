"""Blocks that move fewer bytes give what diffusers' own give, whoever replaced their layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from service.engine.fusion import install_fusion, install_picture_fusion
from service.engine.layers import without_bias
from service.engine.picture_blocks import DoubledPictures, FusedPictures, doubled
from service.engine.token_blocks import FusedResiduals, PlainAttention
from tests.tiny import tiny_base


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As the engine runs."""
    with torch.no_grad():
        yield


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(module: Any) -> Any:
    """A module whose parameters are all of their own, norms included."""
    for place, parameter in enumerate(module.parameters()):
        parameter.copy_(draw(place, *parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
    return module.eval()


def replace(layer: nn.Module) -> None:
    """Let a layer go another way, as adapters do: its own outcome and a term beside it."""
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 1.5 + 0.25  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("convolution", ["plain", "replaced"])
@pytest.mark.parametrize(("out", "factor"), [(8, 1.0), (16, 1.0), (8, 2.0)])
def test_a_residual_block_gives_what_it_gave(convolution: str, out: int, factor: float) -> None:
    """With and without a shortcut, also where a factor divides and an adapter replaced a layer."""
    block = drawn(
        ResnetBlock2D(
            in_channels=8, out_channels=out, temb_channels=6, groups=4, output_scale_factor=factor
        )
    )
    features, timestep = draw(1, 2, 8, 5, 6), draw(2, 2, 6)
    if convolution == "replaced":
        replace(block.conv1)
    features = features.contiguous(memory_format=torch.channels_last)
    outcome = FusedPictures(block)(features, timestep)
    torch.testing.assert_close(outcome, block(features, timestep), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("only_cross", [True, False])
def test_a_transformer_block_gives_what_it_gave(affine: bool, only_cross: bool) -> None:
    """Norms with and without parameters, and layers that an adapter replaced."""
    block = drawn(
        BasicTransformerBlock(
            8,
            2,
            4,
            cross_attention_dim=6,
            norm_elementwise_affine=affine,
            only_cross_attention=only_cross,
        )
    )
    replace(block.attn1.to_q)
    replace(block.attn2.to_out[0])
    tokens, prompts = draw(1, 2, 9, 8), draw(2, 2, 7, 6)
    outcome = FusedResiduals(block)(tokens, encoder_hidden_states=prompts)
    wanted = block(tokens, encoder_hidden_states=prompts)
    torch.testing.assert_close(outcome, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(4, 3), (2, 5, 4)), (nn.Conv2d(4, 3, 1), (2, 4, 5, 6))]
)
def test_a_bias_waits_only_where_a_layer_is_its_own(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    """A layer that something replaced adds its bias itself."""
    x = draw(1, *shape)
    wanted = layer(x)
    out, bias = without_bias(layer, x)
    assert bias is layer.bias
    assert isinstance(bias, Tensor)
    torch.testing.assert_close(out + (bias if x.dim() == 3 else bias[:, None, None]), wanted)
    replace(layer)
    out, bias = without_bias(layer, x)
    assert bias is None
    assert torch.equal(out, layer(x))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("crosses", [True, False])
def test_attention_gives_what_it_gave(crosses: bool, masked: bool) -> None:
    """Of tokens and of prompts; with a mask it goes diffusers' way."""
    attention = drawn(Attention(8, 6 if crosses else None, heads=2, dim_head=4))
    replace(attention.to_k)
    tokens, prompts = draw(1, 2, 9, 8), draw(2, 2, 9, 6) if crosses else None
    mask = draw(3, 2, 1, 9) * 5 if masked else None
    wanted = attention(tokens, prompts, attention_mask=mask)
    attended = PlainAttention(attention)(tokens, prompts, attention_mask=mask)
    torch.testing.assert_close(attended, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_of_another_kind_stays_as_it_is() -> None:
    """Attention with a processor or a factor of its own, and norms that somebody replaced."""
    unet = tiny_base().unet
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    blocks[0].attn1.set_processor(AttnProcessor())
    blocks[0].attn2.rescale_output_factor = 2.0
    blocks[1].norm2 = nn.Identity()
    resnet = next(module for module in unet.modules() if isinstance(module, ResnetBlock2D))
    resnet.nonlinearity = nn.GELU()
    installed = install_fusion(unet)
    kept = (blocks[0].attn1, blocks[0].attn2, blocks[1], resnet)
    assert [module for module in kept if "forward" in vars(module)] == []
    assert "forward" in vars(blocks[0])
    installed.release()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_fused_autoencoder_gives_what_it_gave(layout: torch.memory_format) -> None:
    """Ways in and out; released, to the bit."""
    autoencoder = drawn(tiny_base().autoencoder).to(memory_format=layout)
    pictures, latents = draw(1, 2, 3, 32, 32), draw(2, 2, 4, 4, 4)
    encoded = autoencoder.encode(pictures).latent_dist.mode()
    decoded = autoencoder.decode(latents).sample
    blocks = [module for module in autoencoder.modules() if isinstance(module, ResnetBlock2D)]
    installed = install_picture_fusion(autoencoder)
    upsamplers = [module for module in autoencoder.modules() if isinstance(module, Upsample2D)]
    # The last norm and activation of both halves besides.
    assert len(installed.methods) == len(blocks) + len(upsamplers) + 4
    for ours, theirs in (
        (autoencoder.encode(pictures).latent_dist.mode(), encoded),
        (autoencoder.decode(latents).sample, decoded),
    ):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-5)
    installed.release()
    assert torch.equal(autoencoder.decode(latents).sample, decoded)


@pytest.mark.parametrize("channels", [8, 6, 3])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_doubled_pictures_are_nearest_neighbours(channels: int, kind: torch.dtype) -> None:
    """Whatever pieces they are copied in, and laid out as convolutions read."""
    for layout in (torch.contiguous_format, torch.channels_last):
        features = draw(1, 2, channels, 3, 5).to(kind).contiguous(memory_format=layout)
        ours = doubled(features)
        assert torch.equal(ours, functional.interpolate(features, scale_factor=2.0, mode="nearest"))
        assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_pictures_are_doubled_on_a_gpu_as_diffusers_does_it() -> None:
    """With its convolution; another size than twice goes diffusers' way."""
    layer = drawn(Upsample2D(8, use_conv=True)).to("cuda")
    features = draw(1, 2, 8, 3, 5).to("cuda").contiguous(memory_format=torch.channels_last)
    for size in (None, (7, 11)):
        wanted = layer(features, size)
        torch.testing.assert_close(
            DoubledPictures(layer)(features, size), wanted, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_half_precision_a_fused_network_is_as_exact_as_a_plain_one(device: str) -> None:
    """Both against float32: fused layers round no more often than those that they replace."""
    unet = tiny_base().unet
    inputs = draw(1, 4, 9, 8, 8), torch.tensor([500, 20, 999, 1]), draw(2, 4, 77, 16)
    exact = unet(*inputs).sample
    unet = unet.to(device, torch.bfloat16, memory_format=torch.channels_last)
    half = (
        inputs[0].to(device, torch.bfloat16),
        inputs[1].to(device),
        inputs[2].to(device).bfloat16(),
    )
    errors = []
    plain = unet(*half).sample
    installed = install_fusion(unet)
    fused = unet(*half).sample
    installed.release()
    for prediction in (plain, fused):
        errors.append(float((prediction.float().cpu() - exact).square().mean().sqrt()))
    assert errors[1] <= 1.25 * errors[0]
