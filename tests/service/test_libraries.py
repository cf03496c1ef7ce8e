"""What a serving process has loaded and set before it begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.cli import environment_of
from service.libraries import LIBRARIES
from service.settings import load_settings


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell begins."""
    for name in (*LIBRARIES, "LD_PRELOAD", "TCMALLOC_WAS_ASKED_FOR"):
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the loader is Linux's")
def test_a_process_begins_again_as_what_is_served() -> None:
    """With the allocator and with what libraries read, and with no setting that it did not have."""
    program = (
        "import os; from realfill import allocator; from service import libraries, settings; "
        "allocator.tcmalloc = lambda: 'libtcmalloc-of-nobody.so'; libraries.begin_as_served(); "
        "settings.load_settings(); "
        "print(os.environ['LD_PRELOAD'], os.environ['GOMP_SPINCOUNT'])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "libtcmalloc-of-nobody.so 50000\n"
