"""The plan of a run is Poisson in time, Zipf in scenes, and follows from its seed."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from benchmarks.load.plan import Arrival, arrivals

SCENES = ("a", "b", "c", "d")


def long_plan(seed: int = 0, zipf_s: float = 1.0) -> list[Arrival]:
    return arrivals(SCENES, rate_per_s=50, duration_s=400, zipf_s=zipf_s, seed=seed)


def test_same_seed_gives_the_same_plan() -> None:
    """A run can be repeated to the request; another seed is another run."""
    assert long_plan(3) == long_plan(3)
    assert long_plan(3) != long_plan(4)


def test_gaps_are_exponential_with_the_rate_as_mean() -> None:
    """Over 20 000 gaps the mean is 1/rate and the deviation equals the mean, within 3 %."""
    times = [arrival.at_s for arrival in long_plan()]
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.02, rel=0.03)
    assert deviation == pytest.approx(0.02, rel=0.03)
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] < 400


def test_scene_shares_follow_zipf() -> None:
    """With exponent 1 the shares are 12, 6, 4 and 3 of 25."""
    counts = Counter(arrival.scene for arrival in long_plan())
    total = sum(counts.values())
    assert [counts[scene] / total for scene in SCENES] == pytest.approx(
        [0.48, 0.24, 0.16, 0.12], abs=0.01
    )


def test_exponent_zero_makes_scenes_equally_popular() -> None:
    """Exponent 0 gives each of four scenes a quarter."""
    counts = Counter(arrival.scene for arrival in long_plan(zipf_s=0))
    total = sum(counts.values())
    assert [counts[scene] / total for scene in SCENES] == pytest.approx([0.25] * 4, abs=0.01)


def test_every_request_has_a_seed_of_its_own() -> None:
    """No two requests can be answered from one cached result."""
    plan = long_plan()
    assert len({arrival.seed for arrival in plan}) == len(plan)


@pytest.mark.parametrize(("scenes", "rate"), [((), 1.0), (SCENES, 0.0), (SCENES, -1.0)])
def test_empty_mix_or_rate_is_refused(scenes: tuple[str, ...], rate: float) -> None:
    """A plan that could never end or never begin is an error."""
    with pytest.raises(ValueError, match=r"No scene|must both be positive"):
        arrivals(scenes, rate_per_s=rate, duration_s=1, zipf_s=1, seed=0)
