"""The lane has the cores; what begins beside it has one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from service.engine.cores import all_cores
from service.engine.engine import Engine
from tests.service.engine.test_lane import WAIT_S, job_for
from tests.tiny import tiny_base


def _in_new_thread(work: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _compute_and_fail() -> None:
    with all_cores(3):
        raise RuntimeError(f"{torch.get_num_threads()} cores")


@pytest.fixture(autouse=True)
def two_cores() -> None:
    """Asked for, since a machine may have but one."""
    torch.set_num_threads(2)


def test_threads_that_begin_beside_the_lane_compute_with_one_core() -> None:
    """And with as many as before once it has ended; those that there were keep theirs."""
    base = tiny_base()
    seen: list[tuple[str, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((threading.current_thread().name, torch.get_num_threads()))

    with Engine(base) as engine:
        assert torch.get_num_threads() == 2
        assert _in_new_thread(torch.get_num_threads) == 1
        engine.submit(job_for(base, on_step=note)).result(WAIT_S)
    assert set(seen) == {("lane", 2)}
    assert _in_new_thread(torch.get_num_threads) == 2


def test_cores_are_given_back_after_a_failure() -> None:
    """Whatever ended the lane."""

    def fail() -> int:
        with pytest.raises(RuntimeError, match="3 cores"):
            _compute_and_fail()
        return torch.get_num_threads()

    assert _in_new_thread(fail) == 2
    assert _in_new_thread(torch.get_num_threads) == 2
