"""Numbers of the filter table, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from benchmarks.quality.selection import (
    difference_interval,
    filter_table,
    gain_interval,
    kept_mean,
    keys_of,
    pooled_spearman,
    ranks,
    spearman,
    standard_error,
)


def row(*values: float) -> torch.Tensor:
    """A row of float64."""
    return torch.tensor(values, dtype=torch.float64)


def test_keys_say_the_order() -> None:
    """Candidate 2 is best, then 0, then 1."""
    assert keys_of([2, 0, 1]).tolist() == [2, 1, 3]


def test_a_filter_rate_keeps_the_best_of_the_scores() -> None:
    """Of four candidates 75 % leaves one, a half two, and never none."""
    keys, quality = row(4, 3, 2, 1), row(10, 30, 20, 40)
    assert [float(kept_mean(keys, quality, r)) for r in (0, 0.25, 0.5, 0.75, 0.99)] == [
        25,
        20,
        20,
        10,
        10,
    ]


def test_the_filter_table_gives_each_scene_one_weight() -> None:
    """Four candidates of one scene weigh as much as two of another."""
    keys = [row(4, 3, 2, 1), row(1, 2)]
    quality = [row(8, 6, 4, 2), row(10, 20)]
    assert filter_table(keys, quality, (0.0, 0.5)) == [(5 + 15) / 2, (7 + 20) / 2]


def test_the_interval_of_a_perfect_score_excludes_zero() -> None:
    """Keeping the best quarter by quality itself gains 2.5 - 1 of 0, 1, 2, 3 eight times over."""
    quality = torch.arange(8).double().repeat(4, 4) / 2
    gain = gain_interval(list(quality), list(quality), resamples=200)
    assert gain.mean == pytest.approx(float(quality[0].topk(8).values.mean() - quality[0].mean()))
    assert 0 < gain.low < gain.mean < gain.high


def test_the_interval_of_a_blind_score_contains_zero() -> None:
    """Keys that have nothing to do with quality gain nothing."""
    generator = torch.Generator().manual_seed(1)
    keys, quality = torch.rand(2, 6, 32, generator=generator).double()
    gain = gain_interval(list(keys), list(quality), resamples=200)
    assert gain.low < 0 < gain.high


def test_one_good_scene_does_not_carry_the_others() -> None:
    """Scenes are resampled too: where only one of three gains, zero is inside."""
    quality = torch.arange(8).double().repeat(3, 1)
    keys = [quality[0], -quality[1], -quality[2] * 0 + torch.tensor([4, 1, 6, 3, 0, 5, 2, 7.0])]
    gain = gain_interval(keys, list(quality), resamples=300)
    assert gain.low < 0 < gain.high


def test_the_interval_follows_from_its_seed() -> None:
    """Equal seeds, equal bounds."""
    quality = list(torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).double())
    first, again, other = (gain_interval(quality, quality, seed=s, resamples=50) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_equal_values_share_their_place() -> None:
    """Two on places 2 and 3 are both at 2.5."""
    assert ranks(row(5, 1, 5, 9)).tolist() == [2.5, 1, 2.5, 4]


def test_spearman_agrees_with_scipy() -> None:
    """With ties, which counts have many of."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = torch.randint(6, (20,), generator=generator).double()
        y = torch.rand(20, generator=generator).double()
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    assert spearman(row(1, 1, 1), row(1, 2, 3)) == 0


def test_pooled_correlation_ranks_within_scenes() -> None:
    """Two scenes in full agreement give 1, though their scores are a hundred apart."""
    scores = [row(1, 2, 3), row(103, 101, 102)]
    quality = [row(30, 40, 50), row(9, 7, 8)]
    assert pooled_spearman(scores, quality) == pytest.approx(1)
    assert pooled_spearman(scores, [quality[0], -quality[1]]) == pytest.approx(0)


def test_standard_error_comes_from_the_seeds() -> None:
    """Variances 2 and 8 of two seeds each: sqrt(2 / 2 + 8 / 2) over 2 scenes."""
    assert standard_error([row(1, 3), row(0, 4)]) == pytest.approx(5**0.5 / 2)


def test_a_paired_difference_does_not_see_the_scenes_levels() -> None:
    """Half a decibel on every seed is half a decibel, however far the scenes are apart."""
    second = [row(10, 12, 11), row(30, 31, 35)]
    gap = difference_interval([x + 0.5 for x in second], second, resamples=50)
    assert (gap.mean, gap.low, gap.high) == (0.5, 0.5, 0.5)
    noisy = difference_interval([row(1, -1, 1, -1)], [row(0, 0, 0, 0)], resamples=100)
    assert noisy.low < 0 < noisy.high
