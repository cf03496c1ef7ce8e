"""The command ``realfill``; other packages hang their commands in by entry point."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from realfill.config import PRESETS, preset
from realfill.errors import RealFillError

if TYPE_CHECKING:
    from realfill.rank import Matcher

ENTRY_POINTS = "realfill.commands"
console = Console(stderr=True)

BASE_OPTION = click.option(
    "--base",
    default="nano",
    show_default=True,
    envvar="REALFILL_BASE",
    help="nano, sd2, a folder or a hub id.",
)


class Refusal(click.ClickException):
    """One sentence and exit status 2."""

    exit_code = 2


class Commands(click.Group):
    """Our own commands, and those of the packages that build on us, loaded when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return sorted(
            {*super().list_commands(ctx), *(e.name for e in entry_points(group=ENTRY_POINTS))}
        )

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name, imported now."""
        own = super().get_command(ctx, cmd_name)
        found = entry_points(group=ENTRY_POINTS, name=cmd_name)
        return own or next((entry.load() for entry in found), None)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what realfill raises on purpose becomes one sentence."""
        try:
            return super().invoke(ctx)
        except RealFillError as error:
            raise Refusal(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Fill holes in photos with what should have been there, learned from other photos.

    \b
    realfill demo                       the whole road on two bundled scenes
    realfill train my-scene             photos in, capsule out
    realfill registry publish FILE      make the capsule a version that the service finds
    realfill serve                      answer completions over HTTP
    realfill complete NAME IMAGE MASK   ask for one
    """


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the scene. [default: after FOLDER: my-tower]")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the capsule. [default: FOLDER/capsule.safetensors]",
)
@BASE_OPTION
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(sorted(PRESETS)),
    help="[default: demo for nano, else balanced]",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one training option; may be repeated.",
)
@click.option(
    "--tensorboard", type=click.Path(file_okay=False), help="Folder for TensorBoard scalars."
)
@click.option(
    "--matcher",
    help="Keep what this matcher (nano, outdoor, a file) sees of the references in the capsule; "
    "a service with the same one then loads the scene faster.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def train(
    folder: Path,
    name: str | None,
    out: Path | None,
    base: str,
    device: str,
    preset_name: str | None,
    changes: tuple[str, ...],
    tensorboard: str | None,
    matcher: str | None,
    as_json: bool,
) -> None:
    """Train the scene in FOLDER and write its capsule.

    FOLDER holds ref/ with one to five photos, and target/ with target.png and mask.png, white where
    pixels are missing. An interrupted run goes on where it was when it is started again.
    """
    from realfill.adapt.training import train as steps_of
    from realfill.base import load_base
    from realfill.capsule import digests
    from realfill.precision import training_dtype
    from realfill.rank import load_matcher
    from realfill.scene import check_name, load_scene, name_after

    scene = load_scene(folder, name=check_name(name or name_after(folder)))
    try:
        config = preset(
            preset_name or ("demo" if base == "nano" else "balanced"), **_changes(changes)
        )
    except ValueError as error:
        raise Refusal(str(error)) from error
    place = _device(device)
    out = out or folder / "capsule.safetensors"
    if not out.parent.is_dir():
        raise Refusal(f"{out.parent} is no folder: create it, or give another --out.")
    began = time.monotonic()
    finder = None if matcher is None else load_matcher(matcher)
    model = load_base(base, device=place, dtype=training_dtype(place))
    records = steps_of(model, scene, config, checkpoint=out.with_suffix(".checkpoint"))
    for record in _shown(records, f"Training {scene.name}", config.steps, tensorboard):
        if record.capsule is not None:
            # Within the loop: the checkpoint goes once more is asked for.
            capsule = _with_features(record.capsule, finder)
            _write(out, capsule)
    outcome = {
        "capsule": str(out),
        "scene": scene.name,
        "digest": digests(capsule)[0],
        "bytes": len(capsule),
        "steps": config.steps,
        "loss": round(record.loss, 5),
        "seconds": round(time.monotonic() - began, 1),
    }
    if as_json:
        click.echo(json.dumps(outcome, indent=2))
    else:
        click.echo(
            f"{out}: scene {scene.name}, {len(capsule) / 1e6:.1f} MB, {config.steps} steps in "
            f"{outcome['seconds']} s. "
            f"Next: realfill registry publish {out}"
        )


def _with_features(encoded: bytes, matcher: Matcher | None) -> bytes:
    """A capsule with its references' features, so that a service need not look at them again."""
    from realfill.capsule import read_capsule, write_capsule
    from realfill.rank import with_features

    if matcher is None:
        return encoded
    return write_capsule(with_features(read_capsule(encoded, None), matcher))


def _write(out: Path, data: bytes) -> None:
    """Write a file, entirely or not at all."""
    draft = out.with_suffix(".part")
    draft.write_bytes(data)
    draft.replace(out)


@main.command()
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default="build/nano",
    show_default=True,
    help="Folder for the pool, checkpoints and sheets.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the weights go. [default: into the package]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--scale",
    default=1.0,
    show_default=True,
    help="Share of the recipe's steps; below 1 for a trial.",
)
def pretrain(work: Path, out: Path | None, device: str, seed: int, scale: float) -> None:
    """Rebuild nano, the embedded base, and its matcher from nothing.

    Learns from drawn pictures and the photographs inside the scikit-image wheel; nothing is
    downloaded. On two CPU cores it takes hours, and goes on where it was when it is started again.
    """
    from realfill.nano.pretrain import rebuild

    with _progress() as progress:
        tasks: dict[str, Any] = {}
        for step in rebuild(work, out, device=_device(device), seed=seed, scale=scale):
            if step.stage not in tasks:
                tasks[step.stage] = progress.add_task(step.stage, total=step.steps)
            progress.update(tasks[step.stage], completed=step.step, loss=f"{step.loss:.4f}")


