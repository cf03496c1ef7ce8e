"""Comparing everything that the database says with the bytes in the store.

It goes through the same functions that serve readers, page by page and without a long
transaction, so that a busy registry can be verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from registry.errors import CorruptObject, InvalidUpload, NotFound
from registry.records import Fault, Scene, Version
from registry.upload import inspect

if TYPE_CHECKING:
    from registry.registry import Registry

COMPARED = ("tensor_digest", "size_bytes", "base", "base_fingerprint", "rank", "metadata")


def verify(registry: Registry, progress: Callable[[Version], None] | None) -> list[Fault]:
    """See `Registry.verify`."""
    faults: list[Fault] = []
    after = ""
    while page := registry.scenes(after=after):
        for scene in page:
            servable: set[int] = set()
            highest = 0
            for version in _every_version(registry, scene.name):
                faults += _check_version(registry, version)
                highest = max(highest, version.number)
                if version.retired is None:
                    servable.add(version.number)
                if progress is not None:
                    progress(version)
            faults += _check_counter(registry, scene, highest)
            faults += _check_aliases(registry, scene, servable)
        after = page[-1].name
    return faults


def _every_version(registry: Registry, scene: str) -> Iterator[Version]:
    before: int | None = None
    while page := registry.versions(scene, before=before, retired=True):
        yield from page
        before = page[-1].number


def _check_version(registry: Registry, version: Version) -> list[Fault]:
    try:
        upload = inspect(registry.fetch(f"sha256:{version.digest}"))
    except (CorruptObject, InvalidUpload) as error:
        return [Fault(CorruptObject.code, version.reference, str(error))]
    altered = [name for name in COMPARED if getattr(version, name) != getattr(upload, name)]
    if not altered:
        return []
    message = (
        f"The database's row of {version.reference} differs from its capsule in "
        f"{', '.join(altered)}: it was edited. Restore the database from a backup."
    )
    return [Fault("altered_row", version.reference, message)]


def _check_counter(registry: Registry, scene: Scene, highest: int) -> list[Fault]:
    """A counter below the highest number would give a number twice."""
    if highest <= scene.latest or highest <= registry.scene(scene.name).latest:
        return []
    message = (
        f"The counter of {scene.name} stands at {scene.latest} and version {highest} exists: it "
        "was edited. Restore the database from a backup."
    )
    return [Fault("altered_row", scene.name, message)]


def _check_aliases(registry: Registry, scene: Scene, servable: set[int]) -> list[Fault]:
    faults = []
    for alias in [name for name, number in scene.aliases.items() if number not in servable]:
        thing = f"{scene.name}@{alias}"
        try:
            # Asked again, because the alias may have moved since the scene was listed.
            registry.resolve(thing)
        except NotFound as error:
            faults.append(Fault("dangling_alias", thing, str(error)))
    return faults
