"""The command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from realfill.base import load_base
from realfill.capsule import read_capsule
from realfill.cli import main
from realfill.errors import InvalidScene
from realfill.scene import check_name
from registry import Registry
from registry.errors import InvalidReference
from registry.records import check_scene
from tests.tiny import save_tiny_base, tiny_base, tiny_capsule


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A scene of two references on disk."""
    generator = torch.Generator().manual_seed(0)

    def save(path: Path, mode: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 48, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).convert(mode).save(path)

    for name in ("ref/a.png", "ref/b.png", "target/target.png"):
        save(tmp_path / "tower" / name, "RGB")
    mask = torch.zeros(40, 48, dtype=torch.uint8)
    mask[10:20, 12:30] = 255
    Image.fromarray(mask.numpy()).save(tmp_path / "tower" / "target" / "mask.png")
    return tmp_path / "tower"


def run(*words: object) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    outcome = CliRunner().invoke(main, [str(word) for word in words])
    return outcome.exit_code, outcome.output


def test_help_names_every_command() -> None:
    """Commands of other packages hang in by entry point."""
    status, text = run("--help")
    assert status == 0
    names = [
        "complete",
        "demo",
        "export",
        "import",
        "preflight",
        "pretrain",
        "registry",
        "serve",
        "train",
    ]
    for command in names:
        assert command in text