@main.command("export")
@click.argument("capsule", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["peft", "diffusers", "kohya"]),
    default="peft",
    show_default=True,
    help="Whose layout to write.",
)
@BASE_OPTION
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export_command(capsule: Path, out: Path, kind: str, base: str, as_json: bool) -> None:
    """Write CAPSULE's weights as LoRA files that other programs load.

    OUT is a folder, for kohya a .safetensors file. What a capsule holds besides goes into a
    companion, capsule_rest.safetensors; with it `realfill import` gives the same capsule back.
    """
    from realfill.base import load_base
    from realfill.interchange import SUFFIX, export_capsule

    if not out.parent.is_dir():
        raise Refusal(f"{out.parent} is no folder: create it, or give another OUT.")
    if (kind == "kohya") != (out.suffix == SUFFIX):
        wanted = f"a file *{SUFFIX}" if kind == "kohya" else f"a folder, not a file *{SUFFIX}"
        raise Refusal(f"--format {kind} writes {wanted}, and OUT is {out}: name it so.")
    companion = export_capsule(capsule.read_bytes(), out, kind, load_base(base))  # type: ignore[arg-type]
    outcome = {"format": kind, "out": str(out), "companion": str(companion)}
    click.echo(json.dumps(outcome, indent=2) if as_json else f"{out}: {capsule} for {kind}.")


@main.command("import")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--scene", metavar="NAME", help="Name of the scene; an export's companion knows it.")
@click.option("--prompt", help="Prompt it was trained with; likewise. [default: realfill's own]")
@BASE_OPTION
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def import_command(
    source: Path, out: Path, scene: str | None, prompt: str | None, base: str, as_json: bool
) -> None:
    """Make the capsule OUT of LoRA files: a PEFT or diffusers folder, or a kohya file.

    Without the companion that `realfill export` writes, the capsule has no references: it
    completes images, and its candidates are not ranked.
    """
    from realfill.base import PROMPT, load_base
    from realfill.capsule import digests
    from realfill.interchange import import_capsule
    from realfill.scene import check_name

    if scene is not None:
        check_name(scene)
    if not out.parent.is_dir():
        raise Refusal(f"{out.parent} is no folder: create it, or give another OUT.")
    data = import_capsule(source, load_base(base), scene=scene, prompt=prompt or PROMPT)
    _write(out, data)
    outcome = {"capsule": str(out), "digest": digests(data)[0], "bytes": len(data)}
    if as_json:
        click.echo(json.dumps(outcome, indent=2))
    else:
        click.echo(
            f"{out}: {len(data) / 1e6:.1f} MB from {source}. Next: realfill registry publish {out}"
        )


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--matcher",
    default="nano",
    show_default=True,
    help="nano, outdoor, a weights file, efficientloftr:FOLDER, sift, or none.",
)
@click.option("--size", "size_px", default=512, show_default=True, help="Resolution of the base.")
@click.option("--json", "as_json", is_flag=True, help="Print the warnings as JSON.")
def preflight(folder: Path, matcher: str, size_px: int, as_json: bool) -> None:
    """Look at the scene in FOLDER before it is trained, and warn of what is likely to go wrong.

    FOLDER is as for `realfill train`. Exit status 1 says that there are warnings.
    """
    from realfill.rank import load_matcher
    from realfill.rank import preflight as look_at
    from realfill.scene import load_scene

    scene = load_scene(folder)
    finder = None if matcher == "none" else load_matcher(matcher)
    found = look_at(scene.references, scene.target, scene.mask, matcher=finder, size_px=size_px)
    if as_json:
        outcome = {"scene": scene.name, "warnings": [asdict(caution) for caution in found]}
        click.echo(json.dumps(outcome, indent=2))
    else:
        for caution in found:
            click.echo(f"{caution.code}: {caution.message}")
        if not found:
            click.echo(f"{scene.name}: nothing speaks against it.")
    if found:
        raise SystemExit(1)


def _shown(
    records: Iterator[Any], title: str, steps: int, tensorboard: str | None
) -> Iterator[Any]:
    """Pass records on, with a progress bar and, if wanted, TensorBoard scalars."""
    writer = None
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(tensorboard)
    with _progress() as progress:
        task = progress.add_task(title, total=steps, loss="")
        for record in records:
            progress.update(task, completed=record.step, loss=f"loss {record.loss:.4f}")
            if writer:
                writer.add_scalar("loss", record.loss, record.step)
                if record.probe is not None:
                    writer.add_scalar("probe", record.probe, record.step)
            yield record
    if writer:
        writer.close()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _changes(pairs: tuple[str, ...]) -> dict[str, Any]:
    changes = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise Refusal(f"--set {pair!r} has no value: write it as KEY=VALUE, such as steps=500.")
        try:
            changes[key] = json.loads(value)
        except json.JSONDecodeError:
            changes[key] = value
    return changes


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise Refusal(f"--device is {name}, but torch sees no GPU here: use cpu or auto.")
    return name
