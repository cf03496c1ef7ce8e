"""Metrics inside the hole, against hand-computed values and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from realfill.errors import InvalidScene
from realfill.metrics import psnr, ssim, ssim_map


def _hole(height: int = 16, width: int = 16) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[4:8, 4:12] = 1
    return mask


def test_psnr_of_a_tenth_is_twenty_decibel() -> None:
    """An error of 0.1 everywhere in the hole has a mean square of 0.01: 20 dB."""
    truth = torch.full((3, 16, 16), 0.5)

    assert psnr(truth + 0.1 * _hole(), truth, _hole()) == pytest.approx(20, abs=1e-5)


def test_psnr_ignores_the_known_region() -> None:
    """Errors outside the hole change nothing."""
    truth = torch.full((3, 16, 16), 0.5)
    image = torch.where(_hole() > 0, truth + 0.1, torch.zeros(()))

    assert psnr(image, truth, _hole()) == pytest.approx(20, abs=1e-5)


def test_psnr_averages_squares_before_the_logarithm() -> None:
    """One channel wrong by 0.3, two right: the mean square is 0.03."""
    truth = torch.full((3, 16, 16), 0.5)
    image = truth.clone()
    image[0] += 0.3

    assert psnr(image, truth, _hole()) == pytest.approx(-10 * math.log10(0.03), abs=1e-5)


def test_psnr_of_equal_images_is_infinite() -> None:
    """No error, no bound."""
    truth = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))

    assert psnr(truth, truth, _hole()) == math.inf


def test_ssim_of_equal_images_is_one() -> None:
    """An image is like itself."""
    truth = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))

    assert ssim(truth, truth, _hole()) == pytest.approx(1)


def test_ssim_of_constants_is_the_luminance_term() -> None:
    """Flat images of 0.2 and 0.6 have no structure: (2ab + c1) / (a^2 + b^2 + c1)."""
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    dark, light = torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 0.6)

    assert ssim(dark, light, _hole()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("height,width", [(16, 16), (31, 47)])
def test_ssim_map_equals_scikit_image(height: int, width: int) -> None:
    """The whole map, borders included, is that of an independent implementation."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(3, height, width, generator=generator)
    image = (truth + 0.2 * torch.randn(3, height, width, generator=generator)).clamp(0, 1)
    _, expected = structural_similarity(
        image.double().numpy(),
        truth.double().numpy(),
        channel_axis=0,
        data_range=1,
        full=True,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )

    np.testing.assert_allclose(ssim_map(image, truth).numpy(), expected, atol=1e-9)
    hole = _hole(height, width).bool().numpy()
    assert ssim(image, truth, _hole(height, width)) == pytest.approx(expected[:, hole].mean())


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metric_refuses_an_empty_mask(metric) -> None:  # type: ignore[no-untyped-def]
    """Without a hole there is nothing to compare."""
    with pytest.raises(InvalidScene, match=r"mask is empty"):
        metric(torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), torch.zeros(16, 16))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metric_refuses_other_sizes(metric) -> None:  # type: ignore[no-untyped-def]
    """A mask of another size is named, not broadcast."""
    with pytest.raises(InvalidScene, match=r"mask \[1, 16\]"):
        metric(torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), torch.ones(1, 16))
