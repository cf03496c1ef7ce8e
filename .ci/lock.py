"""Pin what is installed: constraints.txt for every extra, requirements.txt for serving alone.

Walks the requirements of pyproject.toml through the installed packages, so that nothing else that
happens to be in the environment is pinned. Fails where a package is outside its range.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Wheels for GPUs are rare on the machine that pins; the range in pyproject.toml holds for them.
UNPINNED_EXTRAS = {"gpu"}


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Versions of all packages that the requirements need here, by canonical name."""
    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"{name} is required, but not installed: run make install.")
        if not requirement.specifier.contains(found.version, prereleases=True):
            sys.exit(f"{requirement} is required, but {found.version} is installed: make install.")
        # A local label such as +cpu names a build; the same pin must fit every build.
        pins[name] = found.version.partition("+")[0]
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in found.requires or ()]
    return pins


def write(path: Path, purpose: str, requirements: Iterable[str]) -> None:
    """Write what the requirements need in the order of names, each with its own condition.

    What is needed elsewhere alone, such as ONNX Runtime's other package, keeps its range.
    """
    asked = [Requirement(text) for text in requirements]
    pins = closure(map(str, asked))
    lines = {name: f"{name}=={version}" for name, version in pins.items()}
    for requirement in asked:
        name = canonicalize_name(requirement.name)
        if requirement.marker and "extra" not in str(requirement.marker):
            ranged = f"{name}{requirement.specifier}"
            lines[name] = f"{lines.get(name, ranged)}; {requirement.marker}"
    text = "".join(f"{line}\n" for _, line in sorted(lines.items()))
    path.write_text(f"# {purpose}\n# Written by make lock; do not edit.\n{text}")
    print(f"{path.name}: {len(lines)} packages")


def main() -> None:
    """Write both files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    serving: list[str] = project["dependencies"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    extra = [
        text for name, texts in extras.items() if name not in UNPINNED_EXTRAS for text in texts
    ]
    everything = [*serving, *extra]
    write(ROOT / "constraints.txt", "The versions that were tested together.", everything)
    write(ROOT / "requirements.txt", "What a Bento installs.", serving)


if __name__ == "__main__":
    main()
