"""Comparing everything that the database says with the bytes in the store.

It goes through the same functions that serve readers, page by page and without a long
transaction, so that a busy registry can be verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from registry import catalog
from registry.blobs import Blobs
from registry.database import Database
from registry.errors import CorruptObject, InvalidUpload, NotFound
from registry.records import Fault, Scene, Version
from registry.upload import Header, Upload, inspect

if TYPE_CHECKING:
    from registry.reader import Reader

COMPARED = ("tensor_digest", "size_bytes", "base", "base_fingerprint", "rank", "metadata")


def altered_fields(version: Version, found: Header | Upload) -> list[str]:
    """Names of the fields in which a version's row differs from its capsule."""
    names = [name for name in COMPARED if hasattr(found, name)]
    return [name for name in names if getattr(version, name) != getattr(found, name)]


def verify(
    reader: Reader,
    database: Database,
    blobs: Blobs,
    progress: Callable[[Version], None] | None,
) -> list[Fault]:
    """See `Registry.verify`."""
    faults: list[Fault] = []
    after = ""
    while page := reader.scenes(after=after):
        for scene in page:
            servable: set[int] = set()
            faulty: set[int] = set()
            highest = 0
            for version in _every_version(reader, scene.name):
                if found := _check_version(database, blobs, version):
                    faults += found
                    faulty.add(version.number)
                highest = max(highest, version.number)
                if version.retired is None:
                    servable.add(version.number)
                if progress is not None:
                    progress(version)
            faults += _check_counter(reader, scene, highest)
            faults += _check_aliases(reader, scene, servable, faulty)
        after = page[-1].name
    return faults


def _every_version(reader: Reader, scene: str) -> Iterator[Version]:
    before: int | None = None
    while page := reader.versions(scene, before=before, retired=True):
        yield from page
        before = page[-1].number


def _check_version(database: Database, blobs: Blobs, version: Version) -> list[Fault]:
    """The bytes against the digest, the row against the bytes, then the row against its seal."""
    altered: list[str] = []
    # A sweep may have taken the bytes of a retired version, and of no other.
    if version.swept is None or version.retired is None:
        try:
            altered = altered_fields(version, inspect(blobs.read(version.digest)))
        except (CorruptObject, InvalidUpload) as error:
            if _is_swept(database, version):
                return []
            return [Fault(CorruptObject.code, version.reference, str(error))]
    if altered:
        message = (
            f"The database's row of {version.reference} differs from its capsule in "
            f"{', '.join(altered)}: it was edited. Restore the database from a backup."
        )
        return [Fault("altered_row", version.reference, message)]
    with database.reading() as connection:
        try:
            catalog.find_any_version(connection, version.scene, version.number)
        except CorruptObject as error:
            return [Fault("altered_row", version.reference, str(error))]
        except NotFound:
            # Its scene was erased since it was listed.
            return []
    return []


def _is_swept(database: Database, version: Version) -> bool:
    """Whether the version was retired and swept, or erased, since it was listed."""
    below = version.number + 1
    with database.reading() as connection:
        try:
            found = catalog.list_versions(
                connection, version.scene, before=below, limit=1, retired=True
            )
        except NotFound:
            return True
    return not found or (found[0].swept is not None and found[0].retired is not None)


def _check_counter(reader: Reader, scene: Scene, highest: int) -> list[Fault]:
    """A counter below the highest number would give a number twice."""
    if highest <= scene.latest or highest <= reader.scene(scene.name).latest:
        return []
    message = (
        f"The counter of {scene.name} stands at {scene.latest} and version {highest} exists: it "
        "was edited. Restore the database from a backup."
    )
    return [Fault("altered_row", scene.name, message)]


def _check_aliases(
    reader: Reader, scene: Scene, servable: set[int], faulty: set[int]
) -> list[Fault]:
    """Aliases that lead to no version that is kept, or elsewhere than their last move."""
    faults = []
    for alias, number in scene.aliases.items():
        thing = f"{scene.name}@{alias}"
        try:
            # Asked again, because the alias may have moved since the scene was listed.
            reader.resolve(thing)
        except NotFound as error:
            if number not in servable:
                faults.append(Fault("dangling_alias", thing, str(error)))
        except CorruptObject as error:
            if number not in faulty:
                faults.append(Fault("altered_row", thing, str(error)))
    return faults
