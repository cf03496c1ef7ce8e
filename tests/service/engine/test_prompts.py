"""Prompts are projected when a batch comes together, and give what they give in every step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor

from service.engine.fusion import install_fusion
from service.engine.prompts import TOLD, projected_prompts
from service.engine.runner import Runner
from service.engine.weights import SpoiltWeights
from tests.service.engine.test_mixing import begun, job_for
from tests.tiny import tiny_base


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As the engine runs."""
    with torch.no_grad():
        yield


def cross_attention(unet: torch.nn.Module) -> list[Attention]:
    """What reads prompts."""
    return [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]


def test_a_unet_predicts_the_same_by_projected_prompts() -> None:
    """To the bit, with prompts of different scenes in one batch."""
    unet = tiny_base().unet
    installed = install_fusion(unet)
    projected = projected_prompts(unet)
    assert projected is not None
    layers = cross_attention(unet)
    assert projected.width == sum(2 * layer.inner_dim for layer in layers)
    inputs = torch.randn(3, 9, 4, 4), torch.tensor([500, 20, 3])
    prompts = torch.randn(3, 77, 16)
    plain = unet(*inputs, prompts).sample
    kept = torch.full((projected.width, 3, 77), torch.nan)
    projected.project(prompts, kept)
    assert torch.equal(unet(*inputs, kept, **TOLD).sample, plain)
    installed.release()


def test_prompts_that_something_else_reads_are_left_as_they_are() -> None:
    """Attention of another kind, a block that is not fused, and a U-Net that is not at all."""
    unet = tiny_base().unet
    assert projected_prompts(unet) is None
    cross_attention(unet)[0].set_processor(AttnProcessor())
    installed = install_fusion(unet)
    assert projected_prompts(unet) is None
    installed.release()
    unet = tiny_base().unet
    block = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
    block.norm2 = torch.nn.Identity()
    install_fusion(unet)
    assert projected_prompts(unet) is None


def test_prompts_are_projected_when_the_company_or_the_weights_change() -> None:
    """And not by the steps between."""
    base = tiny_base()
    runner = Runner(base, application="segmented", static=True, split_from=99)
    jobs = [job_for(base, "a", 1, steps=8), job_for(base, "b", 2, steps=8)]
    one, other = (begun(runner, job) for job in jobs)
    calls: list[int] = []
    layer = cross_attention(base.unet)[0].to_k
    way = layer.forward
    layer.forward = lambda x: calls.append(len(x)) or way(x)  # type: ignore[func-returns-value]
    for moving, made in ((one, 1), (one, 1), ([*one, *other], 2), ([*one, *other], 2), (one, 3)):
        runner.step(moving)
        assert len(calls) == made
    target = next(iter(runner.weights._modules.values()))  # type: ignore[attr-defined]
    target.weight.add_(1)
    with pytest.raises(SpoiltWeights):
        runner.step(one)
    runner.step(one)
    assert len(calls) == 4
    layer.forward = way
    runner.release()
