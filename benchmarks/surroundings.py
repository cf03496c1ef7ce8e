"""What a measurement was taken on: machine, device, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

from realfill.allocator import has_tcmalloc

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "kornia",
    "triton",
    "xformers",
    "onnxruntime-gpu",
    "bentoml",
    "numpy",
)
# Behind the commit of a tree with changes.
DIRTY = "-dirty"
CPUINFO = Path("/proc/cpuinfo")
# By its flags, the widest first.
INSTRUCTIONS = {
    "avx512_bf16": "AVX-512 with bf16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def machine() -> str:
    """Processor and its widest instructions, usable cores, memory, system; never a host name.

    And that the process allocates by tcmalloc, where it does.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.machine()}"
    words = [_processor(), f"{cores} cores", f"{memory:.0f} GiB", system]
    return ", ".join([*words, "tcmalloc"] if has_tcmalloc() else words)


def _processor() -> str:
    """Its name, which may be shared by generations, and what tells these apart."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    known = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    flags = known.get("flags", "").split()
    widest = next((name for flag, name in INSTRUCTIONS.items() if flag in flags), None)
    name = known.get("model name", "").strip() or platform.processor() or "unknown processor"
    return f"{name} ({widest})" if widest else name


def device(cuda: bool) -> str:
    """Name of the first GPU if the measurement ran on one, else ``cpu``."""
    if not cuda:
        return "cpu"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cuda (not found)"


def versions() -> dict[str, str]:
    """Python and the installed packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path = ROOT) -> str:
    """Commit of the working tree at the start, ``-dirty`` appended where other things ran.

    That is where the tree had changes then, or has them now, whether or not they were committed
    meanwhile; new rows are none. ``unknown`` where the tree is no repository of its own.
    REALFILL_COMMIT overrides it, for a copy of the tree that lacks its history.
    """
    if given := os.environ.get("REALFILL_COMMIT"):
        return given
    began = _at_start(root)
    if began == "unknown" or began.endswith(DIRTY):
        return began
    try:
        return f"{began}{DIRTY}" if _changes(root, began) else began
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def _at_start(root: Path) -> str:
    """What ``commit`` gave when it was first asked for."""
    try:
        # An environment may lie in somebody else's repository.
        if Path(_git(root, "rev-parse", "--show-toplevel")) != root.resolve():
            return "unknown"
        head = _git(root, "rev-parse", "HEAD")
        return f"{head}{DIRTY}" if _changes(root, head) else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _changes(root: Path, commit: str) -> str:
    """Files that differ from those of a commit, and new ones; rows left out."""
    code = ("--", ".", ":!benchmarks/results")
    differing = _git(root, "diff", "--name-only", commit, *code)
    return differing + _git(root, "ls-files", "--others", "--exclude-standard", *code)


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def command() -> str:
    """The command line of this process, as a person would type it from the repository's root."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        program = [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]]).replace(f"{ROOT}/", "")


# Whatever is committed while something is measured, this is what runs.
commit()
