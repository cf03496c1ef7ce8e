"""Compositing: nothing changes beyond the feather, and windows cover the hole."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from realfill.complete.compositing import Patch, composite, paste
from realfill.complete.windows import Window, crop, crop_mask, window_of
from realfill.errors import InvalidScene
from realfill.masks import dilate
from realfill.photographs import to_bytes


def _images(seed: int, count: int, height: int, width: int) -> Tensor:
    """Random pictures of bytes, as a file would give them. [count, 3, H, W]"""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, height, width), generator=generator)
    return pixels.float() / 255


@st.composite
def holes(draw: st.DrawFn) -> Tensor:
    """A mask of 16 to 70 pixels a side with one to three rectangles."""
    height, width = draw(st.integers(16, 70)), draw(st.integers(16, 70))
    mask = torch.zeros(height, width)
    for _ in range(draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
        mask[top:bottom, left:right] = 1
    return mask


@settings(deadline=None, max_examples=60)
@given(mask=holes(), feather_px=st.integers(0, 12), match_colour=st.booleans())
def test_composite_leaves_the_target_beyond_the_feather(
    mask: Tensor, feather_px: int, match_colour: bool
) -> None:
    """Beyond the feather every bit is the target's, in the hole every bit is the sample's."""
    target = _images(0, 1, *mask.shape)[0]
    samples = _images(1, 2, *mask.shape)
    candidates = composite(samples, target, mask, feather_px=feather_px, match_colour=match_colour)

    beyond = dilate(mask, feather_px) == 0
    assert torch.equal(candidates[..., beyond], target[..., beyond].expand(2, -1, -1))
    if not match_colour:
        hole = mask.bool()
        assert torch.equal(candidates[..., hole], samples[..., hole])


@settings(deadline=None, max_examples=60)
@given(
    mask=holes(),
    feather_px=st.integers(0, 12),
    size_px=st.sampled_from([32, 64]),
    match_colour=st.booleans(),
)
def test_paste_leaves_the_upload_beyond_the_feather(
    mask: Tensor, feather_px: int, size_px: int, match_colour: bool
) -> None:
    """Through crop, resize and paste, known pixels are the upload's floats and its bytes."""
    target = _images(2, 1, *mask.shape)[0]
    window = window_of(mask, size_px)
    samples = _images(3, 2, size_px, size_px)
    candidates = paste(samples, window, target, mask, feather_px, match_colour=match_colour)

    beyond = dilate(mask, feather_px) == 0
    expected = target[..., beyond].expand(2, -1, -1)
    assert torch.equal(candidates[..., beyond], expected)
    as_bytes = (candidates[..., beyond] * 255).round().to(torch.uint8)
    assert torch.equal(as_bytes, (expected * 255).round().to(torch.uint8))
    assert candidates.min() >= 0
    assert candidates.max() <= 1


def test_a_patch_of_bytes_makes_the_bytes_of_paste() -> None:
    """Only what is touched is computed; an upload need not become floats for that."""
    numbers = torch.randint(0, 256, (3, 48, 80), dtype=torch.uint8)
    mask = torch.zeros(48, 80, dtype=torch.bool)
    mask[10:30, 20:50] = True
    window = window_of(mask, 32)
    samples = _images(3, 2, 32, 32)
    patch = Patch.around(window, mask, 5)
    pixels = patch.of(samples, numbers)
    assert pixels.shape == (2, 3, 30, 40)
    candidates = numbers.expand(2, -1, -1, -1).clone()
    candidates[..., patch.rows, patch.columns] = to_bytes(pixels)
    whole = paste(samples, window, numbers.float() / 255, mask.float(), 5)
    assert torch.equal(candidates, to_bytes(whole))
    assert torch.equal(crop(numbers, window, 32), crop(numbers.float() / 255, window, 32))
    assert torch.equal(crop_mask(mask, window, 32), crop_mask(mask.float(), window, 32))


def test_every_byte_survives_the_round_trip() -> None:
    """All 256 levels come back from [0, 1] as the bytes they were."""
    levels = torch.arange(256)

    assert torch.equal((levels.float() / 255 * 255).round().long(), levels)


