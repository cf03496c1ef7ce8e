"""``python -m benchmarks.quality.nano_report``: a base on photographs that nano never saw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command import OfPhotographs
from benchmarks.quality.fills import CLASSICAL
from benchmarks.quality.sampling import candidates, device_name
from benchmarks.quality.trials import Photograph, Trial, held_out, trials
from benchmarks.record import ROWS, record
from realfill.base import Base, load_base
from realfill.errors import RealFillError
from realfill.metrics import psnr, ssim
from realfill.nano.autoencoder import motorcycle_crops
from realfill.sheet import Row, Tile, contact_sheet, with_hole
from service.engine import Runner

FILLS = ("base", *CLASSICAL)
SHEET_TRIALS = 12


@dataclass(frozen=True)
class Reading:
    """One trial measured: PSNR in dB and SSIM inside the hole, by fill."""

    photograph: str
    missing_share: float
    psnr_db: dict[str, float]
    ssim: dict[str, float]


def autoencoder_psnr_db(base: Base) -> float:
    """Mean PSNR of encoding and decoding the motorcycle's squares at the base's size."""
    pixels = (motorcycle_crops() + 1) / 2
    if pixels.shape[-1] != base.size_px:
        pixels = F.interpolate(pixels, (base.size_px,) * 2, mode="bilinear", antialias=True)
    decoded = base.decode(base.encode(pixels)).cpu()
    everywhere = torch.ones(pixels.shape[-2:])
    return fmean(psnr(a, b, everywhere) for a, b in zip(decoded, pixels, strict=True))


def fills_of(runner: Runner, trial: Trial, *, steps: int, seed: int) -> dict[str, Tensor]:
    """Every fill of one trial, by name. [3, S, S] each"""
    target = trial.truth * (1 - trial.mask)
    made = {name: fill(target, trial.mask) for name, fill in CLASSICAL.items()}
    base = candidates(runner, target, trial.mask, (seed,), steps=steps)[0]
    return {"base": base, **made}


def read(trial: Trial, fills: dict[str, Tensor]) -> Reading:
    """Measure a trial's fills against its truth."""
    return Reading(
        photograph=trial.name,
        missing_share=float(trial.mask.mean()),
        psnr_db={name: psnr(fill, trial.truth, trial.mask) for name, fill in fills.items()},
        ssim={name: ssim(fill, trial.truth, trial.mask) for name, fill in fills.items()},
    )


def measure(
    runner: Runner,
    photographs: Sequence[Photograph],
    holes: int,
    *,
    steps: int,
    seed: int,
    console: Console,
) -> tuple[list[Reading], list[Row]]:
    """Fill and measure every trial; the first ones also make the rows of a contact sheet."""
    readings: list[Reading] = []
    sheet: list[Row] = []
    with Progress(console=console) as progress:
        task = progress.add_task(f"{holes} holes in {len(photographs)} photographs", total=holes)
        for k, trial in enumerate(trials(photographs, holes, runner.base.size_px, seed=seed)):
            fills = fills_of(runner, trial, steps=steps, seed=k)
            readings.append(read(trial, fills))
            if len(sheet) < SHEET_TRIALS:
                sheet.append(("", tiles_of(trial, fills, readings[-1])))
            progress.advance(task)
    return readings, sheet


def summarize(readings: Sequence[Reading]) -> dict[str, dict[str, float]]:
    """Means over the trials, by fill, and how often it had the best SSIM."""
    best = [max(FILLS, key=lambda name: reading.ssim[name]) for reading in readings]
    return {
        name: {
            "psnr_db": fmean(reading.psnr_db[name] for reading in readings),
            "ssim": fmean(reading.ssim[name] for reading in readings),
            "best_share": best.count(name) / len(best),
        }
        for name in FILLS
    }


def table_of(summary: dict[str, dict[str, float]], count: int) -> Table:
    """The means as a table."""
    table = Table(title=f"In-hole means over {count} holes", title_justify="left")
    for heading in ("fill", "PSNR dB", "SSIM", "best SSIM in"):
        table.add_column(heading, justify="left" if heading == "fill" else "right")
    for name, means in summary.items():
        table.add_row(
            name,
            f"{means['psnr_db']:.2f}",
            f"{means['ssim']:.3f}",
            f"{100 * means['best_share']:.0f} %",
        )
    return table


def tiles_of(trial: Trial, fills: dict[str, Tensor], reading: Reading) -> list[Tile]:
    """One row of the sheet: the hole, every fill, the truth."""
    shown = [
        (f"{name}\n{reading.psnr_db[name]:.1f} dB, SSIM {reading.ssim[name]:.2f}", fill)
        for name, fill in fills.items()
    ]
    hole = (f"{trial.name}\n{100 * reading.missing_share:.0f} % missing", trial.truth)
    return [(hole[0], with_hole(trial.truth, trial.mask)), *shown, ("truth", trial.truth)]


def record_rows(
    psnr_db: float, summary: dict[str, dict[str, float]], *, device: str, path: Path
) -> None:
    """Keep the numbers; the base has to beat the better classical fill."""
    record("nano.autoencoder_psnr_db", psnr_db, "dB", device=device, path=path)
    for measure, unit in (("ssim", "SSIM"), ("psnr_db", "dB")):
        peer = max(CLASSICAL, key=lambda name: summary[name][measure])
        bound = summary[peer][measure]
        record(
            f"nano.fill_{measure}",
            summary["base"][measure],
            unit,
            # PSNR is reported: a blurred fill has a high one, so it is no bound.
            target=bound if measure == "ssim" else None,
            peer=f"{peer} fill, the better of {' and '.join(CLASSICAL)}",
            peer_value=bound,
            device=device,
            path=path,
        )


@click.command(cls=OfPhotographs)
@click.option("--base", "base_name", default="nano", show_default=True, help="As for load_base.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--scenes",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of scenes, whose references are used too.",
)
@click.option("--holes", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Else what the base is sampled with.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("nano-out"))
@click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), default=ROWS)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and no table.")
def main(
    base_name: str,
    device: str,
    folder: Path | None,
    holes: int,
    steps: int | None,
    seed: int,
    out: Path,
    rows: Path,
    as_json: bool,
) -> None:
    """Measure autoencoder and fills of a base on photographs that nano was not trained on."""
    console = Console(stderr=as_json)
    try:
        runner = Runner(load_base(base_name, device=device))
        photographs = held_out(folder)
    except RealFillError as error:
        raise click.ClickException(str(error)) from error
    encoded_psnr_db = autoencoder_psnr_db(runner.base)
    console.print(f"Autoencoder on the motorcycle's squares: {encoded_psnr_db:.2f} dB")
    steps = steps or runner.base.steps
    readings, sheet = measure(runner, photographs, holes, steps=steps, seed=seed, console=console)
    summary = summarize(readings)
    report: dict[str, Any] = {
        "base": runner.base.name,
        "base_fingerprint": runner.base.fingerprint,
        "autoencoder_psnr_db": encoded_psnr_db,
        "holes": holes,
        "sampler": runner.base.sampler,
        "steps": steps,
        "seed": seed,
        "photographs": [photograph.name for photograph in photographs],
        "means": summary,
        "readings": [asdict(reading) for reading in readings],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    contact_sheet(sheet).save(out / "sheet.png")
    record_rows(encoded_psnr_db, summary, device=device_name(device), path=rows)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    console.print(table_of(summary, holes))
    click.echo(f"Report and contact sheet: {out}")


if __name__ == "__main__":
    main()
