"""The simple server draws what ours draws, scene by scene, over the same path."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

from benchmarks.engine.adapters import random_capsule
from benchmarks.engine.requests import references_of
from benchmarks.engine.service import hole, job_for, png, square_of
from benchmarks.load.peer import Peer, application
from realfill.base import Base
from realfill.rank.matching import loftr
from service.engine import Runner
from tests.tiny import tiny_base

# diffusers' scheduler converts tensors as NumPy 2 no longer likes it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCENES = ("scene_0000", "scene_0001")


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base()


@pytest.fixture(scope="module")
def capsules(base: Base) -> dict[str, bytes]:
    """Two scenes, whose adapters change pictures by much."""
    extras = {"references.0": references_of(base.size_px)[0]}
    return {
        name: random_capsule(base, name, rank=4, seed=seed, scale=20.0, extras=extras)
        for seed, name in enumerate(SCENES)
    }


@pytest.fixture
def peer(base: Base, capsules: dict[str, bytes], tmp_path: Path) -> Iterator[Peer]:
    yield Peer(base, loftr("nano"), capsules, tmp_path)
    base.unet.unload_lora()


def pixels(file: bytes) -> Tensor:
    """[3, H, W]"""
    with Image.open(io.BytesIO(file)) as picture:
        return torch.from_numpy(np.array(picture, np.float32) / 255).permute(2, 0, 1)


def test_each_scene_is_drawn_with_its_own_adapter_and_as_ours_draws_it(
    base: Base, capsules: dict[str, bytes], peer: Peer
) -> None:
    """Scenes in turn, and one again: the hole as by the engine, the rest as it was sent."""
    square = square_of(base.size_px)
    mask = hole(square)
    ask = partial(peer.complete, candidates=1, steps=4, seed=0)
    files = png(square), png(mask.expand(3, -1, -1))
    drawn = [pixels(ask(scene, *files)) for scene in (*SCENES, SCENES[0])]
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0][:, mask == 0], pixels(files[0])[:, mask == 0])
    between = (drawn[0] - drawn[1])[:, mask > 0].abs().mean()
    base.unet.unload_lora()
    runner = Runner(base)
    for scene, theirs in zip(SCENES, drawn, strict=False):
        job = job_for(base, capsules[scene], scene.rjust(64, "0"), square)
        job = dataclasses.replace(job, steps=4)
        ours = runner.run(job).samples[0].clamp(0, 1)
        apart = (ours - theirs)[:, mask > 0].abs().mean()
        assert apart < 0.1 * between
    runner.release()


def test_peer_answers_the_path_of_the_load(base: Base, peer: Peer) -> None:
    """The driver's form gives a PNG of the picture's size; a form without files gives 422."""
    square = square_of(base.size_px)
    files = {"image": png(square), "mask": png(hole(square).expand(3, -1, -1))}
    with ThreadPoolExecutor(1) as lane, TestClient(application(peer, lane)) as client:
        path = f"/v1/scenes/{SCENES[1]}/complete"
        form = {"candidates": "2", "steps": "2", "seed": "3", "sampler": "dpm++2m"}
        answer = client.post(path, data=form, files=files)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "image/png"
        assert pixels(answer.content).shape == square.shape
        assert client.post(path, data=form).status_code == 422
        assert client.get("/readyz").json() == {"status": "ok"}
