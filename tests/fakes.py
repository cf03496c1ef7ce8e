"""Stand-ins that are passed in: engines, a matcher that sees light; and what is uploaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

from realfill.base import Base
from realfill.rank import Features, Matcher, Matches
from registry import Registry
from service.engine import Job, Sampled
from service.errors import Cancelled, QueueFull
from service.road import Lane, Road

# Starts a service with an engine and settings.
Serve = Callable[..., TestClient]
PATH = "/v1/scenes/tower/complete"


class LightMatcher(Matcher):
    """Matches bright cells, so the brightest fill wins, and one cell of the known region."""

    name = "light"
    size_multiple = 8
    working_px = 32
    threshold = 0.5
    digest = "light" * 8

    def features(self, images: Tensor) -> Features:
        """Mean brightness of each cell of 8 px."""
        cells = torch.nn.functional.avg_pool2d(images, 8)
        return Features(cells.flatten(1)[..., None], (cells.shape[-2], cells.shape[-1]))

    def compare(
        self, features0: Features, features1: Features, *, threshold: float | None = None
    ) -> Matches:
        """The first cell, and those brighter than one half, with the same place elsewhere."""
        light = features0.tokens[..., 0] * (features0.tokens[..., 0] > 0.5)
        light[:, 0] = 1
        points = features0.places()
        return Matches(points, points, light)


class GreyEngine:
    """Answers at once: the sample of seed k is grey, 25 k of 255."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.forgotten: list[str] = []
        self.turns = 0
        self.failure: BaseException | None = None

    @property
    def pending(self) -> int:
        """Nothing ever waits."""
        return 0

    def start(self) -> None:
        """Nothing to start."""

    def close(self, *, drain: bool = True) -> None:
        """Nothing to close."""

    def forget(self, digest: str) -> None:
        """Nothing to take out."""
        self.forgotten.append(digest)

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Never to be waited for; counted."""
        self.turns += 1
        yield 0.0

    def metrics(self) -> None:
        """Nothing to tell."""

    def submit(self, job: Job) -> Future[Sampled]:
        """Done before it returns."""
        self.jobs.append(job)
        levels = torch.tensor([seed * 25 / 255 for seed in job.seeds])
        samples = levels[:, None, None, None].expand(-1, *job.target.shape).clone()
        done: Future[Sampled] = Future()
        done.set_result(
            Sampled(samples, job.seeds, job.digest, swap_s=0.001, sample_s=0.002, decode_s=0.003)
        )
        return done


class SlowEngine(GreyEngine):
    """Takes a step every 10 ms, for ever, until the job's flag is set."""

    def __init__(self) -> None:
        super().__init__()
        self.started = threading.Event()
        self.freed = threading.Event()
        self.steps = 0

    def submit(self, job: Job) -> Future[Sampled]:
        """Run the job in a thread of its own."""
        future: Future[Sampled] = Future()
        # As the lane does: from now on nobody but the job's flag can cancel it.
        future.set_running_or_notify_cancel()

        def drive() -> None:
            self.started.set()
            while not job.cancel.is_set():
                self.steps += 1
                time.sleep(0.01)
            self.freed.set()
            future.set_exception(Cancelled("the job was cancelled"))

        threading.Thread(target=drive, daemon=True).start()
        return future


class FullEngine(GreyEngine):
    """Never has room."""

    def submit(self, job: Job) -> Future[Sampled]:
        """Refuse."""
        raise QueueFull("3 jobs wait already; try again in 8 s", retry_after_s=7.2)


class BrokenEngine(GreyEngine):
    """Fails in a way that nobody foresaw."""

    def submit(self, job: Job) -> Future[Sampled]:
        """Fail with a text that no client should read."""
        future: Future[Sampled] = Future()
        future.set_exception(RuntimeError("CUDA error at 0xdeadbeef in /secret/path"))
        return future


def road_of(
    base: Base,
    folder: Path,
    engine: Lane | None = None,
    matcher: Matcher | None = None,
    host_bytes: int = 2**30,
    lease_s: float = 300.0,
) -> Road:
    """A road over a real registry in a folder, by default with a fake engine and matcher."""
    return Road(
        base,
        Registry.open(folder / "registry"),
        engine or GreyEngine(),
        matcher or LightMatcher(),
        host_bytes=host_bytes,
        lease_s=lease_s,
    )


def photo(width: int = 48, height: int = 40, seed: int = 0) -> np.ndarray:
    """A picture of noise, dim enough that a fill is told from it. [H, W, 3] uint8"""
    return np.random.default_rng(seed).integers(0, 100, (height, width, 3), dtype=np.uint8)


def hole(width: int = 48, height: int = 40) -> np.ndarray:
    """A mask with a square hole of 12 px in the middle. [H, W] uint8"""
    mask = np.zeros((height, width), dtype=np.uint8)
    top, left = height // 2 - 6, width // 2 - 6
    mask[top : top + 12, left : left + 12] = 255
    return mask


def encoded(pixels: np.ndarray, image_format: str = "PNG") -> bytes:
    """The pixels as a file."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


def decoded(file: bytes) -> np.ndarray:
    """The file's pixels."""
    return np.asarray(Image.open(BytesIO(file)))


def uploads(**other: bytes) -> dict[str, tuple[str, bytes]]:
    """The files of a completion."""
    files = {"image": encoded(photo()), "mask": encoded(hole()), **other}
    return {name: (f"{name}.png", content) for name, content in files.items()}


def refused(answer: Any, status: int, code: str) -> str:
    """Check the one error shape and give its message."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "request_id"}
    assert error["code"] == code
    assert error["request_id"] == answer.headers["x-request-id"]
    return str(error["message"])
