"""Gradients of a pretraining step: in two parts, and as a captured graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from realfill.nano.denoiser import new_denoiser, new_scheduler, new_text_encoder
from realfill.nano.denoiser_step import CapturedGradients, Gradients, Triples, draw
from realfill.nano.tokenizer import byte_tokenizer
from realfill.precision import training_dtype

BATCH = 3


def triples(device: str, seed: int = 0) -> Triples:
    """A few that are noise, of two captions."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 5, 20, 16, 16, generator=generator)
    return Triples(
        latents=latents[0].to(device),
        masked=latents[1].to(device),
        masks=(torch.rand(5, 1, 16, 16, generator=generator) > 0.5).float().to(device),
        captions=torch.tensor([0, 1, 0, 1, 1], device=device),
        texts=("a cat", "a dog", "a photo of sks", ""),
    )


def tokens_of(texts: tuple[str, ...], device: str) -> Tensor:
    """Padded to the text encoder's length. [K, 77]"""
    told = byte_tokenizer()(
        list(texts), padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    return torch.as_tensor(told).to(device)


def test_split_gradients_are_those_of_the_whole() -> None:
    """The text encoder learns through the prompts as if nothing were cut between the two."""
    torch.manual_seed(0)
    unet, text_encoder = new_denoiser().train(), new_text_encoder().train()
    known = triples("cpu")
    drawn = draw(new_scheduler(), known, torch.Generator().manual_seed(1), BATCH)
    tokens = tokens_of(known.texts, "cpu")
    parameters = [*unet.named_parameters(), *text_encoder.named_parameters()]

    prompts = text_encoder(tokens)[0][drawn.captions]
    with torch.autocast("cpu", enabled=False):
        predicted = unet(drawn.stacked, drawn.timesteps, prompts).sample
    weights = 0.2 + 0.8 * drawn.masks
    error = (predicted - drawn.velocity).square().mean(1, keepdim=True)
    whole = (weights * error).sum() / weights.sum()
    whole.backward()
    expected = {name: p.grad.clone() for name, p in parameters if p.grad is not None}

    loss = Gradients(unet, text_encoder)(drawn, tokens)
    # On a processor that computes in bfloat16 the passes are in it.
    rough = training_dtype("cpu") == torch.bfloat16
    tolerance = 0.1 if rough else 1e-4
    assert float(loss) == pytest.approx(float(whole.detach()), rel=tolerance)
    # Where terms cancel, a gradient errs by their size, not its own: by 0.15 % of the largest.
    least = 2e-2 if rough else 1e-2
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, parameter in parameters:
        if name in expected:
            assert parameter.grad is not None
            apart = float((parameter.grad - expected[name]).norm())
            assert apart <= tolerance * (float(expected[name].norm()) + least * largest), name


@pytest.mark.gpu
def test_captured_gradients_are_those_of_plain_steps() -> None:
    """Replayed for draws that the capture has not seen; the first call is no exception."""
    torch.manual_seed(0)
    unet, text_encoder = new_denoiser().cuda().train(), new_text_encoder().cuda().train()
    unet.to(memory_format=torch.channels_last)
    known = triples("cuda")
    tokens = tokens_of(known.texts, "cuda")
    captured = CapturedGradients(unet, text_encoder)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        drawn = draw(new_scheduler(), known, generator, BATCH)
        loss = captured(drawn, tokens).clone()
        found = [None if p.grad is None else p.grad.clone() for p in parameters]
        plain = Gradients(unet, text_encoder)
        kept = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        assert float(loss) == pytest.approx(float(plain(drawn, tokens)), rel=1e-2)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None and parameter.grad is not None:
                apart = (gradient - parameter.grad).norm()
                assert float(apart) <= 0.05 * float(parameter.grad.norm()) + 1e-4
        # The graph writes to these.
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
