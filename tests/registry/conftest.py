"""Fixtures of the registry's tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry import Registry


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The developer's own registry is never touched."""
    monkeypatch.delenv("REALFILL_REGISTRY", raising=False)
    monkeypatch.delenv("REALFILL_REGISTRY_DATABASE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an empty registry, to be copied: migrating each time would take longer."""
    folder = tmp_path_factory.mktemp("empty") / "registry"
    Registry.open(folder).close()
    return folder


@pytest.fixture
def registry(empty_registry: Path, tmp_path: Path) -> Iterator[Registry]:
    """An empty registry in `tmp_path / "registry"`."""
    shutil.copytree(empty_registry, tmp_path / "registry")
    opened = Registry.open(tmp_path / "registry")
    yield opened
    opened.close()
