"""The tree keeps its own rules."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGES = ("realfill", "service", "registry", "kernels", "benchmarks")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return table


@pytest.fixture(scope="module")
def python_files(root: Path) -> list[Path]:
    return [path for top in (*PACKAGES, "tests") for path in (root / top).rglob("*.py")]


def requirements(project: dict[str, Any]) -> list[Requirement]:
    extras = project["optional-dependencies"].values()
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    return [Requirement(text) for text in texts]


def test_no_file_is_named_for_a_mixture(python_files: list[Path]) -> None:
    """Every file has a noun of its own."""
    mixtures = {"utils", "util", "helpers", "common", "misc"}
    assert [
        path for path in python_files if path.stem in mixtures or path.parent.name in mixtures
    ] == []


def test_no_python_file_exceeds_400_lines(python_files: list[Path]) -> None:
    """A longer file holds two nouns; migrations are what the tool writes."""
    lengths = {
        str(path): len(path.read_text().splitlines())
        for path in python_files
        if "migrations" not in path.parts
    }
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_kernels_package_is_a_docstring(root: Path) -> None:
    """transformers probes a package of that name: ours must import nothing and claim no version."""
    body = ast.parse((root / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)
    assert isinstance(body[0].value.value, str)


def test_every_package_folder_is_a_package(root: Path) -> None:
    """A folder of Python files without __init__.py would be left out of the wheel."""
    folders = {path.parent for package in PACKAGES for path in (root / package).rglob("*.py")}
    without = {folder for folder in folders if not (folder / "__init__.py").is_file()}
    assert {folder for folder in without if "migrations" not in folder.parts} == set()


def test_every_dependency_has_a_reason(root: Path, project: dict[str, Any]) -> None:
    """docs/dependencies.md names exactly the packages of pyproject.toml, each with a sentence."""
    text = (root / "docs" / "dependencies.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (.+) \|$", text, flags=re.MULTILINE)
    reasons = {name: reason for name, reason in rows if name not in ("package", "---")}
    assert set(reasons) == {requirement.name for requirement in requirements(project)}
    assert [name for name, reason in reasons.items() if len(reason.split()) < 3] == []


def locked(path: Path) -> list[Requirement]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return [Requirement(line) for line in lines]


def pins(path: Path) -> dict[str, str]:
    """Versions by name; those that are needed elsewhere alone have none."""
    return {one.name: str(one.specifier).partition("==")[2] for one in locked(path)}


def test_pins_lie_in_the_declared_ranges(root: Path, project: dict[str, Any]) -> None:
    """constraints.txt pins every dependency of this platform inside its range, without a label."""
    pinned = pins(root / "constraints.txt")
    extras = project["optional-dependencies"]
    unpinned = {Requirement(text).name for text in [*extras["gpu"], *extras["postgres"]]}
    for requirement in requirements(project):
        if requirement.name in unpinned or (
            requirement.marker and not requirement.marker.evaluate()
        ):
            continue
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
    assert [name for name, version in pinned.items() if "+" in version] == []


def test_bento_installs_versions_that_were_tested(root: Path) -> None:
    """requirements.txt is a part of constraints.txt."""
    serving = pins(root / "requirements.txt")
    assert serving.items() <= pins(root / "constraints.txt").items()
    assert {"torch", "bentoml", "fastapi"} <= set(serving)
    assert "pytest" not in serving


@pytest.mark.parametrize("name", ["constraints.txt", "requirements.txt"])
def test_locks_hold_on_other_platforms(root: Path, project: dict[str, Any], name: str) -> None:
    """What a dependency is conditional on is so in the lock: on ARM another ONNX Runtime."""
    conditions = {one.name: str(one.marker) for one in locked(root / name) if one.marker}
    serving = [Requirement(text) for text in project["dependencies"]]
    assert conditions == {one.name: str(one.marker) for one in serving if one.marker}
    assert "onnxruntime" in conditions


@pytest.mark.parametrize("name", ["constraints.txt", "requirements.txt"])
def test_forbidden_packages_are_pinned_nowhere(root: Path, name: str) -> None:
    """Neither the package that breaks beside a CPU torch, nor the one that takes our name."""
    assert {"torchvision", "kernels"}.isdisjoint(pins(root / name))


def test_help_lists_every_target(root: Path) -> None:
    """make help shows each public target with a word of explanation."""
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    listed = {line.split()[0] for line in shown.stdout.splitlines() if len(line.split()) > 2}
    makefile = (root / "Makefile").read_text().replace("\\\n", " ")
    phony = re.search(r"^\.PHONY:(.+)$", makefile, flags=re.MULTILINE)
    assert phony is not None
    assert listed == set(phony.group(1).split())


def test_tests_that_docs_name_exist(root: Path) -> None:
    """A document that says which test guards what is right about it."""
    named = {
        reference
        for document in (root / "docs").glob("*.md")
        for reference in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", document.read_text())
    }
    assert named
    missing = {
        (path, test) for path, test in named if f"\ndef {test}(" not in (root / path).read_text()
    }
    assert missing == set()


def test_commands_of_the_other_packages_are_entry_points(project: dict[str, Any]) -> None:
    """`realfill` finds `registry` and `serve` by name, since it may not import them."""
    assert set(project["entry-points"]["realfill.commands"]) >= {"registry", "serve"}
