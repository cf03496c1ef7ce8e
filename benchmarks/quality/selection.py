"""What ranking is worth: means of what filter rates keep, their interval, and rank correlation.

A scene's candidates are a row of scores and a row of qualities; every function takes many scenes,
one after the other, and gives each the same weight, however many candidates it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

# Shares of the candidates that are thrown away. Source: RealFill, arXiv:2309.16668, Table 2.
FILTER_RATES = (0.0, 0.25, 0.5, 0.75)
RESAMPLES = 4000
COVERAGE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval, in the unit of the quality."""

    mean: float
    low: float
    high: float


def keys_of(order: Sequence[int]) -> Tensor:
    """Candidates' places as numbers without ties, the best one's highest. [N]

    Args:
        order: Indices of the candidates, best first.
    """
    keys = torch.empty(len(order), dtype=torch.float64)
    keys[torch.tensor(order)] = torch.arange(len(order), 0, -1, dtype=torch.float64)
    return keys


def kept_mean(keys: Tensor, quality: Tensor, rate: float) -> Tensor:
    """Mean quality of the candidates that a filter rate keeps, at least one.

    Args:
        keys: Higher is better. [..., N]
        quality: Of the same candidates. [..., N]
        rate: Share that is thrown away, in [0, 1).

    Returns:
        [...]
    """
    count = max(1, round(keys.shape[-1] * (1 - rate)))
    best = keys.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return quality.gather(-1, best).mean(-1)


def filter_table(
    keys: Sequence[Tensor], qualities: Sequence[Tensor], rates: Sequence[float] = FILTER_RATES
) -> list[float]:
    """Mean over the scenes of what each filter rate keeps.

    Args:
        keys: One row per scene. [N] each
        qualities: One row per scene. [N] each
        rates: Shares that are thrown away.
    """
    return [
        fmean(float(kept_mean(k, q, rate)) for k, q in zip(keys, qualities, strict=True))
        for rate in rates
    ]


def gain_interval(
    keys: Sequence[Tensor],
    qualities: Sequence[Tensor],
    *,
    rate: float = 0.75,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """How much better what a rate keeps is than everything, over scenes and seeds.

    Each resample draws scenes with replacement, and in each drawn scene candidates with
    replacement, which are then ranked and filtered anew.

    Args:
        keys: One row per scene, as many candidates in each. [N] each
        qualities: One row per scene. [N] each
        rate: Share that is thrown away.
        seed: Of the resampling.
        resamples: How many.

    Returns:
        The mean gain and the middle 95 % of the resampled ones.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    score, quality = torch.stack(list(keys)).double(), torch.stack(list(qualities)).double()
    generator = torch.Generator().manual_seed(seed)
    scenes, count = score.shape
    gains = []
    for _ in range(resamples):
        drawn = torch.randint(scenes, (scenes,), generator=generator)
        seeds = torch.randint(count, (scenes, count), generator=generator)
        s, q = score[drawn].gather(1, seeds), quality[drawn].gather(1, seeds)
        gains.append((kept_mean(s, q, rate) - q.mean(1)).mean())
    return _interval(float((kept_mean(score, quality, rate) - quality.mean(1)).mean()), gains)


def difference_interval(
    first: Sequence[Tensor], second: Sequence[Tensor], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """How much better the first is, of the same scenes and seeds, over both.

    Args:
        first: Qualities, one row per scene, as many seeds in each. [N] each
        second: Of the same scenes and seeds. [N] each
        seed: Of the resampling.
        resamples: How many.
    """
    gap = torch.stack(list(first)).double() - torch.stack(list(second)).double()
    generator = torch.Generator().manual_seed(seed)
    scenes, count = gap.shape
    means = []
    for _ in range(resamples):
        drawn = torch.randint(scenes, (scenes,), generator=generator)
        seeds = torch.randint(count, (scenes, count), generator=generator)
        means.append(gap[drawn].gather(1, seeds).mean())
    return _interval(float(gap.mean()), means)


def _interval(mean: float, resampled: Sequence[Tensor]) -> Interval:
    tail = (1 - COVERAGE) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.stack(list(resampled)).quantile(bounds).tolist()
    return Interval(mean, low, high)


def ranks(values: Tensor) -> Tensor:
    """Places from 1 on, the smallest value's first; equal values share their mean place. [N]"""
    values = values.double()
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return below + (equal + 1) / 2


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation; 0 where one side is all alike and says nothing. [N], [N]"""
    return _correlation(ranks(first), ranks(second))


def pooled_spearman(scores: Sequence[Tensor], qualities: Sequence[Tensor]) -> float:
    """Rank correlation over all scenes' candidates, each ranked among its own scene's.

    Scores of two scenes cannot be compared, only places can.
    """
    sides = [
        torch.cat([(ranks(row) - (len(row) + 1) / 2) / len(row) for row in side])
        for side in (scores, qualities)
    ]
    return _correlation(*sides)


def _correlation(first: Tensor, second: Tensor) -> float:
    x, y = first - first.mean(), second - second.mean()
    length = x.norm() * y.norm()
    return float(x @ y / length) if length > 0 else 0.0


def standard_error(rows: Sequence[Tensor]) -> float:
    """Of a mean over scenes, as far as it comes from the seeds: scenes are held fixed.

    Args:
        rows: One per scene, at least two seeds in each. [N] each
    """
    variances = [float(row.double().var() / len(row)) for row in rows]
    return sum(variances) ** 0.5 / len(rows)
