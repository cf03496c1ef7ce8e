"""What a serving process has loaded and set before it begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service import libraries
from service.cli import environment_of
from service.libraries import LIBRARIES, has_tcmalloc, library_variables, tcmalloc
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
    assert has_tcmalloc() == (found is not None)
    for given in ("", "libjemalloc.so.2"):
        monkeypatch.setenv("LD_PRELOAD", given)
        assert "LD_PRELOAD" not in library_variables()
        assert not has_tcmalloc()
    monkeypatch.setenv("LD_PRELOAD", "/opt/libtcmalloc.so.4")
    assert has_tcmalloc()


@pytest.mark.skipif(tcmalloc() is None, reason="the system has no tcmalloc")
def test_the_loader_finds_what_is_preloaded() -> None:
    """A process that preloads it has it in its memory, and the loader does not complain."""
    shown = subprocess.run(
        [sys.executable, "-c", "print(open('/proc/self/maps').read())"],
        env={**os.environ, **library_variables()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "libtcmalloc" in shown.stdout
    assert not shown.stderr


def test_a_process_begins_again_with_what_is_preloaded() -> None:
    """Once, with the arguments that it was given; a path that leads nowhere is only told of."""
    program = (
        "import os, sys; from service import libraries; "
        "libraries.tcmalloc = lambda: 'libtcmalloc-of-nobody.so'; libraries.preload(); "
        "print(os.environ['LD_PRELOAD'], sys.argv[1:])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    shown = subprocess.run(
        [sys.executable, "-c", program, "one", "two"],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "libtcmalloc-of-nobody.so ['one', 'two']\n"
    assert "libtcmalloc-of-nobody.so" in shown.stderr
