"""What fails half-way, as when a GPU's memory runs out, leaves nobody with what is another's.

Buckets and low-rank terms are a GPU's way; here they run on the CPU, in the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from realfill.base import Base
from service.engine.runner import Runner
from service.engine.sample import Sample
from service.engine.segmented import SegmentedWeights
from tests.service.engine.test_mixing import MILD, begun, job_for
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture
def base() -> Base:
    """A tiny base of its own for each test."""
    return tiny_base()


def on_a_gpus_way(base: Base, **settings: Any) -> Runner:
    """A runner with buckets and low-rank terms."""
    return Runner(base, application="segmented", static=True, max_samples=4, **settings)


def two_of(runner: Runner, base: Base, name: str, seed: int, rank: int = 4) -> list[Sample]:
    """Two samples of a scene, begun."""
    adapter = tiny_adapter(base, seed, rank=rank, scale=MILD)
    seeds = (10 * seed, 10 * seed + 1)
    return begun(runner, job_for(base, name, seed, adapter=adapter, seeds=seeds))


def latents_of(samples: list[Sample]) -> Tensor:
    """All of them. [N, C, h, w]"""
    return torch.stack([sample.latents for sample in samples])


def out_of_memory(*_: object, **__: object) -> NoReturn:
    """As a GPU says it."""
    raise torch.OutOfMemoryError("out of memory")


def weights_of(runner: Runner) -> SegmentedWeights:
    """The runner's."""
    assert isinstance(runner.weights, SegmentedWeights)
    return runner.weights


def alone(name: str, seed: int, steps: int = 4) -> Tensor:
    """Latents of a scene's two samples on a base where nothing fails."""
    base = tiny_base()
    runner = on_a_gpus_way(base)
    samples = two_of(runner, base, name, seed)
    for _ in range(steps):
        runner.step(samples)
    return latents_of(samples)


def test_a_capture_that_fails_leaves_no_bucket_that_counts_as_known(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its warm-ups have moved what lay there, which whoever comes next is not to go on with."""
    runner = on_a_gpus_way(base)
    a, b, c = (two_of(runner, base, name, k + 1) for k, name in enumerate("abc"))
    d = two_of(runner, base, "d", 9, rank=20)
    both = [*a, *b]
    for _ in range(2):
        runner.step(both)
    assert runner.buckets is not None
    asked: list[Callable[[], None]] = []

    def failing(work: Callable[[], None]) -> Callable[[], None]:
        asked.append(work)
        work()
        if len(asked) == 2:
            out_of_memory()
        return work

    with monkeypatch.context() as patched:
        patched.setattr(runner.buckets._captures, "of", failing)
        with pytest.raises(torch.OutOfMemoryError):
            runner.step([*c, *d])
    for samples in (c, d, both, both):
        runner.step(samples)
    expected = torch.cat([alone("a", 1), alone("b", 2)])
    torch.testing.assert_close(latents_of(both), expected, rtol=0, atol=2e-4)


def test_a_fill_that_fails_leaves_no_bucket_that_counts_as_known(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents of one job, histories of another."""
    runner = on_a_gpus_way(base)
    a, b = two_of(runner, base, "a", 1), two_of(runner, base, "b", 2)
    runner.step(a)
    stack, calls = torch.stack, [0]

    def failing(tensors: Any, *given: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 2:
            out_of_memory()
        return stack(tensors, *given)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "stack", failing)
        with pytest.raises(torch.OutOfMemoryError):
            runner.step(b)
    for _ in range(3):
        runner.step(a)
    assert torch.equal(latents_of(a), alone("a", 1))


def test_a_composition_that_fails_is_none(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base was restored for a mixed batch that never came; the scene gets its weights again."""
    runner = on_a_gpus_way(base)
    a, b = two_of(runner, base, "a", 1), two_of(runner, base, "b", 2)
    runner.step(a)
    with monkeypatch.context() as patched:
        patched.setattr(weights_of(runner), "_rows", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            runner.step([*a, *b])
    for _ in range(3):
        runner.step(a)
    assert torch.equal(latents_of(a), alone("a", 1))


def test_a_swap_that_fails_does_not_go_back_to_a_slot_of_another(base: Base) -> None:
    """The one slot was the first scene's and is the second's, when that cannot be merged."""
    runner = on_a_gpus_way(base, arena_bytes=1)
    weights = weights_of(runner)
    runner.step(two_of(runner, base, "a", 1))
    runner.weights.give_back("a")
    c = two_of(runner, base, "c", 3)
    staged = weights._held("c").staged
    swapper = weights._swapper
    writing = swapper._writing(staged)
    object.__setattr__(writing, "merge", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        runner.step(c)
    assert swapper.digest is None
    # Before anybody looks for adapters that have left, the first one comes back.
    runner.weights.give_back("c")
    again = two_of(runner, base, "a", 1)
    for _ in range(4):
        runner.step(again)
    assert torch.equal(latents_of(again), alone("a", 1))


def test_an_adapter_that_cannot_be_prepared_leaves_its_slot(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as there are slots and once more; nothing of it lies there."""
    runner = on_a_gpus_way(base, arena_bytes=1)
    weights = weights_of(runner)
    adapter = tiny_adapter(base, 1)
    with monkeypatch.context() as patched:
        patched.setattr(weights._swapper, "prepare", out_of_memory)
        for name in "xy":
            with pytest.raises(torch.OutOfMemoryError):
                runner.weights.take(name, adapter)
    (rank_class,) = weights._classes.values()
    assert not rank_class._buffer.any()
    assert runner.weights.take("z", adapter)


def test_a_forgotten_adapter_is_named_by_no_composition(base: Base) -> None:
    """Also where it was beside the weights, and has copies of its own."""
    runner = on_a_gpus_way(base)
    a, b = two_of(runner, base, "a", 1), two_of(runner, base, "b", 2)
    runner.step([*a, *b])
    runner.weights.give_back("a")
    assert runner.weights.forget("a")
    runner.weights.settle()
    weights = weights_of(runner)
    assert (weights._current, weights._composed, weights._slots.of) == ((), (), [])
    runner.step(b)
    runner.step(b)