def test_composite_ramps_on_the_known_side_only() -> None:
    """With a feather of 4 the weights beside the hole are 1, 3/4, 1/2, 1/4 and then 0."""
    mask = torch.zeros(1, 12)
    mask[0, :3] = 1
    samples, target = torch.ones(1, 3, 1, 12), torch.zeros(3, 1, 12)
    candidates = composite(samples, target, mask, feather_px=4)

    expected = [1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0]
    assert candidates[0, 0, 0].tolist() == expected


def test_composite_without_feather_is_a_selection() -> None:
    """A feather of 0 takes the sample in the hole and the target elsewhere."""
    mask = torch.eye(4)
    samples, target = _images(0, 2, 4, 4), _images(1, 1, 4, 4)[0]

    expected = torch.where(mask > 0, samples, target)
    assert torch.equal(composite(samples, target, mask, feather_px=0), expected)


def test_composite_keeps_known_pixels_of_a_broken_sample() -> None:
    """A sample that is not a number anywhere cannot reach the known region."""
    mask = torch.zeros(8, 8)
    mask[:2] = 1
    target = _images(0, 1, 8, 8)[0]
    candidates = composite(torch.full((1, 3, 8, 8), torch.nan), target, mask, feather_px=1)

    assert torch.equal(candidates[0, :, 3:], target[:, 3:])


def test_composite_matches_colour_on_the_ring() -> None:
    """A sample that is the target at lower contrast and brightness is brought back to it."""
    target = _images(0, 1, 32, 32)[0]
    mask = torch.zeros(32, 32)
    mask[10:20, 10:20] = 1
    faded = (0.6 * target + torch.tensor([0.1, 0.2, 0.05])[:, None, None]).unsqueeze(0)
    candidates = composite(faded, target, mask, feather_px=2, match_colour=True)

    torch.testing.assert_close(candidates[0], target, atol=1e-5, rtol=0)


def test_composite_shifts_flat_colour_without_gain() -> None:
    """A flat ring says nothing about contrast: a flat sample is only shifted."""
    target = torch.full((3, 16, 16), 0.7)
    mask = torch.zeros(16, 16)
    mask[6:9, 6:9] = 1
    samples = torch.full((1, 3, 16, 16), 0.4)
    candidates = composite(samples, target, mask, feather_px=2, match_colour=True)

    torch.testing.assert_close(candidates[0], target)


def test_composite_of_a_full_mask_is_the_sample() -> None:
    """Scene variants have no known region, hence no ring and no blend."""
    samples, target = _images(0, 2, 16, 16), _images(1, 1, 16, 16)[0]
    mask = torch.ones(16, 16)

    candidates = composite(samples, target, mask, feather_px=8, match_colour=True)
    assert torch.equal(candidates, samples)


@pytest.mark.parametrize(
    "mask,feather_px,message",
    [
        (torch.zeros(16, 16), 2, r"mask is empty"),
        (torch.ones(16, 15), 2, r"\[16, 15\] differ in size"),
        (torch.ones(16, 16), -1, r"-1 px wide"),
    ],
)
def test_composite_refuses_what_it_cannot_paste(
    mask: Tensor, feather_px: int, message: str
) -> None:
    """An empty mask, another size and a negative feather each have their sentence."""
    with pytest.raises(InvalidScene, match=message):
        composite(torch.zeros(1, 3, 16, 16), torch.zeros(3, 16, 16), mask, feather_px=feather_px)


@given(mask=holes(), size_px=st.sampled_from([32, 128, 512]))
def test_window_covers_the_hole(mask: Tensor, size_px: int) -> None:
    """Every missing pixel lies inside, and the side is between the image's two sides."""
    window = window_of(mask, size_px)
    rows, columns = mask.nonzero().unbind(1)

    assert window.top <= rows.min()
    assert rows.max() < window.top + window.side
    assert window.left <= columns.min()
    assert columns.max() < window.left + window.side
    assert min(mask.shape) <= window.side <= max(mask.shape)


def test_window_of_a_small_hole_is_the_short_side_around_it() -> None:
    """It is centred on the hole as far as the image goes."""
    mask = torch.zeros(100, 300)
    mask[40:60, 200:220] = 1
    assert window_of(mask, 128) == Window(top=0, left=160, side=100)

    mask = torch.zeros(100, 300)
    mask[40:60, 290:300] = 1
    assert window_of(mask, 128) == Window(top=0, left=200, side=100)


