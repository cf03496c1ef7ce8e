"""The plan of a soak: everything follows from one seed, and has the shares it was asked for."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from benchmarks.soak.plan import Ask, Shape, asks, moves

NAMES = tuple(f"scene{k}" for k in range(1, 51))


def test_the_same_seed_gives_the_same_requests_and_moves() -> None:
    """And another seed gives others."""
    shape = Shape(NAMES)
    one, again, other = (list(islice(asks(shape, seed), 200)) for seed in (4, 4, 5))
    assert one == again
    assert one != other
    versions = dict.fromkeys(NAMES, 3)
    first, second = (list(islice(moves(versions, 4), 50)) for _ in range(2))
    assert first == second
    assert first != list(islice(moves(versions, 5), 50))


def test_requests_have_the_shape_that_was_asked_for() -> None:
    """Bounds are reached and kept, shares are met, and popularity falls as Zipf says."""
    shape = Shape(NAMES, cancel_share=0.2, image_share=0.1)
    drawn = list(islice(asks(shape, 0), 4000))
    assert [ask.index for ask in drawn] == list(range(4000))
    assert {ask.candidates for ask in drawn} == set(range(1, 7))
    assert {ask.steps for ask in drawn} == set(range(1, 5))
    assert {ask.seed for ask in drawn} == {0, 1, 2}
    assert sum(ask.cancel_after is not None for ask in drawn) == pytest.approx(800, rel=0.1)
    assert sum(ask.as_image for ask in drawn) == pytest.approx(400, rel=0.2)
    counts = Counter(ask.scene for ask in drawn)
    assert counts["scene1"] == pytest.approx(2 * counts["scene2"], rel=0.2)
    assert len(counts) == 50


def test_a_request_names_its_scene_or_its_version() -> None:
    """The path holds the digest where the version is given; seeds follow each other."""
    ask = Ask(index=0, scene="tower", seed=5, candidates=3, steps=1)
    assert ask.reference == "tower"
    assert ask.seeds == (5, 6, 7)
    assert Ask(0, "tower", 5, 3, 1, digest="ab").reference == "sha256:ab"


def test_only_scenes_of_several_versions_move() -> None:
    """By fewer turns than would bring the alias back; without such a scene nothing moves."""
    drawn = list(islice(moves({"one": 1, "two": 2, "three": 3}, 0), 200))
    assert {move.scene for move in drawn} == {"two", "three"}
    assert {move.turn for move in drawn if move.scene == "two"} == {1}
    assert {move.turn for move in drawn if move.scene == "three"} == {1, 2}
    assert 60 < sum(move.over_http for move in drawn) < 140
    assert list(moves({"one": 1}, 0)) == []


@pytest.mark.parametrize("change", [{"scenes": ()}, {"seeds": 0}, {"max_steps": 0}])
def test_a_shape_that_asks_for_nothing_is_refused(change: dict[str, object]) -> None:
    """One sentence with the remedy."""
    with pytest.raises(ValueError, match=r"name at least one|raise the smallest"):
        Shape(**{"scenes": NAMES, **change})  # type: ignore[arg-type]
