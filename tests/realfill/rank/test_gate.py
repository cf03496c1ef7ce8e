"""The gate's verdicts, and thresholds from fillings of which the truth is known."""

from __future__ import annotations

import pytest
import torch

from realfill.rank.gate import DEFAULTS, Thresholds, calibrate, judge
from realfill.rank.ranking import Ranking


def ranking(coverage: list[float], scores: list[int]) -> Ranking:
    """A ranking of which only coverage and scores matter."""
    counts = torch.tensor(scores)
    return Ranking(
        scores=counts,
        agreement=counts,
        by="count",
        per_reference=counts[:, None],
        confidence=counts.float(),
        order=torch.arange(len(scores)),
        coverage=torch.tensor(coverage),
        hole_cells=100,
        matches=(),
    )


def test_each_candidate_has_its_verdict() -> None:
    """By coverage, from below and from the bound itself; few matches never support."""
    thresholds = Thresholds(supported=0.5, weak=0.25, least_matches=4)
    seen = ranking([0.75, 0.5, 0.49, 0.25, 0.2, 1.0, 0.0], [75, 50, 49, 25, 20, 3, 0])
    assert judge(seen, thresholds) == (
        "supported",
        "supported",
        "weak",
        "weak",
        "unsupported",
        "weak",
        "unsupported",
    )


def test_no_match_is_never_called_weak() -> None:
    """Even thresholds of nothing do not make something of zero matches."""
    assert judge(ranking([0.0], [0]), Thresholds(0.0, 0.0, 1)) == ("unsupported",)


def test_calibration_separates_what_can_be_separated() -> None:
    """With true fillings above false ones, the bounds lie between and at the lowest true one."""
    found = calibrate([0.9, 0.7, 0.6, 0.2, 0.1], [True, True, True, False, False])
    assert found == Thresholds(supported=0.6, weak=0.6, least_matches=DEFAULTS.least_matches)


def test_calibration_trades_precision_for_reach() -> None:
    """A false filling among the true ones lifts ``supported``; ``weak`` keeps the true ones."""
    coverages = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    truths = [True, True, False, True, True, False]
    strict = calibrate(coverages, truths, precision=1.0, recall=1.0, least_matches=3)
    assert strict == Thresholds(supported=0.8, weak=0.5, least_matches=3)
    lenient = calibrate(coverages, truths, precision=0.8, recall=0.5)
    assert (lenient.supported, lenient.weak) == (0.5, 0.5)


def test_what_cannot_be_calibrated_is_refused() -> None:
    """Without both kinds, or where false fillings lie above all true ones, there is no bound."""
    with pytest.raises(ValueError, match="2 of 2 fillings are true"):
        calibrate([0.5, 0.6], [True, True])
    with pytest.raises(ValueError, match="0 of 1 fillings"):
        calibrate([0.5], [False])
    with pytest.raises(ValueError, match="does not tell them apart"):
        calibrate([0.9, 0.8, 0.1], [False, False, True])


@pytest.mark.parametrize("bounds", [(0.2, 0.3, 1), (1.2, 0.3, 1), (0.5, 0.3, 0)])
def test_thresholds_that_contradict_themselves_are_refused(
    bounds: tuple[float, float, int],
) -> None:
    """Bounds are shares, in order, and one match is the least."""
    with pytest.raises(ValueError, match="0 <= weak <= supported <= 1"):
        Thresholds(*bounds)
