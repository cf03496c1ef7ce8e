"""What a serving process has loaded and set before it begins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from service import libraries
from service.cli import environment_of
from service.libraries import LIBRARIES, library_variables, tcmalloc
from service.settings import load_settings


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell begins."""
    for name in (*LIBRARIES, "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)


def test_libraries_are_set_as_they_are_in_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Idle threads give their cores back, and heaps are few, unless the caller has set it."""
    for name in LIBRARIES:
        monkeypatch.delenv(name, raising=False)
    bentofile = (Path(__file__).parents[2] / "bentofile.yaml").read_text()
    found = environment_of(load_settings())
    for name, value in LIBRARIES.items():
        assert found[name] == value
        assert f'name: {name}\n    value: "{value}"\n' in bentofile
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert environment_of(load_settings())["GOMP_SPINCOUNT"] == "7"


@pytest.mark.parametrize("found", ["libtcmalloc_minimal.so.4", None])
def test_tcmalloc_is_preloaded_where_the_system_has_it(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    """And what the caller preloads, or that nothing shall be, stays as it is."""
    monkeypatch.setattr(libraries, "tcmalloc", lambda: found)
    assert library_variables().get("LD_PRELOAD") == found
    for given in ("", "libjemalloc.so.2"):
        monkeypatch.setenv("LD_PRELOAD", given)
        assert "LD_PRELOAD" not in library_variables()


@pytest.mark.skipif(tcmalloc() is None, reason="the system has no tcmalloc")
def test_the_loader_finds_what_is_preloaded() -> None:
    """A process that preloads it has it in its memory, and the loader does not complain."""
    program = "from service.libraries import has_tcmalloc; print(has_tcmalloc())"
    plain = {**os.environ, "LD_PRELOAD": ""}
    for environment, has in ((plain, "False\n"), ({**os.environ, **library_variables()}, "True\n")):
        shown = _shown(program, environment)
        assert shown.stdout == has
        assert not shown.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the loader is Linux's")
def test_a_process_begins_again_as_what_is_served() -> None:
    """Once, with the arguments that it was given; a name that leads nowhere is only told of."""
    program = (
        "import os, sys; from service import libraries; "
        "libraries.tcmalloc = lambda: 'libtcmalloc-of-nobody.so'; libraries.begin_as_served(); "
        "print(os.environ['LD_PRELOAD'], os.environ['GOMP_SPINCOUNT'], sys.argv[1:])"
    )
    shown = _shown(program, dict(os.environ), "one", "two")
    assert shown.stdout == "libtcmalloc-of-nobody.so 50000 ['one', 'two']\n"
    assert "libtcmalloc-of-nobody.so" in shown.stderr


def _shown(
    program: str, environment: Mapping[str, str], *words: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
