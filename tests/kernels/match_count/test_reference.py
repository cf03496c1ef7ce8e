"""match_count on the CPU: the definition's matches, in megabytes, and wrong input refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.match_count import match_count, tiles
from kernels.match_count.reference import match_count_reference

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_hot(cells: list[list[int]], channels: int = 8) -> Tensor:
    """Cells that are alike or have nothing in common, so that every sum is exact. [N, L, C]"""
    return torch.nn.functional.one_hot(torch.tensor(cells), channels).float()


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that torch held for the work at one time, beyond what it held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_a_case_small_enough_to_follow_by_hand() -> None:
    """Two cells each, logits [[2, 0], [0, 0]]: only the first pair is mutual and above a half."""
    tokens0, tokens1 = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[2.0], [0.0]]])
    confidence, partner = match_count(tokens0, tokens1, scale=1.0, threshold=0.5)
    share = torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 1)
    assert partner[0, 0] == 0
    torch.testing.assert_close(confidence, torch.tensor([[float(share**2), 0.0]]))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    height=st.integers(1, 9),
    scale=st.sampled_from([0.0, 0.3, 5.0, -2.0, 400.0]),
    dtype=st.sampled_from(TYPES),
)
def test_tiles_equal_the_definition_in_float64(
    rows: int, columns: int, height: int, scale: float, dtype: torch.dtype
) -> None:
    """Whatever the sizes, tiles and magnitudes, matches are those of the whole matrix."""
    tokens0, tokens1 = draw(rows, 2, rows, 5).to(dtype), draw(columns + 50, 2, columns, 5).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_BYTES", height * columns * 8)
        patch.setattr(tiles, "KEPT_BYTES", 2000)
        confidence, partner = match_count(tokens0, tokens1, scale=scale, threshold=1e-3)
    exact, truth = match_count_reference(tokens0.double(), tokens1.double(), scale, 1e-3)
    torch.testing.assert_close(confidence.double(), exact, rtol=2e-3, atol=1e-6)
    assert torch.equal(confidence > 0, exact > 0)
    assert torch.equal(partner[exact > 0], truth[exact > 0])


@pytest.mark.parametrize(
    ("cells0", "cells1", "partner", "matched"),
    [
        # Two equal rows both have their column's largest confidence: both are matched.
        ([[0, 0, 1]], [[0, 1, 2]], [0, 0, 1], [0.5, 0.5, 1.0]),
        # Of two equal columns a row takes the first.
        ([[0, 1, 2]], [[1, 0, 0]], [1, 0], [0.5, 1.0, 0.0]),
        # Both at once: a quarter each, and the first column for both.
        ([[3, 3]], [[3, 3]], [0, 0], [0.25, 0.25]),
    ],
)
@pytest.mark.parametrize("way", ["tiles", "definition"])
def test_ties_take_the_first_column_and_every_row(
    way: str,
    cells0: list[list[int]],
    cells1: list[list[int]],
    partner: list[int],
    matched: list[float],
) -> None:
    """The rule for equal confidences, with numbers whose sums are exact."""
    tokens = one_hot(cells0), one_hot(cells1)
    if way == "tiles":
        found = match_count(*tokens, scale=200.0, threshold=0.2)
    else:
        found = match_count_reference(*tokens, 200.0, 0.2)
    assert [p for p, sure in zip(found[1][0].tolist(), matched, strict=True) if sure] == partner
    assert found[0][0].tolist() == pytest.approx(matched, abs=1e-5)


def test_blank_images_match_nowhere() -> None:
    """Where all cells are alike no pair is likelier than another, and nothing is NaN."""
    blank = torch.zeros(1, 50, 4)
    assert match_count(blank, blank, scale=1.0, threshold=0.2)[0].tolist() == [[0.0] * 50]
    confidence, partner = match_count(blank, blank, scale=1.0, threshold=-1.0)
    torch.testing.assert_close(confidence, torch.full((1, 50), 1 / 2500))
    assert partner.max() == 0


def test_a_pair_without_a_number_spoils_no_other() -> None:
    """NaN in one pair gives it no match, and leaves its neighbour alone."""
    tokens0, tokens1 = draw(1, 2, 9, 4), draw(1, 2, 9, 4)
    alone = match_count(tokens0[1:], tokens1[1:], scale=3.0, threshold=0.2)
    tokens0[0, 0] = torch.nan
    confidence, partner = match_count(tokens0, tokens1, scale=3.0, threshold=0.2)
    assert confidence[0].tolist() == [0.0] * 9
    assert torch.equal(confidence[1:], alone[0])
    assert torch.equal(partner[1:], alone[1])


def test_views_are_read_where_they_lie() -> None:
    """Tokens that are not contiguous match like their copies."""
    tokens0, tokens1 = draw(1, 2, 6, 30).transpose(1, 2), draw(2, 4, 30, 12)[::2, :, ::2]
    views = match_count(tokens0, tokens1, scale=2.0, threshold=0.01)
    copies = match_count(tokens0.contiguous(), tokens1.contiguous(), scale=2.0, threshold=0.01)
    assert (views[0] > 0).any()
    assert torch.equal(views[0], copies[0])


def test_no_pair_gives_nothing() -> None:
    """Zero pairs are zero rows of matches."""
    confidence, partner = match_count(
        torch.zeros(0, 3, 2), torch.zeros(0, 4, 2), scale=1.0, threshold=0.2
    )
    assert confidence.shape == partner.shape == (0, 3)


def test_a_pair_at_512_px_needs_megabytes() -> None:
    """4096 cells on either side: less than a tenth of the 64 MiB that one matrix would take."""
    tokens = draw(1, 1, 4096, 64)
    other = tokens.roll(3, 1) + 0.1 * draw(2, 1, 4096, 64)

    def count() -> None:
        confidence, _ = match_count(tokens, other, scale=0.3, threshold=0.2)
        assert (confidence > 0).float().mean() > 0.5

    count()
    assert 2**20 < peak_bytes(count) < 6 * 2**20
    materialised = peak_bytes(lambda: match_count_reference(tokens, other, 0.3, 0.2))
    assert materialised > 128 * 2**20


@pytest.mark.parametrize(
    ("tokens0", "tokens1", "scale", "says"),
    [
        (torch.zeros(3, 2), torch.zeros(1, 3, 2), 1.0, "tokens0 .* pass floating"),
        (torch.zeros(1, 3, 2), torch.zeros(1, 0, 2), 1.0, "tokens1 .* at least one cell"),
        (torch.zeros(1, 3, 2, dtype=torch.long), torch.zeros(1, 3, 2), 1.0, "pass floating"),
        (torch.zeros(2, 3, 2), torch.zeros(1, 3, 2), 1.0, "as many images"),
        (torch.zeros(1, 3, 2), torch.zeros(1, 3, 4), 1.0, "as many images of as many channels"),
        (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2).half(), 1.0, "use one type"),
        (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2, device="meta"), 1.0, "one device"),
        (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), float("nan"), "scale is nan"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    tokens0: Tensor, tokens1: Tensor, scale: float, says: str
) -> None:
    """Each fault is named with its value and what to pass."""
    with pytest.raises(ValueError, match=says):
        match_count(tokens0, tokens1, scale=scale, threshold=0.2)
