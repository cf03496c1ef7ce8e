"""The recipe of nano, at a scale that a test can run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from realfill.base import load_base
from realfill.errors import TrainingDiverged
from realfill.nano.autoencoder import (
    calibrate,
    motorcycle_crops,
    new_autoencoder,
    psnr,
    sensitivity,
)
from realfill.nano.denoiser import holes, new_denoiser
from realfill.nano.pool import picture_pool
from realfill.nano.pretrain import rebuild
from realfill.nano.stage import RunningLoss, learning_rate
from realfill.nano.tokenizer import byte_tokenizer


def test_pool_is_drawn_once_and_kept(tmp_path: Path) -> None:
    """The second call reads what the first wrote; the k-th picture does not depend on the count."""
    captions, pictures = picture_pool(tmp_path, drawn=3, photographed=2, seed=1)
    again = picture_pool(tmp_path, drawn=3, photographed=2, seed=1)
    assert captions == again[0]
    assert np.array_equal(pictures, again[1])
    assert pictures.shape == (5, 160, 160, 3)
    assert captions[3:] == ["a photo of astronaut", "a photo of chelsea"]
    fewer = picture_pool(tmp_path, drawn=2, photographed=1, seed=1)[1]
    assert np.array_equal(fewer[:2], pictures[:2])


def test_calibration_changes_latents_and_not_pictures() -> None:
    """The channels are mixed until pixels feel them alike; what goes through stays what it was."""
    torch.manual_seed(0)
    autoencoder = new_autoencoder().eval()
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (4, 160, 160, 3), dtype=torch.uint8, generator=generator)
    pixels = motorcycle_crops()[:1]
    with torch.no_grad():
        plain = autoencoder.encode(pixels).latent
        before = autoencoder.decode(plain).sample
        calibrate(autoencoder, pictures, seed=0)
        latents = autoencoder.encode(pixels).latent
        after = autoencoder.decode(latents).sample
        gram = sensitivity(autoencoder, latents)
    assert not torch.allclose(plain, latents, atol=1e-2)
    assert torch.allclose(before, after, atol=1e-3)
    own = gram.diagonal()
    assert float((gram - own.diag()).abs().max()) < 0.5 * float(own.mean())
    assert float(own.max() / own.min()) < 3


def test_holes_are_masks_of_many_kinds() -> None:
    """Zeros and ones, never empty, sometimes full."""
    generator = torch.Generator().manual_seed(0)
    shares = holes(generator, 1000).mean((1, 2)).tolist()
    assert min(shares) > 0
    assert max(shares) == 1.0
    assert 0.02 < np.mean([share == 1.0 for share in shares]) < 0.15


def test_denoiser_fits_the_budget() -> None:
    """About 11 M parameters, transformer blocks at every level."""
    unet = new_denoiser()
    assert sum(p.numel() for p in unet.parameters()) < 11_000_000
    assert set(unet.config.down_block_types) == {"CrossAttnDownBlock2D"}


def test_learning_rate_warms_up_and_falls() -> None:
    """Linear to the peak, then down to a hundredth."""
    rates = [learning_rate(step, 1000, 1.0, warm_up=100) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[-1] == pytest.approx(0.01, abs=0.001)


def test_a_loss_that_is_not_finite_ends_a_stage_before_its_weights_are_kept() -> None:
    """The mean starts with the first loss, goes on from what was kept, and is never NaN."""
    running = RunningLoss("denoiser", 0.9)
    for loss in (2.0, 1.0):
        running.take(torch.tensor(loss))
    assert running.value == pytest.approx(1.9)
    resumed = RunningLoss("denoiser", 0.9, step=2, mean=running.read())
    resumed.take(torch.tensor(1.9))
    assert resumed.value == pytest.approx(1.9)
    with pytest.raises(TrainingDiverged, match=r"stage denoiser is nan at step 4; lower"):
        resumed.take(torch.tensor(float("nan")))


def test_tokenizer_knows_every_byte() -> None:
    """Any text becomes at most 77 known tokens."""
    tokens = byte_tokenizer()("a photo of sks é", padding="max_length", max_length=77)["input_ids"]
    assert len(tokens) == 77
    assert tokens[0] == 512
    assert max(tokens) == 513


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recipe_runs_from_nothing_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """A thousandth of the recipe writes a base that loads; a second run repeats nothing."""
    stages = [s.stage for s in rebuild(tmp_path / "w", tmp_path / "o", device="cpu", scale=0.001)]
    assert list(dict.fromkeys(stages)) == ["autoencoder", "encoding", "denoiser", "matcher"]
    base = load_base(str(tmp_path / "o" / "base"))
    assert base.size_px == 128
    again = [s.stage for s in rebuild(tmp_path / "w", tmp_path / "o", device="cpu", scale=0.001)]
    assert again == []
    assert load_base(str(tmp_path / "o" / "base")).fingerprint == base.fingerprint


@pytest.mark.weights
def test_shipped_autoencoder_passes_its_bar() -> None:
    """At least 24 dB on the motorcycle, which it never saw."""
    base = load_base("nano")
    assert psnr(base.autoencoder, motorcycle_crops()) >= 24.0
