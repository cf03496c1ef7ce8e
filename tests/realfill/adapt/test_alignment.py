"""Places of the target's window in references that are known similarities of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.transform import SimilarityTransform, warp
from torch import Tensor
from torch.nn import functional as F

from realfill.adapt.alignment import windows_in_references
from realfill.complete.windows import Window, window_of
from realfill.nano.demo import motorcycle_scene
from realfill.scene import Scene

SIZE_PX = 128


@pytest.fixture(scope="module")
def motorcycle() -> Scene:
    """Photographs from two places half a step apart, at half their size, which is quicker."""
    whole = motorcycle_scene()
    assert whole.truth is not None
    return Scene(
        name=whole.name,
        references=tuple(half(image) for image in whole.references),
        target=half(whole.target),
        mask=(half(whole.mask[None])[0] > 0).float(),
        truth=half(whole.truth),
        digests={},
    )


def half(image: Tensor) -> Tensor:
    """The image at half its size. [C, H, W] to [C, H/2, W/2]"""
    return F.avg_pool2d(image[None], 2)[0]


def seen(image: Tensor, *, scale: float, turn: float, shift: tuple[float, float]) -> Tensor:
    """The image as a reference of the same size that shows it scaled, turned and shifted."""
    moved = SimilarityTransform(scale=scale, rotation=turn, translation=shift)
    pixels = warp(image.permute(1, 2, 0).numpy(), moved.inverse, mode="edge")
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).clamp(0, 1)


def with_reference(scene: Scene, reference: Tensor) -> Scene:
    """The scene with another reference and no other."""
    return Scene(
        name=scene.name,
        references=(reference,),
        target=scene.target,
        mask=scene.mask,
        truth=None,
        digests={},
    )


def placed(scene: Scene, reference: Tensor) -> Window | None:
    """Where the target's window lies in the reference."""
    (window,) = windows_in_references(
        with_reference(scene, reference), window_of(scene.mask, SIZE_PX)
    )
    return window


def test_scaled_and_shifted_reference_is_found(motorcycle: Scene) -> None:
    """Within a fiftieth of the window's side."""
    assert motorcycle.truth is not None
    reference = seen(motorcycle.truth, scale=0.7, turn=0.05, shift=(45.0, 30.0))
    window = window_of(motorcycle.mask, SIZE_PX)
    found = placed(motorcycle, reference)
    assert found is not None
    half = window.side / 2
    moved = SimilarityTransform(scale=0.7, rotation=0.05, translation=(45.0, 30.0))
    column, row = moved((window.left + half, window.top + half))[0]
    bound_px = 0.02 * window.side
    assert abs(found.side - 0.7 * window.side) < bound_px
    assert abs(found.left + found.side / 2 - column) < bound_px
    assert abs(found.top + found.side / 2 - row) < bound_px


def test_photograph_from_another_place_is_found_nearby(motorcycle: Scene) -> None:
    """The real reference shows nearly the same from the side."""
    window = window_of(motorcycle.mask, SIZE_PX)
    found = placed(motorcycle, motorcycle.references[0])
    assert found is not None
    assert 0.9 < found.side / window.side < 1.1
    assert abs(found.left - window.left) < window.side / 4


@pytest.mark.parametrize(
    ("scale", "turn", "shift"),
    [(1.0, np.pi / 2, (300.0, 0.0)), (0.12, 0.0, (150.0, 100.0))],
    ids=["turned", "tiny"],
)
def test_implausible_place_is_not_believed(
    motorcycle: Scene, scale: float, turn: float, shift: tuple[float, float]
) -> None:
    """A quarter turn, and a picture of a picture."""
    assert motorcycle.truth is not None
    reference = seen(motorcycle.truth, scale=scale, turn=turn, shift=shift)
    assert placed(motorcycle, reference) is None


def test_nothing_is_found_where_nothing_is_shared(motorcycle: Scene) -> None:
    """Noise, a plain wall, and a picture whose part in question is mostly cut off."""
    assert motorcycle.truth is not None
    noise = torch.rand(3, 100, 150, generator=torch.Generator().manual_seed(0))
    assert placed(motorcycle, noise) is None
    assert placed(motorcycle, torch.full((3, 100, 150), 0.5)) is None
    left = window_of(motorcycle.mask, SIZE_PX).left
    assert placed(motorcycle, motorcycle.truth[:, :, : left + 60]) is None


def test_the_hole_is_not_compared(motorcycle: Scene) -> None:
    """Whatever lies in the target's hole, the answer is the same."""
    other = Scene(
        name="other",
        references=motorcycle.references,
        target=torch.where(motorcycle.mask > 0, 1 - motorcycle.target, motorcycle.target),
        mask=motorcycle.mask,
        truth=None,
        digests={},
    )
    first, second = (placed(scene, motorcycle.references[0]) for scene in (motorcycle, other))
    assert first is not None
    assert second is not None
    assert abs(first.left - second.left) + abs(first.top - second.top) < 0.05 * first.side
