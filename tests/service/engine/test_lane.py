"""One lane serves many threads: own answers, bounded queue, prompt cancellation, no lost job."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from realfill.base import Base
from realfill.errors import AdapterMismatch
from service.engine.engine import Engine
from service.engine.job import Job, Sampled
from service.errors import Cancelled, EngineClosed, QueueFull
from tests.tiny import tiny_adapter, tiny_base

WAIT_S = 60.0


@pytest.fixture(scope="module")
def base() -> Base:
    """One tiny base, handed from engine to engine."""
    return tiny_base()


def job_for(base: Base, **changes: Any) -> Job:
    """A short job on the bare base."""
    mask = torch.zeros(32, 32)
    mask[8:24, 8:24] = 1.0
    job = Job(
        digest=None,
        adapter=None,
        prompt_embedding=torch.zeros(77, 16),
        target=torch.full((3, 32, 32), 0.3),
        mask=mask,
        seeds=(1, 2),
        steps=2,
        sampler="ddim",
    )
    return dataclasses.replace(job, cancel=threading.Event(), **changes)


class Blocker:
    """A job that stands in the lane after its first step until it is let go."""

    def __init__(self, base: Base, **changes: Any) -> None:
        self.entered, self.release = threading.Event(), threading.Event()
        self.job = job_for(base, on_step=self._on_step, **changes)

    def _on_step(self, done: int, total: int) -> None:
        self.entered.set()
        assert self.release.wait(WAIT_S)

    def submit(self, engine: Engine) -> Any:
        """Submit it and wait until it stands in the lane."""
        future = engine.submit(self.job)
        assert self.entered.wait(WAIT_S)
        return future


def test_concurrent_scenes_each_get_their_own_answer(base: Base) -> None:
    """Four threads with two adapters and the bare base: every answer is that of the scene alone."""
    adapters = {"a": tiny_adapter(base, 1), "b": tiny_adapter(base, 2), None: None}
    order = ["a", "b", None, "b", "a", "a", None, "b"]
    with Engine(base, max_queue=8) as engine:
        alone = {
            digest: engine.submit(job_for(base, digest=digest, adapter=adapter)).result(WAIT_S)
            for digest, adapter in adapters.items()
        }

        def request(digest: str | None) -> Sampled:
            job = job_for(base, digest=digest, adapter=adapters[digest])
            return engine.submit(job).result(WAIT_S)

        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(request, order))
    for digest, answer in zip(order, answers, strict=True):
        assert answer.digest == digest
        assert torch.equal(answer.samples, alone[digest].samples)
    assert not torch.equal(alone["a"].samples, alone["b"].samples)


def test_nothing_is_traced_after_the_start(base: Base) -> None:
    """Whoever comes, alone or together, in whatever number: no batch waits for its program."""
    adapters = {"a": tiny_adapter(base, 1), "b": tiny_adapter(base, 2, rank=5), None: None}
    with Engine(base) as engine:
        traced = engine.metrics().programs
        for count in (1, 3, 16):
            jobs = [
                job_for(base, digest=digest, adapter=adapter, seeds=tuple(range(count)))
                for digest, adapter in adapters.items()
            ]
            for job in jobs:
                engine.submit(job).result(WAIT_S)
            for future in [engine.submit(job) for job in jobs]:
                future.result(WAIT_S)
        assert engine.metrics().swaps > 9
        assert engine.metrics().programs == traced > 0


def test_full_queue_refuses_with_the_time_until_there_is_room(base: Base) -> None:
    """The promise is the backlog, divided by the jobs that have to leave one after the other."""
    with Engine(base, max_queue=1, max_running=1) as engine:
        blocker = Blocker(base, steps=5)
        running = blocker.submit(engine)
        waiting = engine.submit(job_for(base))
        engine.cost.calibrate([1], lambda size: 3.0, lambda: 0.5)
        # The drift as it was learnt from real steps belongs to the real calibration.
        drift = engine.cost.drift
        # Two seeds of five steps are ten sample-steps, of which one step made two.
        backlog_s = (8 + 4) * 3.0 * drift + 4 * 0.5
        assert engine.backlog_s() == pytest.approx(backlog_s)
        with pytest.raises(QueueFull, match="1 jobs wait already") as refusal:
            engine.submit(job_for(base))
        assert refusal.value.retry_after_s == pytest.approx(backlog_s / 2)
        metrics = engine.metrics()
        assert (metrics.waiting, metrics.running, metrics.refused) == (1, 1, 1)
        assert metrics.pending_sample_steps == 12
        blocker.release.set()
        assert running.result(WAIT_S).samples.shape == (2, 3, 32, 32)
        assert waiting.result(WAIT_S).queued_s > 0


def test_running_job_is_cancelled_within_one_step(base: Base) -> None:
    """The flag ends the job, its future says so, and the lane takes the next one."""
    with Engine(base) as engine:
        blocker = Blocker(base, steps=500)
        running = blocker.submit(engine)
        following = engine.submit(job_for(base))
        blocker.job.cancel.set()
        blocker.release.set()
        with pytest.raises(Cancelled):
            running.result(WAIT_S)
        assert following.result(WAIT_S).digest is None
        metrics = engine.metrics()
    assert (metrics.completed, metrics.cancelled) == (1, 1)
    assert metrics.sample_steps == 4


def test_waiting_jobs_are_cancelled_by_flag_or_future_and_free_their_places(base: Base) -> None:
    """A cancelled job in the queue never runs, and another may take its place at once."""
    ran: list[str] = []

    def marked(name: str) -> Job:
        return job_for(base, on_step=lambda done, total: ran.append(name))

    with Engine(base, max_queue=2, max_running=1) as engine:
        blocker = Blocker(base)
        blocker.submit(engine)
        flagged_job = marked("flagged")
        flagged, dropped = engine.submit(flagged_job), engine.submit(marked("dropped"))
        flagged_job.cancel.set()
        assert dropped.cancel()
        kept = [engine.submit(marked("kept")) for _ in range(2)]
        with pytest.raises(Cancelled, match="while it waited"):
            flagged.result(0)
        with pytest.raises(CancelledError):
            dropped.result(0)
        blocker.release.set()
        for future in kept:
            future.result(WAIT_S)
        assert engine.metrics().cancelled == 2
    assert set(ran) == {"kept"}


def test_waiting_job_is_told_of_its_cancellation_within_one_step(base: Base) -> None:
    """The queue is looked through at every step of the running job, not only when it ends."""
    go_on = threading.Semaphore(0)
    entered = threading.Event()

    def on_step(done: int, total: int) -> None:
        entered.set()
        assert go_on.acquire(timeout=WAIT_S)

    with Engine(base, max_running=1) as engine:
        running = engine.submit(job_for(base, steps=3, on_step=on_step))
        assert entered.wait(WAIT_S)
        job = job_for(base)
        waiting = engine.submit(job)
        job.cancel.set()
        go_on.release()
        with pytest.raises(Cancelled):
            waiting.result(WAIT_S)
        assert not running.done()
        go_on.release(2)
        running.result(WAIT_S)


def test_failing_job_gets_its_error_and_the_lane_survives(base: Base) -> None:
    """A wrong adapter and a callback that raises fail their own futures only."""
    wrong = tiny_adapter(base, 1)
    wrong.factors["mid_block.nowhere"] = next(iter(wrong.factors.values()))

    def raising(done: int, total: int) -> None:
        raise RuntimeError("listener broke")

    with Engine(base) as engine:
        before = engine.submit(job_for(base)).result(WAIT_S)
        first = engine.submit(job_for(base, digest="wrong", adapter=wrong))
        second = engine.submit(job_for(base, on_step=raising))
        after = engine.submit(job_for(base)).result(WAIT_S)
        with pytest.raises(AdapterMismatch, match=r"mid_block\.nowhere"):
            first.result(WAIT_S)
        with pytest.raises(RuntimeError, match="listener broke"):
            second.result(WAIT_S)
        assert engine.metrics().failed == 2
    assert torch.equal(before.samples, after.samples)


def test_job_that_does_not_fit_is_refused_at_once(base: Base) -> None:
    """A mistake of the caller is raised by submit, not delivered later."""
    with Engine(base) as engine, pytest.raises(ValueError, match="'euler' is unknown"):
        engine.submit(job_for(base, sampler="euler"))


def test_close_finishes_what_was_submitted(base: Base) -> None:
    """Closing waits for the queue to drain; then nothing more is taken."""
    engine = Engine(base).start()
    futures = [engine.submit(job_for(base, seeds=(k,))) for k in range(4)]
    engine.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(EngineClosed):
        engine.submit(job_for(base))
    engine.close()
    with pytest.raises(EngineClosed, match="make a new one"):
        engine.start()


def test_close_gives_the_base_back_as_it_was(base: Base) -> None:
    """After an adapter was served, the weights of the base are what they were, to the bit."""
    before = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    with Engine(base) as engine:
        engine.submit(job_for(base, digest="a", adapter=tiny_adapter(base, 1))).result(WAIT_S)
    after = base.unet.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_close_without_drain_cancels_what_was_submitted(base: Base) -> None:
    """Closing at once ends the running job within a step and the waiting ones unrun."""
    engine = Engine(base).start()
    blocker = Blocker(base, steps=500)
    running, waiting = blocker.submit(engine), engine.submit(job_for(base))
    closing = threading.Thread(target=lambda: engine.close(drain=False))
    closing.start()
    assert blocker.job.cancel.wait(WAIT_S)
    blocker.release.set()
    closing.join(WAIT_S)
    for future in (running, waiting):
        with pytest.raises(Cancelled):
            future.result(0)
    assert engine.pending == 0


def test_engine_that_was_not_started_takes_no_job(base: Base) -> None:
    """Submitting before start is an error, not a job that waits for ever."""
    with pytest.raises(EngineClosed, match="start it"):
        Engine(base).submit(job_for(base))
    with pytest.raises(ValueError, match="max_queue is 0"):
        Engine(base, max_queue=0)


def test_engine_whose_first_steps_fail_says_so_at_its_start(base: Base) -> None:
    """A device that cannot do one step is found at the start, and takes no job."""

    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    engine = Engine(base)
    hook = base.unet.register_forward_pre_hook(out_of_memory)
    try:
        with pytest.raises(EngineClosed, match="RuntimeError: out of memory"):
            engine.start()
    finally:
        hook.remove()
    with pytest.raises(EngineClosed, match="out of memory"):
        engine.submit(job_for(base))
    engine.close()


def test_lane_that_ends_tells_all_its_jobs_at_once(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device lost between two jobs leaves nobody waiting, neither in the lane nor before it."""

    def lost() -> None:
        raise RuntimeError("device lost")

    engine = Engine(base, max_running=1).start()
    blocker = Blocker(base, steps=500)
    futures = [blocker.submit(engine), *(engine.submit(job_for(base)) for _ in range(2))]
    monkeypatch.setattr(engine.runner, "moment", lost)
    blocker.release.set()
    for future in futures:
        with pytest.raises(EngineClosed, match=r"device lost\): restart the service"):
            future.result(WAIT_S)
    assert str(engine.failure) == "device lost"
    assert engine.pending == 0
    assert engine.metrics().failed == 3
    with pytest.raises(EngineClosed, match="device lost"):
        engine.submit(job_for(base))
    engine.close()


def test_futures_may_call_back_into_the_engine(base: Base) -> None:
    """A callback that asks for metrics or submits more work does not lock the lane."""
    with Engine(base) as engine:
        seen: list[int] = []
        chained: list[Any] = []
        more = threading.Event()

        def on_done(future: Any) -> None:
            seen.append(engine.metrics().completed)
            chained.append(engine.submit(job_for(base)))
            more.set()

        engine.submit(job_for(base)).add_done_callback(on_done)
        assert more.wait(WAIT_S)
        assert chained[0].result(WAIT_S).digest is None
    assert seen == [1]
