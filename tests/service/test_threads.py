"""Work side by side, also from within the pool that does it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from service.threads import side_by_side


@pytest.mark.timeout(20)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_thread_of_the_pool_waits_for_none_that_waits(threads: int) -> None:
    """As many at once as the pool has threads: outcomes come in order, and nobody hangs."""
    with ThreadPoolExecutor(threads) as pool:
        tasks = [partial(divmod, k, 2) for k in range(4)]
        asked = [pool.submit(side_by_side, pool, tasks) for _ in range(threads)]
        assert [future.result() for future in asked] == [[divmod(k, 2) for k in range(4)]] * threads


@pytest.mark.timeout(20)
def test_idle_threads_take_part() -> None:
    """Three tasks that each need two others to have begun."""
    met = threading.Barrier(3)
    with ThreadPoolExecutor(2) as pool:
        assert sorted(side_by_side(pool, [met.wait] * 3)) == [0, 1, 2]


def test_the_first_error_is_told() -> None:
    """Whoever met it."""

    def fail() -> None:
        raise ValueError("no")

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="no"):
        side_by_side(pool, [int, fail, int])
    with ThreadPoolExecutor(2) as pool:
        assert side_by_side(pool, []) == []
