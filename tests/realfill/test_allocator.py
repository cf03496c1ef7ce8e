"""Google's allocator is found without a helper process, and a process begins with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from realfill import allocator
from realfill.allocator import allocator_variables, tcmalloc

ROOT = Path(__file__).parents[2]
WIDTHS = [b"\x7fELF" + width for width in (b"\x01", b"\x02")]
OTHERS, OURS = WIDTHS if sys.maxsize > 2**32 else WIDTHS[::-1]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the loader is Linux's")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a shell begins; what was found before is looked for again."""
    for name in ("LD_PRELOAD", "TCMALLOC_WAS_ASKED_FOR"):
        monkeypatch.delenv(name, raising=False)
    tcmalloc.cache_clear()
    yield
    tcmalloc.cache_clear()


@pytest.mark.parametrize("found", ["libtcmalloc_minimal.so.4", None])
def test_tcmalloc_is_preloaded_where_the_system_has_it(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    """And what the caller preloads, or that nothing shall be, stays as it is."""
    monkeypatch.setattr(allocator, "tcmalloc", lambda: found)
    assert allocator_variables().get("LD_PRELOAD") == found
    for given in ("", "libjemalloc.so.2"):
        monkeypatch.setenv("LD_PRELOAD", given)
        assert allocator_variables() == {}


@LINUX
def test_the_folders_of_the_loader_are_looked_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The one without a profiler first, wherever it lies; one for developers alone is none."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    monkeypatch.setattr(allocator, "_folders", lambda: [tmp_path / "nowhere", first, second])
    for name in ("libtcmalloc_minimal.so", "libtcmalloc_minimal_debug.so.4"):
        (first / name).write_bytes(OURS)
    assert _looked_up() is None
    (first / "libtcmalloc.so.4.5.10").write_bytes(OURS)
    assert _looked_up() == str(first / "libtcmalloc.so.4.5.10")
    (second / "libtcmalloc_minimal.so.4").write_bytes(OURS)
    assert _looked_up() == str(second / "libtcmalloc_minimal.so.4")


@LINUX
def test_what_the_loader_would_refuse_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A library of another width, a text, a link to nothing, and a name that is two for it."""
    monkeypatch.setattr(allocator, "_folders", lambda: [tmp_path, tmp_path / "a b"])
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "libtcmalloc_minimal.so.4").write_bytes(OURS)
    (tmp_path / "libtcmalloc_minimal.so.1").write_bytes(OTHERS)
    (tmp_path / "libtcmalloc_minimal.so.2").write_text("INPUT(-ltcmalloc)")
    (tmp_path / "libtcmalloc_minimal.so.3").symlink_to(tmp_path / "nowhere")
    assert _looked_up() is None
    (tmp_path / "libtcmalloc_minimal.so.5").write_bytes(OURS)
    assert _looked_up() == str(tmp_path / "libtcmalloc_minimal.so.5")


@LINUX
def test_a_folder_that_the_caller_names_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the loader itself has it; an empty part of the list is no folder."""
    file = tmp_path / "libtcmalloc_minimal.so.4"
    file.write_bytes(OURS)
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path}")
    assert _looked_up() == str(file)


@LINUX
def test_nothing_is_started_to_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who watches the children of a command sees what it starts on purpose alone."""

    def refuse(*words: object, **options: object) -> None:
        raise AssertionError(words)

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "posix_spawn", refuse)
    _looked_up()


def _looked_up() -> str | None:
    tcmalloc.cache_clear()
    return tcmalloc()


@pytest.mark.skipif(tcmalloc() is None, reason="the system has no tcmalloc")
def test_the_loader_finds_what_is_preloaded() -> None:
    """A process that preloads it has it in its memory, and the loader does not complain."""
    program = "from realfill.allocator import has_tcmalloc; print(has_tcmalloc())"
    plain = {**os.environ, "LD_PRELOAD": ""}
    for environment, has in (
        (plain, "False\n"),
        ({**os.environ, **allocator_variables()}, "True\n"),
    ):
        shown = _shown(["-c", program], environment)
        assert shown.stdout == has
        assert not shown.stderr


@LINUX
def test_a_process_begins_again_once() -> None:
    """With the arguments that it was given; a name that leads nowhere is only told of."""
    program = (
        "import os, sys; from realfill.allocator import begin_with; "
        "begin_with({'LD_PRELOAD': 'libtcmalloc-of-nobody.so', 'HOME': 'nowhere'}); "
        "print(os.environ['LD_PRELOAD'], os.environ['HOME'], sys.argv[1:])"
    )
    shown = _shown(["-c", program, "one", "two"], {**os.environ, "HOME": "/kept"})
    assert shown.stdout == "libtcmalloc-of-nobody.so /kept ['one', 'two']\n"
    assert "libtcmalloc-of-nobody.so" in shown.stderr


@LINUX
def test_a_process_that_cannot_have_it_goes_on() -> None:
    """Where somebody takes the variable away each time, and where there is nothing to begin."""
    program = (
        "import os, sys; from realfill.allocator import begin_with; os.environ.pop('ASKED', None); "
        "begin_with({'ASKED': '1'}); print('gone on', os.environ['TCMALLOC_WAS_ASKED_FOR'])"
    )
    assert _shown(["-c", program], os.environ).stdout == "gone on 1\n"
    program = (
        "import sys; from realfill.allocator import begin_with; sys.executable = '/nowhere'; "
        "begin_with({'ASKED': '1'}); print('gone on')"
    )
    assert _shown(["-c", program], os.environ).stdout == "gone on\n"


@pytest.mark.skipif(tcmalloc() is None, reason="the system has no tcmalloc")
@pytest.mark.parametrize("given", [None, ""])
def test_the_command_begins_with_it(tmp_path: Path, given: str | None) -> None:
    """Unless the caller wants none."""
    spoiler = tmp_path / "sitecustomize.py"
    shows = tmp_path / "allocators"
    spoiler.write_text(
        "import atexit, pathlib\n"
        "def tell():\n"
        "    from realfill.allocator import has_tcmalloc\n"
        f"    pathlib.Path({str(shows)!r}).write_text(str(has_tcmalloc()))\n"
        "atexit.register(tell)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    if given is not None:
        environment["LD_PRELOAD"] = given
    shown = _shown(["-m", "realfill", "--help"], environment)
    assert shown.stdout.startswith("Usage: realfill [OPTIONS] COMMAND")
    assert shows.read_text() == str(given is None)


def _shown(words: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
