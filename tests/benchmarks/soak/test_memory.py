"""Memory of a process tree, and how its growth is judged."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.soak.memory import MemorySample, growth_pct, resident_bytes, tree_of

CHILD = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", "x = bytearray(64 << 20); print(flush=True); input()"],
    start_new_session=True,
)
child.wait()
"""


def test_a_tree_holds_children_in_other_sessions_and_their_memory() -> None:
    """As the server's worker is: a grandchild of 64 MiB counts."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        tree = tree_of(parent.pid)
        assert len(tree) == 2
        assert tree[0] == parent.pid
        assert resident_bytes(parent.pid) > 64 << 20
        parent.communicate(b"\n")
    assert resident_bytes(parent.pid) == 0


def samples(*sizes: int) -> list[MemorySample]:
    return [MemorySample(float(k), size) for k, size in enumerate(sizes)]


def test_growth_within_the_warm_up_does_not_count() -> None:
    """Of 31 s, the first ten may do what they want."""
    assert growth_pct(samples(*range(1, 11), *[100] * 21)) == 0


def test_growth_after_the_warm_up_is_that_of_its_ends() -> None:
    """From a median of 100 to one of 103, whatever lies between, and one peak is no growth."""
    sizes = [50] * 10 + [100] * 6 + [500] * 9 + [103] * 6
    sizes[12] = 900
    assert growth_pct(samples(*sizes)) == pytest.approx(3.0)


def test_a_slow_leak_shows() -> None:
    """One unit a second on a thousand, over 300 s: the medians lie 150 s apart."""
    sizes = [1000 + k for k in range(301)]
    assert growth_pct(samples(*sizes)) == pytest.approx(100 * 150 / 1125)


def test_few_samples_give_no_judgement() -> None:
    """Eleven are too few."""
    assert growth_pct(samples(*[100] * 11)) is None
    assert growth_pct(samples(*[100] * 12)) == 0