def test_window_of_a_wide_hole_reaches_beyond_the_image() -> None:
    """A hole wider than the image is high brings missing pixels above and below."""
    mask = torch.zeros(100, 300)
    mask[:, 50:250] = 1

    # 200 px of hole are 96 of 128 model pixels.
    assert window_of(mask, 128) == Window(top=-83, left=16, side=267)


def test_window_of_an_empty_mask_is_refused() -> None:
    """There is nothing to look at."""
    with pytest.raises(InvalidScene, match=r"mask is empty"):
        window_of(torch.zeros(16, 16), 128)


@settings(deadline=None, max_examples=60)
@given(mask=holes(), size_px=st.sampled_from([16, 48, 96]))
def test_crop_shows_nothing_of_the_hole(mask: Tensor, size_px: int) -> None:
    """Whatever the target holds in its hole, the cropped known pixels stay the same."""
    target = _images(4, 1, *mask.shape)[0]
    window = window_of(mask, size_px)
    known = crop_mask(mask, window, size_px) == 0
    painted = torch.where(mask > 0, 1 - target, target)

    first, second = crop(target, window, size_px), crop(painted, window, size_px)
    assert torch.equal(first[:, known], second[:, known])


@settings(deadline=None, max_examples=60)
@given(mask=holes(), size_px=st.sampled_from([16, 48, 96]))
def test_crop_mask_loses_no_missing_pixel(mask: Tensor, size_px: int) -> None:
    """The pixel of the answer that each missing pixel's centre falls into is missing."""
    window = window_of(mask, size_px)
    cropped = crop_mask(mask, window, size_px)
    rows, columns = mask.nonzero().unbind(1)
    scale = size_px / window.side
    rows = ((rows - window.top + 0.5) * scale).long()
    columns = ((columns - window.left + 0.5) * scale).long()

    assert cropped[rows, columns].min() == 1
    assert set(cropped.unique().tolist()) <= {0.0, 1.0}


def test_crop_mask_beyond_the_image_is_missing() -> None:
    """A window that reaches beyond the image sees its outside as missing."""
    cropped = crop_mask(torch.zeros(10, 20), Window(top=-5, left=0, side=20), 20)

    assert cropped[:5].min() == 1
    assert cropped[5:15].max() == 0
    assert cropped[15:].min() == 1


def test_crop_at_native_size_is_the_image() -> None:
    """Without a change of scale no pixel changes."""
    image = _images(0, 1, 30, 20)[0]

    assert torch.equal(crop(image, Window(top=4, left=0, side=20), 20), image[:, 4:24])


def test_paste_of_a_crop_restores_a_smooth_image() -> None:
    """A gradient that is cropped, not changed and pasted comes back within a thousandth."""
    ramp = torch.linspace(0.2, 0.8, 96).expand(3, 64, 96).contiguous()
    mask = torch.zeros(64, 96)
    mask[20:40, 40:60] = 1
    window = window_of(mask, 32)
    candidates = paste(crop(ramp, window, 32).unsqueeze(0), window, ramp, mask, 4)

    torch.testing.assert_close(candidates[0], ramp, atol=1e-3, rtol=0)


def test_paste_narrows_the_feather_where_the_window_ends() -> None:
    """A feather wider than the window's rim reaches zero at its edge instead of being cut off."""
    mask = torch.zeros(40, 200)
    mask[10:30, 80:110] = 1
    window = Window(top=0, left=75, side=40)
    candidates = paste(
        torch.ones(1, 3, 40, 40), window, torch.zeros(3, 40, 200), mask, feather_px=20
    )

    # 5 px are left of the hole: weights 1, 0.8, 0.6, 0.4, 0.2 from the hole outward.
    expected = torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 1, 1])
    torch.testing.assert_close(candidates[0, 0, 20, 74:81], expected)


def test_paste_refuses_a_window_that_misses_the_hole() -> None:
    """The message names what the window covers, and the remedy."""
    mask = torch.zeros(32, 64)
    mask[10:20, 40:60] = 1
    with pytest.raises(InvalidScene, match=r"0 to 32 of 64, the hole 40 to 60.*window_of"):
        paste(torch.ones(1, 3, 32, 32), Window(0, 0, 32), torch.zeros(3, 32, 64), mask, 4)


