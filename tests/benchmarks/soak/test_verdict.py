"""Every promise, broken on purpose, gives its sentence; a sound run gives none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.soak.driver import Record, still_busy
from benchmarks.soak.ledger import AliasLedger
from benchmarks.soak.memory import MemorySample
from benchmarks.soak.outcomes import Outcome
from benchmarks.soak.pictures import Gallery, Kind
from benchmarks.soak.verdict import Ending, violations, wrong_digests
from tests.fakes import encoded

DIGESTS = {"scene1": ("a", "b"), "scene10": ("c",)}
KIND = Kind("scene1", "b", 2, 0)


def picture(level: int) -> bytes:
    return encoded(np.full((4, 4, 3), level, np.uint8))


def sound() -> Record:
    """Three answers, a refusal and a cancelled request; one alias moved from 10 to 11 s."""
    record = Record(AliasLedger(DIGESTS))
    record.ledger.begin_move("scene1", 1, 10.0)
    record.ledger.end_move("scene1", 11.0)
    record.moves = 1
    record.sent = [0, 1, 2, 3, 4]
    record.outcomes = [
        Outcome(0, "scene1", "answer", 0.0, 2.0, digest="b"),
        Outcome(1, "scene1", "answer", 9.0, 12.0, digest="a"),
        Outcome(2, "scene10", "throttled", 1.0, 1.5, retry_after="2"),
        Outcome(3, "scene10", "cancelled", 2.0, 2.5),
        Outcome(4, "scene1", "answer", 40.0, 41.0, digest="b", asked_digest="b"),
    ]
    record.memory = [MemorySample(float(k), 1000) for k in range(40)]
    record.probes = 40
    record.gallery.add(KIND, picture(10))
    record.gallery.add(KIND, picture(11))
    record.gallery.add(replace(KIND, digest="a"), picture(200))
    return record


def broken_promises(record: Record, ending: Ending | None = None) -> list[str]:
    return violations(record, ending or Ending(status=0), max_growth_pct=2.0)


def test_a_sound_run_breaks_no_promise() -> None:
    """Refusals with Retry-After, cancels and one level of difference are allowed."""
    assert broken_promises(sound()) == []


def _late_version(record: Record) -> None:
    record.outcomes[0] = replace(record.outcomes[0], began_s=11.5, ended_s=12.5)


def _neighbours_version(record: Record) -> None:
    record.outcomes[0] = replace(record.outcomes[0], digest="c")


def _another_than_insisted(record: Record) -> None:
    record.outcomes[4] = replace(record.outcomes[4], digest="a")


def _other_picture(record: Record) -> None:
    record.gallery.add(KIND, picture(12))


def _lost(record: Record) -> None:
    record.sent.append(5)


def _answered_twice(record: Record) -> None:
    record.outcomes.append(record.outcomes[0])


def _hung(record: Record) -> None:
    record.sent.append(5)
    record.outcomes.append(Outcome(5, "scene1", "hung", 1.0, 9.0, detail="no answer within 8 s"))


def _failed(record: Record) -> None:
    record.outcomes[3] = Outcome(3, "scene10", "server_error", 1.0, 2.0, detail="500: oh")


def _mute_refusal(record: Record) -> None:
    record.outcomes[2] = replace(record.outcomes[2], retry_after=None)


def _leak(record: Record) -> None:
    record.memory = [MemorySample(float(k), 1000 + k) for k in range(40)]


def _no_memory(record: Record) -> None:
    record.memory.clear()


def _deaf_probe(record: Record) -> None:
    record.probe_failures.append("/readyz at 3.0 s: status 503")


def _unprobed(record: Record) -> None:
    record.probes = 0


def _stuck_alias(record: Record) -> None:
    record.move_failures.append("scene1 to version 2: locked")


def _no_moves(record: Record) -> None:
    record.moves = 0


def _no_pairs(record: Record) -> None:
    record.gallery = Gallery()
    record.gallery.add(KIND, picture(10))
    record.gallery.add(KIND, picture(11))
    record.gallery.add(replace(KIND, scene="scene10", digest="c"), picture(200))


def _no_answers(record: Record) -> None:
    record.outcomes = [replace(o, kind="throttled", retry_after="1") for o in record.outcomes]


def _no_repeats(record: Record) -> None:
    record.gallery.repeated = 0


def _invisible_adapters(record: Record) -> None:
    record.gallery.add(replace(KIND, digest="c"), picture(200))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_late_version, "1 answer came from another adapter than asked for, first request 0"),
        (_neighbours_version, "adapter c for scene1 between 0.00 and 2.00 s."),
        (_another_than_insisted, "1 answer came from another adapter than asked for, first req"),
        (_other_picture, "1 repeated picture differed from the first of its kind by more than 1"),
        (_lost, "1 request did not end exactly once, first request 5: 0 outcomes."),
        (_answered_twice, "1 request did not end exactly once, first request 0: 2 outcomes."),
        (_hung, "1 request got neither an answer nor 429 (1 hung), first request 5 for scene1"),
        (_failed, "(1 server error), first request 3 for scene10: 500: oh."),
        (_mute_refusal, "1 refusal with 429 came without Retry-After, first request 2."),
        (_leak, "Memory grew by 1.97 % after the warm-up"),
        (_no_memory, "Memory was sampled too seldom"),
        (_deaf_probe, "1 of 40 probes failed, first /readyz at 3.0 s: status 503."),
        (_unprobed, "Readiness and metrics were never asked for"),
        (_stuck_alias, "1 alias move failed, first scene1 to version 2: locked."),
        (_no_moves, "No alias moved, so that"),
        (_no_pairs, "No two versions of a scene were drawn with one seed"),
        (_no_answers, "No request was answered"),
        (_no_repeats, "No picture was asked for twice"),
        (_invisible_adapters, "1 pair of pictures by different versions look the same"),
    ],
)
def test_each_broken_promise_is_one_sentence(
    spoil: Callable[[Record], None], sentence: str
) -> None:
    """That one and no other."""
    record = sound()
    spoil(record)
    [said] = violations(record, Ending(status=0), max_growth_pct=1.0)
    assert sentence in said
    assert said.endswith(".")


def test_aliases_that_were_not_to_move_need_not_have_moved() -> None:
    """A run without moves, or of scenes with one version each, makes no pair of versions either."""
    record = sound()
    _no_moves(record)
    _no_pairs(record)
    assert violations(record, Ending(status=0), max_growth_pct=2.0, moving=False) == []


def test_a_bad_ending_is_told() -> None:
    """A server that dies, stays busy, or must be killed."""
    for ending, sentence in (
        (Ending(0, died=True), "The server ended before it was asked to"),
        (Ending(0, busy="realfill_lane_jobs is 1.0"), "idle after the last request: realfill_lane"),
        (Ending(None), "Asked to stop, the server had to be killed"),
        (Ending(2), "Asked to stop, the server ended with status 2"),
    ):
        [said] = broken_promises(sound(), ending)
        assert sentence in said


def test_wrong_digests_are_those_of_answers_only() -> None:
    """All three answers of a scene whose alias never pointed there."""
    record = sound()
    record.outcomes = [
        replace(outcome, digest="x") if outcome.kind == "answer" else outcome
        for outcome in record.outcomes
    ]
    assert [outcome.index for outcome in wrong_digests(record)] == [0, 1, 4]


def test_a_gauge_above_zero_or_absent_is_work_under_way() -> None:
    """The exposition is read as a scraper reads it."""
    lines = ["# HELP realfill_lane_jobs Jobs.", "realfill_completions_in_flight 0.0"]
    assert still_busy("\n".join([*lines, "realfill_lane_jobs 0.0"])) is None
    assert still_busy("\n".join([*lines, "realfill_lane_jobs 2.0"])) == "realfill_lane_jobs is 2.0"
    assert still_busy("\n".join(lines)) == "realfill_lane_jobs is absent"
