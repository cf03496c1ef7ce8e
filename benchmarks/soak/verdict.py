"""The promises, and one sentence for each that a run broke."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.soak.driver import Record
from benchmarks.soak.memory import growth_pct
from benchmarks.soak.outcomes import Outcome
from benchmarks.soak.pictures import LEVELS

LOST = ("hung", "refused", "server_error", "malformed", "broken")


@dataclass(frozen=True)
class Ending:
    """How the server ended.

    Attributes:
        status: Exit status after it was asked to stop; None where it had to be killed.
        busy: What it still had under way when nobody asked for anything any more.
        died: Whether it ended before it was asked to.
    """

    status: int | None
    busy: str | None = None
    died: bool = False


def wrong_digests(record: Record) -> list[Outcome]:
    """Answers by an adapter to which the alias did not point while they were under way."""
    wrong = []
    for outcome in record.outcomes:
        if outcome.kind != "answer" or outcome.digest is None:
            continue
        allowed = (
            record.ledger.allowed(outcome.scene, outcome.began_s, outcome.ended_s)
            if outcome.asked_digest is None
            else frozenset([outcome.asked_digest])
        )
        if outcome.digest not in allowed:
            wrong.append(outcome)
    return wrong


def violations(
    record: Record, ending: Ending, *, max_growth_pct: float, moving: bool = True
) -> list[str]:
    """One sentence for each broken promise, none where all were kept.

    Args:
        record: What was seen.
        ending: How the server ended.
        max_growth_pct: Of memory after the warm-up.
        moving: Whether aliases were to move; only then are two versions of a scene drawn.
    """
    promises: list[Callable[[Record], str | None]] = [
        _digests_are_right,
        _pictures_repeat,
        _each_request_ends_once,
        _nothing_fails,
        _refusals_say_when_to_return,
        lambda record: _memory_is_flat(record, max_growth_pct),
        _probes_answer,
        lambda record: _aliases_move(record, moving),
        lambda record: _the_run_proves_something(record, moving),
    ]
    broken = [sentence for promise in promises if (sentence := promise(record)) is not None]
    return broken + _ends_well(ending)


def _digests_are_right(record: Record) -> str | None:
    wrong = wrong_digests(record)
    if not wrong:
        return None
    first = wrong[0]
    return (
        f"{_of(len(wrong), 'answer')} came from another adapter than asked for, first request"
        f" {first.index}: adapter {str(first.digest)[:12]} for {first.scene} between"
        f" {first.began_s:.2f} and {first.ended_s:.2f} s."
    )


def _pictures_repeat(record: Record) -> str | None:
    far = record.gallery.far
    if not far:
        return None
    kind, difference = far[0]
    return (
        f"{_of(len(far), 'repeated picture')} differed from the first of its kind by more than"
        f" {LEVELS} level, first {kind.scene} by adapter {kind.digest[:12]}, seed {kind.seed},"
        f" {kind.steps} steps: by {difference} levels."
    )


def _each_request_ends_once(record: Record) -> str | None:
    ends = Counter(outcome.index for outcome in record.outcomes)
    wrong = [index for index in record.sent if ends[index] != 1]
    strays = set(ends) - set(record.sent)
    if not wrong and not strays:
        return None
    first = min([*wrong, *strays])
    return (
        f"{_of(len(wrong) + len(strays), 'request')} did not end exactly once, first request"
        f" {first}: {ends[first]} outcomes."
    )


def _nothing_fails(record: Record) -> str | None:
    failed = [outcome for outcome in record.outcomes if outcome.kind in LOST]
    if not failed:
        return None
    counts = Counter(outcome.kind.replace("_", " ") for outcome in failed)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    first = failed[0]
    return (
        f"{_of(len(failed), 'request')} got neither an answer nor 429 ({kinds}), first request"
        f" {first.index} for {first.scene}: {first.detail}."
    )


def _refusals_say_when_to_return(record: Record) -> str | None:
    mute = [o for o in record.outcomes if o.kind == "throttled" and o.retry_after is None]
    if not mute:
        return None
    return (
        f"{_of(len(mute), 'refusal')} with 429 came without Retry-After, first request"
        f" {mute[0].index}."
    )


def _memory_is_flat(record: Record, max_growth_pct: float) -> str | None:
    growth = growth_pct(record.memory)
    if growth is None:
        return "Memory was sampled too seldom to judge its growth: run longer."
    if growth <= max_growth_pct:
        return None
    return (
        f"Memory grew by {growth:.2f} % after the warm-up, more than the {max_growth_pct:g} %"
        " allowed."
    )


def _probes_answer(record: Record) -> str | None:
    failures = record.probe_failures
    if record.probes and not failures:
        return None
    if not record.probes:
        return "Readiness and metrics were never asked for: run longer."
    return f"{len(failures)} of {_of(record.probes, 'probe')} failed, first {failures[0]}."


def _aliases_move(record: Record, moving: bool) -> str | None:
    if failures := record.move_failures:
        return f"{_of(len(failures), 'alias move')} failed, first {failures[0]}."
    if moving and not record.moves:
        return "No alias moved, so that no answer could be of a version from before: run longer."
    return None


def _the_run_proves_something(record: Record, moving: bool) -> str | None:
    """Checks that cannot fail prove nothing."""
    if record.count("answer") == 0:
        return "No request was answered, so nothing was shown: look at the server's log."
    if record.gallery.repeated == 0:
        return "No picture was asked for twice, so nothing was compared: run longer."
    if moving and not record.gallery.pairs():
        return (
            "No two versions of a scene were drawn with one seed, so that a wrong adapter would not"
            " show: run longer."
        )
    alike = record.gallery.alike()
    if not alike:
        return None
    one, other = alike[0]
    return (
        f"{_of(len(alike), 'pair')} of pictures by different versions look the same, first those"
        f" of {one.scene} by {one.digest[:12]} and {other.digest[:12]}: raise --scale, so that a"
        " wrong adapter would show."
    )


def _ends_well(ending: Ending) -> list[str]:
    broken = []
    if ending.died:
        broken.append("The server ended before it was asked to: look at its log.")
    if ending.busy is not None:
        broken.append(f"The server did not become idle after the last request: {ending.busy}.")
    if ending.status != 0:
        how = "had to be killed" if ending.status is None else f"ended with status {ending.status}"
        broken.append(f"Asked to stop, the server {how}: look at its log.")
    return broken


def _of(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
