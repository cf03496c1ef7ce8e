"""``realfill demo``: the whole road on two bundled scenes, with a table and a sheet."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from realfill.adapt.training import train
from realfill.base import Base, load_base
from realfill.complete.compositing import paste
from realfill.complete.pipeline import complete
from realfill.complete.seam import seamless
from realfill.complete.windows import crop, crop_mask, window_of
from realfill.config import preset
from realfill.metrics import psnr, ssim
from realfill.nano.demo import demo_scenes, write_scene
from realfill.precision import training_dtype
from realfill.rank import Matcher, loftr, rank_candidates
from realfill.scene import Scene, load_image
from realfill.sheet import Row, contact_sheet
from registry import Registry, RegistryError, Version
from service.cli import free_port
from service.client import Client, image_of

SEEDS = 8
START_LIMIT_S = 120
# The service's default.
FEATHER_PX = 8


@dataclass(frozen=True)
class Fills:
    """Candidates of one scene at the base's resolution, best first where ranked. [N, 3, S, S]"""

    pictures: Tensor
    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    scores: tuple[int, ...]
    agreement: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """One row of the table; PSNR and SSIM are in-hole means over the seeds."""

    scene: str
    base_psnr_db: float
    adapted_psnr_db: float
    base_ssim: float
    adapted_ssim: float
    base_matches: float
    adapted_matches: float
    best_psnr_db: float
    train_s: float
    swap_ms: float
    complete4_s: float


def run_demo(out: Path, preset_name: str, *, keep: bool, as_json: bool) -> None:
    """What ``realfill demo`` does.

    Raises:
        ClickException: The registry in ``out`` cannot be opened, or the service does not start.
    """
    console = Console(stderr=True)
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    console.print("[bold]1/4[/] Train an adapter per scene, and publish it")
    scenes = [write_scene(scene, out / scene.name) for scene in demo_scenes()]
    try:
        registry = Registry.open(out / "registry")
    except RegistryError as error:
        raise click.ClickException(
            f"{error} Or remove {out / 'registry'}: the demo makes it anew."
        ) from error
    train_s = {}
    dtype = training_dtype("cpu")
    if dtype == torch.float32:
        console.print("    (about four times as long as where the processor has bfloat16)")
    model = load_base("nano", dtype=dtype)
    for scene in scenes:
        started = time.monotonic()
        checkpoint = out / scene.name / "training.checkpoint"
        publish = partial(registry.publish, scene=scene.name, by="demo")
        version = _trained(model, scene, preset_name, checkpoint, publish, console)
        train_s[scene.name] = time.monotonic() - started
        console.print(
            f"    {scene.name}: version {version.number}, {version.size_bytes / 1e6:.1f} MB"
        )
    console.print("[bold]2/4[/] Start the service and complete both scenes over HTTP")
    base, matcher = load_base("nano"), loftr("nano")
    with _server(out / "registry", keep=keep) as client:
        answers = {
            scene.name: _completed(client, out / scene.name, scene, base.size_px)
            for scene in scenes
        }
        console.print("[bold]3/4[/] The base alone, for comparison")
        baselines = {scene.name: _alone(base, scene, matcher) for scene in scenes}
        console.print("[bold]4/4[/] Table and contact sheet")
        outcomes = [
            _outcome(scene, baselines[scene.name], *answers[scene.name], train_s[scene.name])
            for scene in scenes
        ]
        rows = [
            r for s in scenes for r in _sheet_rows(base, s, baselines[s.name], answers[s.name][0])
        ]
        contact_sheet(rows).save(out / "sheet.png")
        report = _report(outcomes, time.monotonic() - began)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(report)))
        console.print(_table(outcomes))
        click.echo(json.dumps(report, indent=2) if as_json else f"Look at {out / 'sheet.png'}")
        if keep:
            _say_next(client, out, scenes[0], console)