@pytest.mark.parametrize(("height", "width"), [(500, 741), (741, 500), (60, 400), (400, 60)])
def test_windows_beyond_the_image_are_as_of_the_whole_square(height: int, width: int) -> None:
    """What is cut and resized axis by axis is what the square would give, written out."""
    mask = torch.zeros(height, width)
    mask[height // 8 : -height // 8, width // 8 : -width // 8] = 1
    window = window_of(mask, 64)
    target, samples = _images(4, 1, height, width)[0], _images(5, 2, 64, 64)
    assert window.side > min(height, width)
    rows = torch.arange(window.side) + window.top
    columns = torch.arange(window.side) + window.left
    square = target[:, rows.clamp(0, height - 1)][:, :, columns.clamp(0, width - 1)]
    missing = mask[rows.clamp(0, height - 1)][:, columns.clamp(0, width - 1)]
    missing[(rows < 0) | (rows >= height)] = 1
    missing[:, (columns < 0) | (columns >= width)] = 1
    small = {"size": (64, 64), "mode": "bilinear", "antialias": True}
    torch.testing.assert_close(crop(target, window, 64), F.interpolate(square[None], **small)[0])
    shrunk = F.interpolate(missing[None, None], **small)[0, 0]
    assert torch.equal(crop_mask(mask, window, 64), (shrunk > 0).float())
    large = F.interpolate(samples, (window.side,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
    there = torch.zeros(2, 3, height, width)
    inside = [
        ((line >= 0) & (line < end)).nonzero()[:, 0]
        for line, end in ((rows, height), (columns, width))
    ]
    there[:, :, rows[inside[0]][:, None], columns[inside[1]]] = large[
        :, :, inside[0][:, None], inside[1]
    ]
    pasted = paste(samples, window, target, mask, 0)
    torch.testing.assert_close(pasted, torch.where(mask > 0, there, target))


def test_a_long_image_takes_no_more_memory_than_it_has_pixels() -> None:
    """The square of a strip of 8000x30 would have 64 million pixels, 768 MB in colour."""
    code = (
        "import resource, torch\n"
        "from realfill.complete.compositing import Patch\n"
        "from realfill.complete.windows import crop, crop_mask, window_of\n"
        "mask = torch.zeros(30, 8000); mask[5:25, 100:7900] = 1\n"
        "image, window = torch.rand(3, 30, 8000), window_of(mask, 128)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "crop(image, window, 128), crop_mask(mask, window, 128)\n"
        "Patch.around(window, mask, 8).of(torch.rand(4, 3, 128, 128), image)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(told.stdout) < 150_000


def test_a_thread_of_pixels_is_refused() -> None:
    """A window of a million pixels a side would be too large in one direction alone."""
    mask = torch.zeros(16, 1_000_000)
    mask[:, 10:-10] = 1
    with pytest.raises(InvalidScene, match=r"1000000x16 pixels needs a window .*: crop the image"):
        window_of(mask, 128)


@pytest.mark.parametrize("upright", [True, False])
def test_a_hole_one_pixel_wide_gets_the_samples_pixels(upright: bool) -> None:
    """A column, or a row, of a ramp that runs along it."""
    mask = torch.zeros(300, 400)
    mask[50:250, 200] = 1
    ramp = torch.linspace(0, 1, 64)[:, None].expand(1, 3, 64, 64)
    if not upright:
        mask, ramp = mask.mT.contiguous(), ramp.mT.contiguous()
    window = window_of(mask, 64)
    filled = paste(ramp, window, torch.zeros(3, *mask.shape), mask, 0)[0, 0]
    line = filled[mask > 0]
    assert line[0] == pytest.approx(50 / 300, abs=0.02)
    assert line[-1] == pytest.approx(250 / 300, abs=0.02)
    assert bool((line.diff() > 0).all())


def test_an_image_one_pixel_wide_keeps_its_hole() -> None:
    """No missing pixel counts as known."""
    mask = torch.zeros(40, 1)
    mask[10:20] = 1
    window = window_of(mask, 32)
    assert crop_mask(mask, window, 32)[8:16].all()
    image = torch.linspace(0, 1, 40)[None, :, None].expand(3, 40, 1)
    seen = crop(image, window, 32)
    assert bool((seen.diff(dim=1) > 0).all())
