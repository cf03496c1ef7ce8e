"""The authenticity gate: does what the references show support what was filled in?

Counts depend on the scene; the share of the hole's cells that some reference matches does so far
less, and is what the gate looks at. It marks an answer and hides none.

Source: RealFill, arXiv:2309.16668, Fig. 12: correspondences are invented where scenes differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from realfill.rank.ranking import Ranking
from realfill.verdict import Verdict


@dataclass(frozen=True)
class Thresholds:
    """Where the verdicts begin.

    Attributes:
        supported: Least coverage of the hole, in [0, 1], that supports a filling.
        weak: Least coverage that speaks for it at all.
        least_matches: Fewer matches than this never support: a small hole is soon covered.
    """

    supported: float
    weak: float
    least_matches: int

    def __post_init__(self) -> None:
        if not (0 <= self.weak <= self.supported <= 1 and self.least_matches >= 1):
            raise ValueError(
                f"{self} does not fit; use 0 <= weak <= supported <= 1 and at least 1 match"
            )


# For nano, by ``python -m benchmarks.quality.gate`` over 17 scenes: of 34 true fillings 28 cover at
# least 0.46 of the hole, of 170 false ones none covers more than 0.38, and 9 cover 0.25. The six
# other true ones are of three places whose views lie so far apart that nano does not know the truth
# either: they are called unsupported. Another matcher should be calibrated anew.
DEFAULTS = Thresholds(supported=0.4, weak=0.25, least_matches=8)


def judge(ranking: Ranking, thresholds: Thresholds = DEFAULTS) -> tuple[Verdict, ...]:
    """The verdict on each candidate, in the order given to the ranking.

    Args:
        ranking: Of the candidates.
        thresholds: From ``calibrate``, or the measured ones.
    """
    verdicts: list[Verdict] = []
    pairs = zip(ranking.coverage.tolist(), ranking.scores.tolist(), strict=True)
    for coverage, matches in pairs:
        if coverage >= thresholds.supported and matches >= thresholds.least_matches:
            verdicts.append("supported")
        elif coverage >= thresholds.weak and matches > 0:
            verdicts.append("weak")
        else:
            verdicts.append("unsupported")
    return tuple(verdicts)


def calibrate(
    coverages: Sequence[float],
    truths: Sequence[bool],
    *,
    precision: float = 0.95,
    recall: float = 0.95,
    least_matches: int = DEFAULTS.least_matches,
) -> Thresholds:
    """Thresholds from fillings of which it is known whether they are true.

    ``supported`` is the least coverage at and above which that share of the fillings is true.
    ``weak`` is the largest at and above which that share of the true fillings lies.

    Args:
        coverages: Of each filling, in [0, 1].
        truths: Whether each filling is true.
        precision: Share of true ones among those called supported.
        recall: Share of the true ones that are not called unsupported.
        least_matches: Carried over.

    Raises:
        ValueError: There is no true or no false filling, or no coverage has that precision.
    """
    pairs = sorted(zip(coverages, truths, strict=True), reverse=True)
    true = [coverage for coverage, truth in pairs if truth]
    if not true or len(true) == len(pairs):
        raise ValueError(
            f"{len(true)} of {len(pairs)} fillings are true; calibrate with some of either kind"
        )
    supported = None
    for bound in sorted({coverage for coverage, _ in pairs}, reverse=True):
        above = [truth for coverage, truth in pairs if coverage >= bound]
        if sum(above) >= precision * len(above):
            supported = bound
    if supported is None:
        raise ValueError(
            f"no coverage makes {precision:.0%} of the fillings above it true; the matcher does "
            "not tell them apart, so use another one"
        )
    # Of the true ones in falling order, the last that is needed to reach the share.
    needed = next(k for k in range(1, len(true) + 1) if k >= recall * len(true))
    return Thresholds(supported, min(true[needed - 1], supported), least_matches)