def _trained(
    model: Base,
    scene: Scene,
    preset_name: str,
    checkpoint: Path,
    publish: Callable[[bytes], Version],
    console: Console,
) -> Version:
    """The scene, trained and published; an interrupted demo goes on from its checkpoint."""
    version = None
    with Progress(
        TextColumn("    {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        config = preset(preset_name)
        task = progress.add_task(scene.name, total=config.steps, loss="")
        for record in train(model, scene, config, checkpoint=checkpoint):
            progress.update(task, completed=record.step, loss=f"{record.loss:.3f}")
            if record.capsule is not None:
                version = publish(record.capsule)
    assert version is not None, "the last record of a training carries the capsule"
    return version


@contextmanager
def _server(registry: Path, *, keep: bool) -> Iterator[Client]:
    """The service as a user starts it, on a free port; ended on leaving unless it is to be kept."""
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "realfill", "serve"]
    command += ["--registry", str(registry), "--port", str(port)]
    log = registry.parent / "server.log"
    with log.open("wb") as sink:
        server = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
    done = False
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            limit = time.monotonic() + START_LIMIT_S
            while not client.ready():
                if server.poll() is not None or time.monotonic() > limit:
                    raise click.ClickException(f"The service did not start: {log} says why.")
                time.sleep(0.2)
            yield client
            done = True
    finally:
        if not (keep and done):
            server.send_signal(signal.SIGTERM)
            server.wait()


def _completed(
    client: Client, folder: Path, scene: Scene, size_px: int
) -> tuple[Fills, dict[str, float]]:
    """Ranked candidates over HTTP, and the times of a warm request for four."""
    image, mask = (folder / "target" / f"{name}.png" for name in ("target", "mask"))
    answer = client.complete(scene.name, image, mask, candidates=SEEDS, top=SEEDS)
    natives = [load_image(io.BytesIO(image_of(c.image))) for c in answer.candidates]
    window = window_of(scene.mask, size_px)
    pictures = torch.stack([crop(native, window, size_px) for native in natives])
    fills = _measured(
        scene,
        pictures,
        [c.score or 0 for c in answer.candidates],
        [c.agreement or 0.0 for c in answer.candidates],
    )
    totals = []
    for seed in range(100, 103):
        started = time.monotonic()
        client.complete(scene.name, image, mask, candidates=4, top=1, seed=seed)
        totals.append(time.monotonic() - started)
    swap = answer.timings_ms.get("swap", 0.0)
    return fills, {"complete4_s": median(totals), "swap_ms": swap}


def _alone(base: Base, scene: Scene, matcher: Matcher) -> Fills:
    """The base without an adapter, same window, seeds and prompt."""
    window = window_of(scene.mask, base.size_px)
    target, hole = (
        crop(scene.target, window, base.size_px),
        crop_mask(scene.mask, window, base.size_px),
    )
    samples = complete(base, target, hole, base.embed().detach(), range(SEEDS))
    samples = seamless(samples, target, hole)
    natives = paste(samples, window, scene.target, scene.mask, FEATHER_PX)
    pictures = torch.stack([crop(native, window, base.size_px) for native in natives])
    ranking = rank_candidates(matcher, pictures, hole, scene.references)
    order = ranking.order
    found = ranking.scores[order].tolist(), ranking.agreement[order].tolist()
    return _measured(scene, pictures[order], *found)


def _measured(scene: Scene, pictures: Tensor, scores: list[int], agreement: list[float]) -> Fills:
    size_px = pictures.shape[-1]
    window = window_of(scene.mask, size_px)
    assert scene.truth is not None
    truth, hole = crop(scene.truth, window, size_px), crop_mask(scene.mask, window, size_px)
    return Fills(
        pictures,
        tuple(float(psnr(picture, truth, hole)) for picture in pictures),
        tuple(float(ssim(picture, truth, hole)) for picture in pictures),
        tuple(scores),
        tuple(agreement),
    )


def _outcome(
    scene: Scene, alone: Fills, adapted: Fills, times: dict[str, float], train_s: float
) -> Outcome:
    return Outcome(
        scene=scene.name,
        base_psnr_db=mean(alone.psnr_db),
        adapted_psnr_db=mean(adapted.psnr_db),
        base_ssim=mean(alone.ssim),
        adapted_ssim=mean(adapted.ssim),
        base_matches=mean(alone.scores),
        adapted_matches=mean(adapted.scores),
        best_psnr_db=adapted.psnr_db[0],
        train_s=train_s,
        swap_ms=times["swap_ms"],
        complete4_s=times["complete4_s"],
    )


def _sheet_rows(base: Base, scene: Scene, alone: Fills, adapted: Fills) -> list[Row]:
    window = window_of(scene.mask, base.size_px)
    hole = crop_mask(scene.mask, window, base.size_px)
    target = crop(scene.target, window, base.size_px)
    assert scene.truth is not None
    given = [(f"reference {k + 1}", picture) for k, picture in enumerate(scene.references)]
    given += [
        ("target", target * (1 - hole) + hole),
        ("truth", crop(scene.truth, window, base.size_px)),
    ]
    fills = [(f"base alone\n{_told(alone, 0)}", alone.pictures[0])]
    fills += [
        (f"adapted, rank {k + 1}\n{_told(adapted, k)}", picture)
        for k, picture in enumerate(adapted.pictures[:4])
    ]
    return [(scene.name, given), ("", fills)]


def _told(fills: Fills, k: int) -> str:
    """What a candidate is ranked by, and how near the truth it is."""
    return f"agreement {fills.agreement[k]:.0f}, {fills.psnr_db[k]:.1f} dB"


def _report(outcomes: list[Outcome], main_s: float) -> dict[str, Any]:
    return {"main_s": round(main_s, 1), "scenes": [asdict(outcome) for outcome in outcomes]}


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Measurements by the names that the benchmarks know."""
    scenes = report["scenes"]
    return [
        {"name": "demo.main_s", "value": report["main_s"], "unit": "s"},
        {"name": "demo.train_s", "value": max(s["train_s"] for s in scenes), "unit": "s"},
        {"name": "demo.complete4_s", "value": max(s["complete4_s"] for s in scenes), "unit": "s"},
    ]


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title="In-hole quality against the truth, means over 8 seeds")
    for heading in ("scene", "PSNR dB", "SSIM", "matches", "best", "train", "swap", "4 seeds"):
        table.add_column(
            heading, justify="left" if heading == "scene" else "right", no_wrap=heading == "scene"
        )
    for o in outcomes:
        table.add_row(
            o.scene,
            f"{o.base_psnr_db:.2f} → [bold]{o.adapted_psnr_db:.2f}[/]",
            f"{o.base_ssim:.3f} → [bold]{o.adapted_ssim:.3f}[/]",
            f"{o.base_matches:.0f} → [bold]{o.adapted_matches:.0f}[/]",
            f"{o.best_psnr_db:.2f}",
            f"{o.train_s:.0f} s",
            f"{o.swap_ms:.1f} ms",
            f"{o.complete4_s:.2f} s",
        )
    table.caption = "base alone → adapted; best: PSNR of the first-ranked candidate"
    return table


def _say_next(client: Client, out: Path, scene: Scene, console: Console) -> None:
    folder = out / scene.name / "target"
    console.print(
        f"The service runs on at {client.url}. Try:\n\n"
        f"  realfill complete {scene.name} {folder}/target.png {folder}/mask.png "
        f"--url {client.url}\n"
    )
