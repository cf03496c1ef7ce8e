"""Google's allocator, where the system has it: a process must have it before it begins."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

PRELOADED = "LD_PRELOAD"
# Where it is set the process has begun again; what it lacks even so it cannot have. Not a setting
# of the service, which refuses those that it does not know.
BEGUN = "TCMALLOC_WAS_ASKED_FOR"
# The one without a profiler first; both allocate alike.
_NAMES = ("libtcmalloc_minimal.so.*", "libtcmalloc.so.*")


def allocator_variables() -> dict[str, str]:
    """Variables for a process that computes on a CPU; what the caller preloads stays as it is."""
    allocator = None if PRELOADED in os.environ else tcmalloc()
    return {} if allocator is None else {PRELOADED: allocator}


@cache
def tcmalloc() -> str | None:
    """The file of Google's allocator, if the system has it in a folder that the loader reads.

    Of the time of a mixed batch on a CPU glibc's takes 4 % and this one 1 (docs/engine.md); a
    training is an eighth shorter by it (docs/training.md).
    """
    if not sys.platform.startswith("linux"):
        return None
    # Not by ctypes' find_library, which starts the linker, and a compiler where it finds nothing.
    found = (path for name in _NAMES for folder in _folders() for path in sorted(folder.glob(name)))
    return next((str(path) for path in found if _is_loadable(path)), None)


def _is_loadable(path: Path) -> bool:
    """Whether it is a library of this process's width, and its name can be given to the loader."""
    if any(sign in str(path) for sign in " :"):
        return False
    with suppress(OSError), path.open("rb") as file:
        return file.read(5) == b"\x7fELF" + (b"\x02" if sys.maxsize > 2**32 else b"\x01")
    return False


def _folders() -> list[Path]:
    """Where the loader looks, and where Python comes from, as an environment of conda has it."""
    named = [Path(name) for name in os.environ.get("LD_LIBRARY_PATH", "").split(":") if name]
    system = ["/usr/local/lib", "/usr/lib64", "/usr/lib"]
    if multiarch := sysconfig.get_config_var("MULTIARCH"):
        system.insert(1, f"/usr/lib/{multiarch}")
    return [*named, Path(sys.base_prefix) / "lib", *map(Path, system)]


def has_tcmalloc() -> bool:
    """Whether this process allocates by it."""
    maps = Path("/proc/self/maps")
    return maps.is_file() and "/libtcmalloc" in maps.read_text()


def begin_with(variables: Mapping[str, str]) -> None:
    """Begin this process again with these variables, unless each is set, to whatever value.

    Once at most; where it cannot, it goes on as it is.
    """
    if BEGUN not in os.environ and any(name not in os.environ for name in variables):
        with suppress(OSError):
            os.execve(sys.executable, sys.orig_argv, {**variables, **os.environ, BEGUN: "1"})
