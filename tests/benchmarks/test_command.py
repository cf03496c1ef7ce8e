"""The project's own rows hold nothing of which their names do not tell."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import benchmarks
from benchmarks.command import Measurement, OfPhotographs
from benchmarks.engine.__main__ import main as engine
from benchmarks.kernels.__main__ import main as kernels
from benchmarks.load.compare import main as compare
from benchmarks.quality.ablation import main as ablation
from benchmarks.quality.adapt_report import main as adapt_report
from benchmarks.quality.confusion import main as confusion
from benchmarks.quality.nano_report import main as nano_report
from benchmarks.quality.tables import main as tables
from benchmarks.ranking.__main__ import main as ranking
from benchmarks.record import ROWS
from benchmarks.registry.__main__ import main as registry
from benchmarks.soak.__main__ import main as soak
from benchmarks.training.__main__ import main as training


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command of the benchmarks, with the module that has it."""
    for found in pkgutil.walk_packages(benchmarks.__path__, "benchmarks."):
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, click.Command):
                yield found.name, value


def test_every_command_that_records_refuses_trials() -> None:
    """But for the one that adds rows measured elsewhere: it is told by which command."""
    recording = {
        name: command
        for name, command in commands()
        if any(param.name == "rows" for param in command.params)
    }
    assert {"benchmarks.engine.__main__", "benchmarks.quality.halving"} <= set(recording)
    assert [n for n, command in recording.items() if not isinstance(command, Measurement)] == []
    others = {
        name
        for name, command in commands()
        if any(param.default == ROWS and param.name != "rows" for param in command.params)
    }
    assert others == {"benchmarks.record"}


def untold(command: click.Command, *words: str) -> list[str]:
    """Options of which no name of the command's rows would tell."""
    assert isinstance(command, Measurement)
    with command.make_context("measure", list(words)) as context:
        return command.untold(context)


@pytest.mark.parametrize(
    ("command", "words", "found"),
    [
        (engine, "--part mixed --largest 2 --rank 4 --repeats 3", ["--rank 4", "--largest 2"]),
        (engine, "--part mixed --largest 16 --requests 60 --repeats 21", []),
        (engine, "--base sd2-random --device cuda --steps 20", []),
        (engine, "--device cuda", ["--device cuda"]),
        (engine, "--base sd2-random", ["--base sd2-random"]),
        (engine, "--part e2e --samples 16 --steps 4 --matcher outdoor", []),
        (engine, "--part e2e --part lane --samples 16", ["--samples 16"]),
        (compare, "--steps 20 --candidates 4 --out load-out/20", []),
        (compare, "--steps 20 --slo 10 --duration 40", ["--slo 10.0", "--duration 40.0"]),
        (kernels, "--device cuda --no-compile --op geglu", []),
        (kernels, "--batch 2", ["--batch 2"]),
        (ranking, "--device cuda --part truth", []),
        (ranking, "--candidates 2 --source outdoor", ["--source outdoor", "--candidates 2"]),
        (training, "--part flops --counted nano --steps 12", ["--counted nano", "--steps 12"]),
        (registry, "--versions 1000 --no-peer --repeats 2", []),
        (soak, "--minutes 30 --json", []),
        (soak, "--minutes 2 --set REALFILL_X=1", ["--minutes 2.0", "--set REALFILL_X=1"]),
    ],
)
def test_options_that_change_the_work_are_told_by_names_or_refused(
    command: click.Command, words: str, found: list[str]
) -> None:
    """An option at its default changes nothing; neither does how often it is measured."""
    assert untold(command, *words.split()) == found


@pytest.fixture
def photographs(tmp_path: Path) -> str:
    """A folder of three scenes with a truth, and one without."""
    for name, file in (("a", "gt.png"), ("b", "gt.jpg"), ("c", "gt.png"), ("d", "mask.png")):
        target = tmp_path / "scenes" / name / "target"
        target.mkdir(parents=True)
        (target / file).touch()
    return str(tmp_path / "scenes")


@pytest.mark.parametrize("command", [adapt_report, nano_report, confusion, tables, ablation])
def test_names_of_quality_stand_for_the_photographed_scenes(
    command: click.Command, photographs: str
) -> None:
    """Three, and the demo's two beside them."""
    assert isinstance(command, OfPhotographs)
    assert untold(command, "--scenes", photographs) == []
    assert untold(command) == ["0 --scenes with a truth"]
    (Path(photographs) / "d" / "target" / "gt.png").touch()
    assert untold(command, "--scenes", photographs) == ["4 --scenes with a truth"]


def test_choices_of_quality_are_refused(photographs: str) -> None:
    """Base, device, seeds and preset, and scenes or variants left out."""
    words = ["--scenes", photographs, "--base", "sd2", "--device", "cuda", "--preset", "paper"]
    words += ["--no-demo", "--seeds", "4", "--capsules", "elsewhere"]
    found = ["--base sd2", "--device cuda", "--preset paper", "--no-demo", "--seeds 4"]
    assert untold(tables, *words) == found
    only = untold(ablation, "--scenes", photographs, "--only", "nearest mask")
    assert only == ["--only nearest mask"]


def test_a_trial_is_refused_before_it_begins(tmp_path: Path) -> None:
    """In one sentence with the remedy, by which it runs."""
    ran: list[Path] = []

    @click.command(cls=Measurement)
    @click.option("--size", type=int, default=16)
    @click.option("--rows", type=click.Path(path_type=Path), default=ROWS)
    def measure(size: int, rows: Path) -> None:
        ran.append(rows)

    with pytest.raises(click.UsageError) as refused:
        measure.main(["--size", "2"], standalone_mode=False)
    assert str(refused.value.message) == (
        "No row's name would tell of --size 2: give --rows FILE for a trial."
    )
    by_another_way = str(ROWS.parent / ".." / ROWS.parent.name / ROWS.name)
    with pytest.raises(click.UsageError):
        measure.main(["--size", "2", "--rows", by_another_way], standalone_mode=False)
    assert ran == []
    measure.main(["--size", "16"], standalone_mode=False)
    measure.main(["--size", "2", "--rows", str(tmp_path / "rows")], standalone_mode=False)
    assert ran == [ROWS, tmp_path / "rows"]


@pytest.mark.parametrize("command", [adapt_report, nano_report, confusion, tables])
def test_a_folder_of_scenes_that_is_absent_is_refused(
    command: click.Command, tmp_path: Path
) -> None:
    """A misspelt one would else be left out without a word."""
    with pytest.raises(click.BadParameter, match=r"Directory '.*absent' does not exist"):
        command.make_context("measure", ["--scenes", str(tmp_path / "absent")])