def test_help_is_shown_without_torch() -> None:
    """Importing it takes seconds, and what only asks a service or a registry needs none."""
    program = (
        "import sys; from click.testing import CliRunner; from realfill.cli import main\n"
        "for words in ('', 'complete ', 'serve ', 'demo ', 'registry '):\n"
        "    assert CliRunner().invoke(main, (words + '--help').split()).exit_code == 0\n"
        "print('torch' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "False\n"


@pytest.mark.weights
def test_preflight_warns_with_numbers(folder: Path) -> None:
    """Noise of 48 px shares nothing and is small; warnings come as sentences, or as JSON."""
    status, text = run("preflight", folder)
    assert status == 1
    assert "small: The reference 1 is 48x40 px, its shorter side under 512" in text
    assert "overlap: The reference 2 matches the known region in " in text
    status, text = run("preflight", folder, "--matcher", "none", "--size", 32, "--json")
    told = json.loads(text)
    assert (status, told["scene"]) == (0, "tower")
    assert told["warnings"] == []
    status, text = run("preflight", folder, "--matcher", "absent.safetensors")
    assert status == 2
    assert "absent.safetensors do not exist; pass" in text


def test_train_writes_a_capsule(folder: Path, tmp_path: Path) -> None:
    """Photos in, a capsule for that base out, and the outcome as JSON."""
    base = save_tiny_base(tmp_path / "base")
    words = ["--set", "steps=2", "--set", "pool=4", "--set", "batch=2", "--set", "rank=2"]
    outcome = CliRunner().invoke(
        main,
        ["train", str(folder), "--base", str(base), *words, "--set", "alpha=2.0", "--json"],
        catch_exceptions=False,
    )
    assert outcome.exit_code == 0
    report = json.loads(outcome.stdout)
    capsule = read_capsule((folder / "capsule.safetensors").read_bytes(), tiny_base())
    assert capsule.header.scene == "tower"
    assert capsule.header.rank == 2
    assert report["steps"] == 2
    assert not list(folder.glob("*.checkpoint"))


@pytest.mark.parametrize(
    ("folder_name", "words", "scene"),
    [("My Tower", (), "my-tower"), ("Château d'If", (), "chateau-d-if"), ("x", ("tor",), "tor")],
)
def test_trained_scene_can_be_published(
    folder: Path, tmp_path: Path, folder_name: str, words: tuple[str, ...], scene: str
) -> None:
    """It is called after its folder, by a name that the registry takes, or as it was told."""
    base, place = save_tiny_base(tmp_path / "base"), folder.rename(tmp_path / folder_name)
    options = [word for name in words for word in ("--name", name)]
    small = ["--set", "steps=1", "--set", "pool=2", "--set", "batch=1"]
    status, text = run("train", place, "--base", base, *small, *options)
    assert (status, f"scene {scene}," in text.replace("\n", " ")) == (0, True)
    registry = Registry.open(tmp_path / "registry")
    assert registry.publish((place / "capsule.safetensors").read_bytes()).scene == scene


@pytest.mark.parametrize(
    "name", ["tower", "a", "0.x_y-z", "Tower", "", "-a", "塔", "a b", "a" * 64]
)
def test_scene_names_are_the_registrys(name: str) -> None:
    """One rule, kept by two packages that do not know each other."""
    allowed = []
    for check, refusal in ((check_name, InvalidScene), (check_scene, InvalidReference)):
        try:
            allowed.append(check(name) == name)
        except refusal:
            allowed.append(False)
    assert allowed[0] == allowed[1]


def test_capsule_that_could_not_be_written_costs_no_training(folder: Path, tmp_path: Path) -> None:
    """The next call writes it; a matcher that is not there is named before the first step."""
    base = save_tiny_base(tmp_path / "base")
    out = tmp_path / "out" / "tower.safetensors"
    out.parent.mkdir()
    # In the place of the draft, so that nothing can be written.
    out.with_suffix(".part").mkdir()
    words = ["--base", base, "--out", out, "--set", "steps=2", "--set", "pool=2"]
    status, _ = run("train", folder, *words)
    assert status != 0
    assert len(list(out.parent.glob("*.checkpoint"))) == 1
    out.with_suffix(".part").rmdir()
    status, text = run("train", folder, *words, "--matcher", "absent.safetensors")
    assert (status, "absent.safetensors do not exist" in text) == (2, True)
    assert len(list(out.parent.glob("*.checkpoint"))) == 1
    status, _ = run("train", folder, *words)
    assert status == 0
    assert out.is_file()
    assert not list(out.parent.glob("*.checkpoint"))


def test_export_and_import_give_the_capsule_back(tmp_path: Path) -> None:
    """To a PEFT folder and back, the same bytes; a wrong OUT is refused in one sentence."""
    base = save_tiny_base(tmp_path / "base")
    capsule = tmp_path / "tower.safetensors"
    capsule.write_bytes(tiny_capsule(load_base(str(base))))
    words = ("--base", base)
    status, text = run("export", capsule, tmp_path / "lora", *words, "--json")
    assert (status, json.loads(text)["format"]) == (0, "peft")
    status, text = run("import", tmp_path / "lora", tmp_path / "again.safetensors", *words)
    assert (status, "realfill registry publish" in text) == (0, True)
    assert (tmp_path / "again.safetensors").read_bytes() == capsule.read_bytes()
    status, text = run("export", capsule, tmp_path / "lora", *words, "--format", "kohya")
    assert (status, "writes a file *.safetensors" in text) == (2, True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--set", "colour=1"), "Unknown training option"),
        (("--set", "steps"), "has no value"),
        (("--set", "steps=many"), "must be a whole number"),
        (("--name", "My Tower"), "could not be published"),
        (("--base", "./nowhere"), "No base"),
        (("--device", "cuda:7"), "sees no GPU"),
        (("--out", "/nowhere/at/all.safetensors"), "is no folder"),
    ],
)
def test_wrong_option_is_answered(folder: Path, words: tuple[str, ...], sentence: str) -> None:
    """One sentence with the remedy, and status 2."""
    status, text = run("train", folder, *words)
    assert status == 2
    assert sentence in text.replace("\n", " ")
    assert "Traceback" not in text


def test_wrong_scene_is_answered(folder: Path) -> None:
    """No references and six references each get their sentence."""
    for k in range(6):
        (folder / "ref" / f"more{k}.png").write_bytes((folder / "ref" / "a.png").read_bytes())
    status, text = run("train", folder)
    assert status == 2
    assert "reference" in text
    for path in (folder / "ref").iterdir():
        path.unlink()
    status, text = run("train", folder)
    assert status == 2
    assert "reference" in text
    assert not (folder / "capsule.safetensors").exists()
