"""``python -m benchmarks.load.peer``: the server that one writes in an afternoon, to be beaten.

One base stays loaded. A request waits for those before it; then diffusers loads its scene's LoRA
file, unless the last request was for the same scene, all candidates are drawn in one batch,
kornia's LoFTR matches them pair by pair, and the best one is pasted over the target. It answers the
path and the fields that the load is made of, and takes square pictures of the base's size only.

In its favour: no form is checked, the text encoder never runs, nothing is blended, and one thread
does all that takes time, so that its operations have all cores (docs/engine.md, One OpenMP team).
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import click
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Form, Response, UploadFile
from PIL import Image
from torch import Tensor

from benchmarks.engine.rates import loop
from benchmarks.engine.service import png
from benchmarks.ranking.peer import counts_at_working_size, naive_kornia
from realfill.base import Base, load_base
from realfill.capsule import UNET, read_capsule
from realfill.interchange import export_capsule
from realfill.lora_files import DIFFUSERS_WEIGHTS
from realfill.photographs import to_pixels
from realfill.precision import serving_precision
from realfill.rank.matchers import load_matcher
from realfill.rank.matching import LoFTRMatcher
from realfill.rank.references import at_working_size
from registry import Registry
from service.answer import references_of
from service.engine import Job


@dataclass(frozen=True)
class PeerScene:
    """What the peer has of a scene.

    Attributes:
        lora: Folder of its LoRA file.
        prompt: Embedding of its prompt. [77, d]
        references: At the matcher's working size. [1, h, w] each
    """

    lora: Path
    prompt: Tensor
    references: tuple[Tensor, ...]


class Peer:
    """One request after the other.

    Args:
        base: Which it draws by.
        matcher: Whose weights it ranks by.
        capsules: By scene.
        folder: For LoRA files.
    """

    def __init__(
        self, base: Base, matcher: LoFTRMatcher, capsules: Mapping[str, bytes], folder: Path
    ) -> None:
        self._base = base
        self._matcher = matcher
        self._loftr = naive_kornia(matcher)
        self._loaded: str | None = None
        self._scenes = {name: self._scene(name, data, folder) for name, data in capsules.items()}

    def _scene(self, name: str, data: bytes, folder: Path) -> PeerScene:
        capsule = read_capsule(data, self._base)
        export_capsule(data, folder / name, "diffusers", self._base)
        references = tuple(
            at_working_size(self._matcher, to_pixels(photo)[None].to(self._base.device))[0]
            for photo in references_of(capsule).values()
        )
        return PeerScene(folder / name, capsule.prompt_embedding, references)

    def complete(
        self, scene: str, image: bytes, mask: bytes, *, candidates: int, steps: int, seed: int
    ) -> bytes:
        """The best candidate's PNG."""
        self._load(scene)
        known, target = self._scenes[scene], _pixels(image, "RGB")
        job = Job(
            digest=None,
            adapter=None,
            prompt_embedding=known.prompt,
            target=target,
            mask=(_pixels(mask, "L")[0] > 0.5).float(),
            seeds=tuple(range(seed, seed + candidates)),
            steps=steps,
            sampler="dpm++2m",
        )
        drawn = loop(self._base, job, batch=candidates)
        found = counts_at_working_size(
            self._loftr, self._matcher, drawn, known.references, job.mask
        )
        best = drawn[int(found.sum(1).argmax())].float().cpu()
        return png(torch.where(job.mask > 0, best.clamp(0, 1), target))

    def _load(self, scene: str) -> None:
        if scene == self._loaded:
            return
        unet = self._base.unet
        if self._loaded is not None:
            unet.delete_adapters(self._loaded)
        self._loaded = None
        unet.load_lora_adapter(
            self._scenes[scene].lora,
            prefix=UNET,
            weight_name=DIFFUSERS_WEIGHTS,
            adapter_name=scene,
        )
        unet.set_adapters(scene)
        self._loaded = scene


def _pixels(file: bytes, mode: str) -> Tensor:
    """A picture in [0, 1]. [C, H, W]"""
    with Image.open(io.BytesIO(file)) as picture:
        pixels = np.asarray(picture.convert(mode), np.float32) / 255
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def application(peer: Peer, lane: Executor) -> FastAPI:
    """The peer over HTTP; whatever it computes is done in the lane."""
    app = FastAPI()

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/scenes/{scene}/complete")
    async def complete(
        scene: str,
        image: UploadFile,
        mask: UploadFile,
        candidates: Annotated[int, Form()],
        steps: Annotated[int, Form()],
        seed: Annotated[int, Form()] = 0,
    ) -> Response:
        files = await image.read(), await mask.read()

        def work() -> bytes:
            return peer.complete(scene, *files, candidates=candidates, steps=steps, seed=seed)

        file = await asyncio.get_running_loop().run_in_executor(lane, work)
        return Response(file, media_type="image/png")

    return app


def load_peer(registry: Path, folder: Path, base: str, matcher: str, device: str) -> Peer:
    """A peer of all scenes in a registry, their LoRA files in a folder."""
    # All of it in what the service multiplies in, which reads the same variable.
    precision = serving_precision(device, os.environ.get("REALFILL_DTYPE") or "auto")
    loaded = load_base(base, device=device, dtype=precision.products)
    program = load_matcher(f"torch:{matcher.removeprefix('torch:')}", device)
    assert isinstance(program, LoFTRMatcher)
    opened = Registry.open(registry)
    try:
        capsules = {scene.name: opened.fetch(scene.name) for scene in opened.scenes()}
    finally:
        opened.close()
    return Peer(loaded, program, capsules, folder)


@click.command()
@click.option("--registry", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--port", required=True, type=int)
@click.option("--base", default="nano", show_default=True)
@click.option("--matcher", default="nano", show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(registry: Path, port: int, base: str, matcher: str, device: str) -> None:
    """Serve every scene of a registry as it stands, until stopped."""
    lane = ThreadPoolExecutor(1, "peer")
    with TemporaryDirectory(prefix="realfill-peer-") as folder:
        load = partial(load_peer, registry, Path(folder), base, matcher, device)
        peer = lane.submit(load).result()
        uvicorn.run(application(peer, lane), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
