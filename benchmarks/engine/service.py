"""What the service adds to the engine: a request against the same job without it."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.engine.adapters import random_capsule
from benchmarks.engine.timing import alone
from benchmarks.load.local import free_port, serving
from realfill.base import Base
from realfill.capsule import read_capsule
from realfill.complete.windows import crop, crop_mask, window_of
from realfill.errors import RealFillError
from realfill.nano.photographs import photograph
from registry import Registry
from service.client import Client
from service.engine import Engine, Job

SCENE = "bench"
PEER = "the same job (1 candidate, 1 step) on the engine, without HTTP, images and ranking"
REST_S = 0.02
LOG_LINES = 20
SERVE = "from service.cli import serve; serve()"


@dataclass(frozen=True)
class Overhead:
    """Seconds of every request, and of the same job straight on the engine, in turns."""

    request_s: list[float]
    engine_s: list[float]


def measure_overhead(
    base: Base, base_name: str, folder: Path, *, requests: int, rank: int, start_s: float = 180.0
) -> dict[str, Overhead]:
    """Start the real server on a scene of random weights, and time requests to it.

    The server does not rank here: ranking has rows of its own.

    Args:
        base: The base, as the server will load it by ``base_name``.
        base_name: Name or folder of it.
        folder: For the registry and the server's log.
        requests: Timed requests per image size, after three that warm up.
        rank: Of the adapter.
        start_s: Longest to wait for the server.

    Returns:
        By image: ``square`` of the base's size, and ``photo`` of 741x497 pixels.
    """
    capsule = alone(partial(random_capsule, base, SCENE, rank=rank, seed=0))
    photo, square = alone(photo_of), alone(partial(square_of, base.size_px))
    overheads = {}
    with (
        served(base, base_name, folder, capsule, matcher="none", start_s=start_s) as (
            client,
            digest,
        ),
        alone(partial(Engine, base)) as engine,
    ):
        # As in the server: the cores are the lane's.
        torch.set_num_threads(1)
        for name, picture in (("square", square), ("photo", photo)):
            request = _request(client, picture)
            direct = _direct(engine, job_for(base, capsule, digest, picture))
            overheads[name] = _in_turns(request, direct, requests)
    return overheads


@contextmanager
def served(
    base: Base, base_name: str, folder: Path, capsule: bytes, *, matcher: str, start_s: float
) -> Iterator[tuple[Client, str]]:
    """The real server over a registry that holds one scene, for the length of the block.

    Args:
        base: What the server will load by ``base_name``, on the same kind of device; it computes
            in the same precision.
        folder: For the registry and the server's log.
        matcher: As for ``load_matcher``, or none.
        start_s: Longest to wait for the server.

    Yields:
        A client of it, and the capsule's digest.

    Raises:
        RuntimeError: It did not start, or refused a request; the end of its log is in the message.
    """
    registry = Registry.open(folder / "registry")
    digest = registry.publish(capsule).digest
    registry.close()
    port = free_port()
    words = [sys.executable, "-c", SERVE, "--registry", str(folder / "registry")]
    words += ["--port", str(port), "--base", base_name, "--device", base.device.type]
    words += ["--matcher", matcher]
    url = f"http://127.0.0.1:{port}"
    log = folder / "server.log"
    products = str(base.multiplies_in).removeprefix("torch.")
    environment = {**os.environ, "REALFILL_DTYPE": products}
    try:
        server = serving(words, url, log=log, start_s=start_s, environment=environment)
        with server, Client(url) as client:
            yield client, digest
    except (RuntimeError, RealFillError) as error:
        # The folder goes with the measurement.
        said = log.read_text(errors="replace").splitlines() if log.exists() else []
        raise RuntimeError("\n".join([f"{error} It ends with:", *said[-LOG_LINES:]])) from error


def photo_of() -> Tensor:
    """A photograph of 741x497 pixels, in [0, 1]. [3, H, W]"""
    return torch.tensor(photograph("motorcycle_right.png")).permute(2, 0, 1) / 255


def square_of(size_px: int) -> Tensor:
    """What of it a base of that size is shown. [3, S, S]"""
    photo = photo_of()
    return crop(photo, window_of(hole(photo), size_px), size_px)


def _in_turns(
    request: Callable[[], object], direct: Callable[[], object], repeats: int
) -> Overhead:
    """Alternate, so that whatever else the machine does meets both alike."""
    overhead = Overhead([], [])
    for turn in range(-3, repeats):
        for work, seconds in ((request, overhead.request_s), (direct, overhead.engine_s)):
            # Threads of the other one's process still spin for its next piece of work.
            time.sleep(REST_S)
            began = time.perf_counter()
            work()
            if turn >= 0:
                seconds.append(time.perf_counter() - began)
    return overhead


def hole(picture: Tensor) -> Tensor:
    """The middle of a picture as a mask. [H, W]"""
    height, width = picture.shape[-2:]
    mask = torch.zeros(height, width)
    mask[height // 3 : -height // 3, width // 3 : -width // 3] = 1
    return mask


def job_for(base: Base, capsule: bytes, digest: str, picture: Tensor) -> Job:
    read, mask = read_capsule(capsule, base), hole(picture)
    window = window_of(mask, base.size_px)
    return Job(
        digest=digest,
        adapter=read.adapter,
        prompt_embedding=read.prompt_embedding,
        target=crop(picture, window, base.size_px),
        mask=crop_mask(mask, window, base.size_px),
        seeds=(0,),
        steps=1,
        sampler="dpm++2m",
    )


def _direct(engine: Engine, job: Job) -> Callable[[], object]:
    return lambda: engine.submit(job).result()


def _request(client: Client, picture: Tensor) -> Callable[[], object]:
    image, mask = png(picture), png(hole(picture).expand(3, -1, -1))
    fields = {"candidates": 1, "steps": 1, "seed": 0, "top": 1}
    return lambda: client.complete(SCENE, image, mask, **fields)


def png(pixels: Tensor) -> bytes:
    file = io.BytesIO()
    rounded = (pixels * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    Image.fromarray(rounded).save(file, "PNG")
    return file.getvalue()
