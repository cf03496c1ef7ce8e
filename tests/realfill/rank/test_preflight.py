"""Pre-flight warns of what is wrong, with numbers, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from realfill.rank import Caution, load_matcher, preflight
from realfill.rank.preflight import MOST_BLUR, measure_blur


def photo(name: str, width: int = 720, height: int = 512) -> Tensor:
    """A photograph of the scikit-image wheel. [3, height, width]"""
    with Image.open(Path(skimage.data.__file__).parent / name) as opened:
        sized = opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(sized, np.float32) / 255).permute(2, 0, 1)


def hole(share: float = 0.25) -> Tensor:
    """A mask whose hole takes that share of the width, in the middle. [512, 720]"""
    mask = torch.zeros(512, 720)
    half = round(720 * share / 2)
    mask[:, 360 - half : 360 + half] = 1
    return mask


def told(warnings: list[Caution]) -> list[tuple[str, str]]:
    return [(warning.code, warning.subject) for warning in warnings]


@pytest.mark.weights
def test_a_good_scene_has_no_warning() -> None:
    """Two sharp views of one place and a fair hole."""
    references, target = [photo("motorcycle_left.png")], photo("motorcycle_right.png")
    assert preflight(references, target, hole(), matcher=load_matcher("nano")) == []


@pytest.mark.weights
def test_a_reference_of_another_place_is_told_by_its_overlap() -> None:
    """Only the wrong one is named, with the share of cells that it matches."""
    references = [photo("motorcycle_left.png"), photo("coffee.png")]
    found = preflight(
        references, photo("motorcycle_right.png"), hole(), matcher=load_matcher("nano")
    )
    assert told(found) == [("overlap", "reference 2")]
    assert 0 <= found[0].value < found[0].bound == 0.1
    assert "use a photo that shares more" in found[0].message


def test_blur_and_resolution_are_measured() -> None:
    """A photo at a fifth of its resolution is small, and enlarged again it is blurred."""
    sharp = photo("motorcycle_left.png")
    small = F.interpolate(sharp[None], scale_factor=0.2, mode="area")[0]
    soft = F.interpolate(small[None], size=(512, 720), mode="bicubic")[0].clamp(0, 1)
    found = preflight([small, soft], photo("motorcycle_right.png"), hole())
    assert told(found) == [
        ("small", "reference 1"),
        ("blurred", "reference 2"),
    ]
    assert found[0].value == 102
    assert measure_blur(soft) > MOST_BLUR > measure_blur(sharp)


def test_blank_and_grey_photos_have_a_blur() -> None:
    """No edge at all is the most blur; one channel means what three equal ones mean."""
    assert measure_blur(torch.full((3, 40, 40), 0.5)) == 1.0
    grey = photo("coffee.png").mean(0, keepdim=True)
    assert measure_blur(grey) == pytest.approx(measure_blur(grey.expand(3, -1, -1)), abs=1e-3)


@pytest.mark.parametrize(
    ("mask", "codes"),
    [
        (hole(0.0), ["hole_small"]),
        (hole(0.9), ["hole_large"]),
        (hole() * 0.5, ["mask_grey"]),
        (torch.ones(512, 720), ["hole_large"]),
    ],
)
def test_masks_are_checked(mask: Tensor, codes: list[str]) -> None:
    """Nothing missing, nearly everything missing, and shades between, each with its share."""
    found = preflight([photo("motorcycle_left.png")], photo("motorcycle_right.png"), mask)
    assert [warning.code for warning in found] == codes
    assert all(warning.subject == "mask" for warning in found)
    assert f"{found[0].value:.1%}"[:2] in found[0].message


def test_a_reference_that_is_the_target_is_told() -> None:
    """The same photo, its hole whitened, teaches nothing."""
    target = photo("motorcycle_right.png")
    holed = torch.where(hole() > 0, 1.0, target)
    assert told(preflight([target], holed, hole())) == [("reference_is_target", "reference 1")]
