"""What a measurement was taken on: machine, device, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

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
CPUINFO = Path("/proc/cpuinfo")
# By its flags, the widest first.
INSTRUCTIONS = {
    "avx512_bf16": "AVX-512 with bf16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def machine() -> str:
    """Processor and its widest instructions, usable cores, memory, system; never a host name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{_processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"
    )


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
    """Commit of the working tree, ``-dirty`` appended when it holds other changes than new rows.

    REALFILL_COMMIT overrides it, for a copy of the tree that lacks its history.
    """
    if given := os.environ.get("REALFILL_COMMIT"):
        return given
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


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
