"""Halving looks when it says, keeps the better ones, and refuses settings that make no sense."""

from __future__ import annotations

import pytest
import torch

from service.engine.halving import Halving, survivors


def halving(**changes: object) -> Halving:
    """With a judge that likes nothing."""
    return Halving(lambda previews: torch.zeros(len(previews)), **changes)  # type: ignore[arg-type]


def test_sixteen_seeds_cost_five_eighths() -> None:
    """Looks after 8 and 14 of 20 steps leave 8 and 4: 16 x 8 + 8 x 6 + 4 x 6 of 320."""
    plan = halving()
    assert plan.steps(20) == (8, 14)
    assert plan.keeps(16) == 8
    assert plan.keeps(8) == 4
    assert (16 * 8 + 8 * 6 + 4 * 6) / 320 == 0.625


def test_few_steps_have_fewer_looks() -> None:
    """Looks at the same step are one, and none is after the last step, where samples are done."""
    assert halving().steps(1) == ()
    assert halving().steps(2) == (1,)
    assert halving(looks=(0.1, 0.2, 0.9)).steps(3) == (1,)


def test_the_best_go_on_in_their_order() -> None:
    """Of equal scores the first, and NaN is worse than any number."""
    scores = torch.tensor([3.0, float("nan"), 9.0, 3.0, -1.0])
    assert survivors(scores, 2) == [0, 2]
    assert survivors(scores, 4) == [0, 2, 3, 4]


def test_least_is_never_given_up() -> None:
    """The last samples stay, however small the share."""
    assert halving(keep=0.1, least=3).keeps(8) == 3
    assert halving(keep=0.1, least=3).keeps(2) == 2


@pytest.mark.parametrize(
    "changes", [{"keep": 1.0}, {"least": 0}, {"looks": (0.7, 0.4)}, {"looks": (0.0, 0.5)}]
)
def test_senseless_settings_are_refused(changes: dict[str, object]) -> None:
    """Shares that keep or look at nothing are named."""
    with pytest.raises(ValueError, match=r"is|are"):
        halving(**changes)
