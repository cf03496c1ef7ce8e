"""Places of a batch go to urgent jobs, then to tenants and their scenes in fair shares."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.batcher import Batcher, Ready


def of(key: str, count: int, scene: str | None = None, tenant: str = "") -> Ready:
    """Ready samples of a job without deadline, by default of a scene of its own."""
    return Ready(key, tenant, scene or key, count)


def test_a_lone_job_gets_every_place_that_it_can_use() -> None:
    """Its own count, or the batch."""
    assert Batcher(16).choose([of("a", 4)]) == {"a": 4}
    assert Batcher(16).choose([of("a", 20)]) == {"a": 16}
    assert Batcher(16).choose([]) == {}


def test_a_new_scene_is_in_the_very_next_batch() -> None:
    """However long others have had all places, and however many they are."""
    batcher = Batcher(4)
    crowd = [of(f"old{k}", 4) for k in range(9)]
    for _ in range(7):
        batcher.choose(crowd)
    assert batcher.choose([*crowd, of("new", 2)])["new"] >= 1


def test_scenes_share_the_places_evenly_over_time() -> None:
    """Three scenes on sixteen places: 5 1/3 each on average, never further than one place off."""
    batcher = Batcher(16)
    total: Counter[object] = Counter()
    for _ in range(30):
        chosen = batcher.choose([of("a", 16), of("b", 16), of("c", 16)])
        assert sum(chosen.values()) == 16
        assert all(count in (5, 6) for count in chosen.values())
        total.update(chosen)
    assert set(total.values()) == {160}


def test_more_scenes_than_places_take_turns() -> None:
    """Ten scenes on four places: in ten batches each has had four."""
    batcher = Batcher(4)
    total: Counter[object] = Counter()
    for _ in range(20):
        total.update(batcher.choose([of(f"scene{k}", 8) for k in range(10)]))
    assert max(total.values()) - min(total.values()) <= 1
    assert sum(total.values()) == 80


def test_a_tenant_with_many_scenes_gets_no_more_than_one_with_few() -> None:
    """Half for the tenant with one scene, half for the three scenes of the other."""
    batcher = Batcher(12)
    jobs = [of(f"a{k}", 12, tenant="a") for k in range(3)] + [of("b", 12, tenant="b")]
    assert batcher.choose(jobs) == {"a0": 2, "a1": 2, "a2": 2, "b": 6}


def test_places_that_a_scene_cannot_use_go_to_the_others() -> None:
    """Nothing is left empty, and who used less is owed nothing for ever."""
    batcher = Batcher(16)
    assert batcher.choose([of("small", 1), of("large", 40)]) == {"small": 1, "large": 15}


def test_jobs_of_one_scene_end_one_after_the_other() -> None:
    """The one that came first goes first."""
    chosen = Batcher(4).choose([of("first", 3, "tower"), of("second", 3, "tower")])
    assert chosen == {"first": 3, "second": 1}


def test_urgent_deadlines_come_first_the_earliest_before_the_others() -> None:
    """A job whose slack is less than what it needs takes its places before anybody's share."""
    later = Ready("later", "", "l", 3, slack_s=0.4, needs_s=0.5)
    sooner = Ready("sooner", "", "s", 3, slack_s=0.1, needs_s=0.5)
    relaxed = Ready("relaxed", "", "r", 4, slack_s=9.0, needs_s=0.5)
    assert Batcher(4).choose([relaxed, later, sooner]) == {"sooner": 3, "later": 1}
    chosen = Batcher(8).choose([relaxed, later, sooner])
    assert chosen == {"sooner": 3, "later": 3, "relaxed": 2}


@given(
    places=st.integers(1, 20),
    batches=st.lists(
        st.lists(
            st.tuples(st.sampled_from("xyz"), st.sampled_from("abcdef"), st.integers(1, 9)),
            max_size=9,
        ),
        max_size=12,
    ),
)
def test_no_place_is_given_twice_or_left_empty(
    places: int, batches: list[list[tuple[str, str, int]]]
) -> None:
    """Whatever comes and goes: as many samples as are ready or fit, and no job more than it has."""
    batcher = Batcher(places)
    for batch in batches:
        jobs = [Ready(k, tenant, scene, count) for k, (tenant, scene, count) in enumerate(batch)]
        chosen = batcher.choose(jobs)
        assert sum(chosen.values()) == min(places, sum(job.count for job in jobs))
        assert all(0 < chosen[key] <= jobs[int(str(key))].count for key in chosen)


def test_who_is_late_anyway_goes_behind_who_can_be_in_time() -> None:
    """Otherwise both would be late; among those who can, the least time to spare goes first."""
    late = Ready("late", "", "late", 4, slack_s=-0.5, needs_s=2.0)
    tight = Ready("tight", "", "tight", 3, slack_s=0.1, needs_s=2.0)
    near = Ready("near", "", "near", 4, slack_s=1.0, needs_s=2.0)
    assert Batcher(4).choose([late, near, tight]) == {"tight": 3, "near": 1}
    assert Batcher(4).choose([late, of("patient", 4)]) == {"late": 4}


def test_places_that_nobody_wanted_are_no_debt() -> None:
    """Beside one that needs a single place; when many come, all have their share at once."""
    batcher = Batcher(16)
    for _ in range(10):
        assert batcher.choose([of("a", 1), of("b", 16)]) == {"a": 1, "b": 15}
    crowd = [of("a", 1), of("b", 16), *(of(f"new{k}", 16) for k in range(14))]
    got = [batcher.choose(crowd).get("b", 0) for _ in range(12)]
    assert got == [1] * 12


def test_tenants_share_evenly_whatever_their_scenes_have_use_for() -> None:
    """A scene with one sample leaves its tenant's other scene the rest of the tenant's half."""
    batcher = Batcher(16)
    total: Counter[str] = Counter()
    jobs = [of("a1", 1, tenant="a"), of("a2", 16, tenant="a")]
    jobs += [of(f"b{k}", 16, tenant="b") for k in range(4)]
    for _ in range(300):
        for key, count in batcher.choose(jobs).items():
            total[str(key)[0]] += count
    assert total["a"] == pytest.approx(2400, abs=16)
    assert total["b"] == pytest.approx(2400, abs=16)


def test_deadlines_that_together_leave_no_time_are_urgent_before_one_alone_is() -> None:
    """Three jobs of ten seconds due in half a minute: who can wait gets nothing of theirs."""
    due = [Ready(k, "", str(k), 5, slack_s=21, needs_s=10, work_s=10) for k in range(3)]
    patient = Ready("patient", "", "p", 16)
    assert not any(job.urgent for job in due)
    assert Batcher(16).choose([patient, *due]) == {0: 5, 1: 5, 2: 5, "patient": 1}
    # One, or two that are due later, leave time for fair shares.
    assert Batcher(16).choose([patient, due[0]])["patient"] == 11
    later = [replace(job, slack_s=51) for job in due]
    assert Batcher(16).choose([patient, *later]) == {0: 4, 1: 4, 2: 4, "patient": 4}
