"""The road of one completion with the real engine, on the CPU and on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from realfill.base import Base
from realfill.capsule import read_capsule
from realfill.rank.matchers import load_matcher
from service.answer import Plan
from service.engine import Engine
from service.road import Road
from service.settings import Settings
from tests.fakes import road_of
from tests.tiny import save_tiny_base, tiny_base, tiny_capsule

PLAN = Plan(seeds=(1, 2, 9), steps=2, sampler="ddim", feather_px=2, seamless=False)


@pytest.fixture(scope="module")
def tower(base: Base) -> bytes:
    return tiny_capsule(base, "tower", seed=1)


@pytest.fixture
def real(tower: bytes, tmp_path: Path) -> Iterator[Road]:
    base = tiny_base()
    road = road_of(base, tmp_path, Engine(base))
    road.registry.publish(tower)
    road.start()
    yield road
    road.close()


def test_the_real_engine_gives_a_seed_the_same_picture_again(
    real: Road, image: Tensor, mask: Tensor
) -> None:
    """Digest and seed determine the picture, and another seed another one."""
    first = real.complete("tower", image, mask, PLAN)
    again = real.complete("tower", image, mask, PLAN)
    place = {candidate.seed: k for k, candidate in enumerate(first.candidates)}
    assert [c.seed for c in again.candidates] == [c.seed for c in first.candidates]
    assert torch.equal(first.picture(place[1]), again.picture(place[1]))
    assert not torch.equal(first.picture(place[1]), first.picture(place[2]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_is_encoded_from_text_while_serving(
    tower: bytes, tmp_path: Path, image: Tensor, mask: Tensor
) -> None:
    """The service keeps the shapes of the text encoder alone; the capsule brings its prompt."""
    save_tiny_base(tmp_path / "base")
    settings = Settings(
        registry=str(tmp_path / "registry"),
        base=str(tmp_path / "base"),
        matcher="none",
        device="cpu",
    )
    # BentoML warns of itself when it is imported.
    road = import_module("service.app").build_road(settings)
    assert {weight.device.type for weight in road.base.text_encoder.parameters()} == {"meta"}
    road.registry.publish(tower)
    road.start()
    try:
        answer = road.complete("tower", image, mask, PLAN)
    finally:
        road.close()
    assert answer.digest == answer.version.digest
    assert len(answer.candidates) == len(PLAN.seeds)


def test_the_real_engine_answers_each_scene_with_its_own_adapter(
    real: Road, image: Tensor, mask: Tensor
) -> None:
    """A, B, A: the first and the third are equal, the second is not."""
    real.registry.publish(tiny_capsule(real.base, "bridge", seed=2))
    plan = Plan(seeds=(5,), steps=2, sampler="ddim", feather_px=2)
    pictures = [
        real.complete(name, image, mask, plan).picture(0) for name in ("tower", "bridge", "tower")
    ]
    assert torch.equal(pictures[0], pictures[2])
    assert not torch.equal(pictures[0], pictures[1])


@pytest.mark.gpu
def test_adapters_wait_for_a_cuda_device_in_page_locked_memory(
    tower: bytes, tmp_path: Path
) -> None:
    """All factors, with the values that the registry has."""
    base = tiny_base()
    base.unet.to("cuda")
    road = road_of(base, tmp_path)
    version = road.registry.publish(tower)
    held = road.capsules.get(version).capsule.adapter
    assert all(factor.is_pinned() for factors in held.factors.values() for factor in factors)
    written = read_capsule(tower, base).adapter
    assert all(torch.equal(held.factors[path][1], b) for path, (_, b) in written.factors.items())


@pytest.mark.gpu
def test_samples_of_a_cuda_device_are_finished_there_as_elsewhere(
    base: Base, tower: bytes, tmp_path: Path, image: Tensor, mask: Tensor
) -> None:
    """Seam, composite and ranking; pictures and verdicts then are the CPU's."""
    road = road_of(base, tmp_path, matcher=load_matcher("torch:nano", device="cuda"))
    road.registry.publish(tower)
    plan = replace(PLAN, seamless=True)
    answers = []
    for device in ("cpu", "cuda"):
        pending = road.begin(
            road.look_up("tower"), image, road.look_at(mask, plan), plan, threading.Event()
        )
        sampled = pending.future.result()
        sampled = replace(sampled, samples=sampled.samples.to(device))
        answers.append(road.finish(pending, sampled))
    here, there = ({c.seed: (c, answer.picture(k)) for k, c in enumerate(answer.candidates)}
                   for answer in answers)  # fmt: skip
    assert here.keys() == there.keys() == set(PLAN.seeds)
    for seed, (candidate, picture) in here.items():
        assert there[seed][0].score == pytest.approx(candidate.score, abs=2)
        assert (there[seed][1].int() - picture.int()).abs().max() <= 1
    assert answers[1].evidence(0) is not None
