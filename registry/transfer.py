"""Whole scenes out of a registry and into another one: export, import, copy.

Numbers, digests, aliases and their history come out as they went in. A scene that the target has
already is only carried forward: what it holds must be the beginning of what comes, else nothing
is changed. So a transfer that was interrupted is simply repeated; capsules that arrived are not
sent again, and of each scene either all rows are visible or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, delete, insert, select, update

from registry import catalog, ledger
from registry.aliases import Step
from registry.blobs import blob_key, signature_key
from registry.errors import (
    Conflict,
    CorruptObject,
    InvalidReference,
    InvalidUpload,
    StorageUnavailable,
)
from registry.exports import Write, directory_writer, tar_writer
from registry.keeper import person
from registry.manifest import (
    MANIFEST,
    SceneEntry,
    Source,
    VersionEntry,
    encode_manifest,
)
from registry.reader import now
from registry.records import check_scene
from registry.schema import alias_moves, aliases, scenes
from registry.source import RegistrySource, history
from registry.upload import Upload, inspect

if TYPE_CHECKING:
    from registry.registry import Registry

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Transfer:
    """What became of one scene.

    Args:
        versions: Count of the versions that were added.
        moves: Count of the steps of aliases that were added.
        sent_bytes: Size of the capsules that the target had not yet.
    """

    scene: str
    versions: int
    moves: int
    sent_bytes: int


def export_scenes(
    registry: Registry, out: Path, names: Sequence[str] = (), *, progress: Progress | None = None
) -> list[Transfer]:
    """Write scenes to a directory, or to a file that ends in .tar.

    Args:
        names: Scenes to write; none for all.
        progress: Called with the reference of each version.

    Raises:
        NotFound: There is no such scene.
        Conflict: There is an export already.
        CorruptObject: A capsule is damaged; nothing is exported.
        StorageUnavailable: The place cannot be written.
    """
    source = RegistrySource(registry, names)
    entries = source.scenes()
    if (out / MANIFEST).exists() or out.is_file():
        raise Conflict(f"{out} holds an export already: name another place, or delete it.")
    manifest = encode_manifest(entries, now())
    try:
        writing = tar_writer(out) if out.suffix == ".tar" else directory_writer(out)
        with writing as write:
            sent = [_send(entry, source, write, progress) for entry in entries]
            write(MANIFEST, lambda: manifest)
    except OSError as error:
        raise StorageUnavailable(
            f"{out} cannot be written: {error.strerror}. Name another place."
        ) from error
    return sent


def import_scenes(
    registry: Registry,
    source: Source,
    names: Sequence[str] = (),
    *,
    rename: str | None = None,
    by: str | None = None,
    override: bool = False,
    progress: Progress | None = None,
) -> list[Transfer]:
    """Take scenes from an export or another registry, as `open_export` and `RegistrySource` give.

    Args:
        names: Scenes to take; none for all.
        rename: Name for the scene here, where exactly one is taken.
        by: Who imports; the login name by default.
        override: Also where an alias that moves is protected here.

    Raises:
        InvalidUpload: The manifest does not add up, or a capsule is not sound.
        CorruptObject: A capsule is missing or altered.
        Conflict: The registry's scene went another way than the one that comes, or was erased.
        Protected: An alias that moves is protected, and override is False.
    """
    entries = [entry for entry in source.scenes() if not names or entry.name in names]
    absent = sorted(set(names) - {entry.name for entry in entries})
    if absent:
        raise InvalidReference(f"{source.place} holds no scene {absent[0]!r}: leave it out.")
    if rename is not None:
        if len(entries) != 1:
            raise InvalidReference(
                f"One name cannot stand for {len(entries)} scenes: name the one to take."
            )
        entries = [replace(entries[0], name=check_scene(rename))]
    return [_take(registry, entry, source, by, override, progress) for entry in entries]


def _take(
    registry: Registry,
    entry: SceneEntry,
    source: Source,
    by: str | None,
    override: bool,
    progress: Progress | None,
) -> Transfer:
    """The capsules first, one by one; then every row of the scene in one transaction."""
    kept = [version for version in entry.versions if version.swept is None]
    with registry.database.reading() as connection:
        ledger.refuse_erased(connection, entry.name, *(version.digest for version in kept))
    uploads, signatures, sent_bytes = _bring(registry, entry.name, kept, source, progress)
    by, at = person(by), now()
    numbers = {version.number for version in kept}
    with registry.database.writing() as connection:
        ledger.add_scene(connection, entry.name, entry.created)
        scene_id = ledger.lock_scene(connection, entry.name)
        # Once more, now that the scene's row is held, and below those of the bytes.
        ledger.refuse_erased(connection, entry.name)
        fresh = _fresh(connection, entry, kept)
        for version in fresh:
            swept = ledger.take_blob(connection, uploads[version.digest], at)
            ledger.refuse_erased(connection, entry.name, version.digest)
            if swept:
                registry.blobs.put(source.read(version.digest), version.digest)
            # A parent whose bytes a sweep had removed does not come along.
            parent = version.parent if version.parent in numbers else None
            known = replace(version, parent=parent)
            _add(connection, scene_id, entry.name, known, uploads[version.digest])
        moves = _replay(connection, scene_id, entry, override)
        for version in fresh:
            _label(connection, scene_id, entry.name, version, by)
        if fresh or moves:
            _finish(connection, scene_id, entry, by, at)
            details = {"versions": len(fresh), "moves": moves, "from": source.place}
            ledger.record(connection, "scene.imported", entry.name, by, at, details)
        # Last, so that a scene that is refused leaves signatures as they were.
        for digest, signature in signatures.items():
            registry.blobs.sign(digest, signature)
    return Transfer(entry.name, len(fresh), moves, sent_bytes)


def _bring(
    registry: Registry,
    scene: str,
    kept: Sequence[VersionEntry],
    source: Source,
    progress: Progress | None,
) -> tuple[dict[str, Upload], dict[str, bytes], int]:
    """Store the capsules; what they are, signatures that are not here, and the bytes sent."""
    uploads: dict[str, Upload] = {}
    signatures: dict[str, bytes] = {}
    sent_bytes = 0
    for version in kept:
        data = _arrived(registry, version.digest)
        if data is None:
            data = source.read(version.digest)
            registry.blobs.put(data, version.digest)
            sent_bytes += len(data)
        uploads[version.digest] = inspect(data)
        signature = source.signature(version.digest)
        if signature is not None and registry.blobs.signature(version.digest) is None:
            signatures[version.digest] = signature
        if progress is not None:
            progress(f"{scene}@{version.number}")
    return uploads, signatures, sent_bytes


def _arrived(registry: Registry, digest: str) -> bytes | None:
    """A sound capsule that an earlier transfer left, or None."""
    try:
        return registry.blobs.read(digest)
    except CorruptObject:
        return None


def _fresh(
    connection: Connection, entry: SceneEntry, kept: Sequence[VersionEntry]
) -> list[VersionEntry]:
    """Versions that the registry has not; those that it has must be the same."""
    latest = catalog.find_scene(connection, entry.name).latest
    for version in kept:
        if version.number > latest:
            continue
        held = catalog.list_versions(
            connection, entry.name, before=version.number + 1, limit=1, retired=True
        )
        if not held or (held[0].number, held[0].digest) != (version.number, version.digest):
            raise _diverged(entry.name, f"version {version.number} is another one there")
    return [version for version in kept if version.number > latest]


def _add(
    connection: Connection, scene_id: int, scene: str, version: VersionEntry, upload: Upload
) -> None:
    """The version under its own number; numbers that it passes over are never given."""
    if upload.digest != version.digest:
        raise InvalidUpload(f"The manifest names other bytes for {scene}@{version.number}.")
    counter = update(scenes).where(scenes.c.id == scene_id)
    connection.execute(counter.values(last_number=version.number - 1))
    held = ledger.held_as(connection, scene_id, version.digest)
    if held is not None:
        raise _diverged(scene, f"version {held.number} has the bytes of {version.number} there")
    step = Step(scene_id, scene, "", 0, "publish", version.created_by, version.created)
    ledger.add_version(connection, step, upload, version.parent)


def _replay(connection: Connection, scene_id: int, entry: SceneEntry, override: bool) -> int:
    """Write down the steps of the aliases that the registry has not; their count."""
    done = history(connection, scene_id)
    common = min(len(done), len(entry.history))
    if list(entry.history[:common]) != done[:common]:
        raise _diverged(entry.name, "an alias was moved elsewhere there")
    if len(done) > len(entry.history):
        return 0
    if not override:
        for alias in sorted({move.alias for move in entry.history[common:]}):
            ledger.refuse_protected(connection, scene_id, entry.name, alias)
    mine = select(alias_moves.c.id).where(alias_moves.c.scene_id == scene_id)
    ids = list(connection.execute(mine.order_by(alias_moves.c.id)).scalars())
    pointers = dict(catalog.find_scene(connection, entry.name).aliases)
    for move in entry.history[common:]:
        if pointers.get(move.alias) != move.previous:
            raise _adrift(entry.name)
        pointers[move.alias] = move.number
        fields = asdict(move) | {"undoes": None if move.undoes is None else ids[move.undoes]}
        row = insert(alias_moves).values(scene_id=scene_id, **fields).returning(alias_moves.c.id)
        ids.append(connection.execute(row).scalar_one())
        details = {"alias": move.alias, "number": move.number, "action": move.action}
        ledger.record(connection, "alias.moved", entry.name, move.moved_by, move.moved, details)
    if pointers != dict(entry.aliases):
        raise _adrift(entry.name)
    # Only the last step of each, since a version on the way may have been swept.
    connection.execute(delete(aliases).where(aliases.c.scene_id == scene_id))
    rows = [{"scene_id": scene_id, "name": n, "number": k} for n, k in pointers.items()]
    if rows:
        connection.execute(insert(aliases), rows)
    return len(entry.history) - common


def _label(
    connection: Connection, scene_id: int, scene: str, version: VersionEntry, by: str
) -> None:
    """Tags, metrics and retirement, which come after the aliases have left."""
    step = Step(scene_id, scene, "", version.number, "label", by, version.created)
    ledger.set_labels(connection, step, version.tags, version.metrics)
    if version.retired is not None:
        found = catalog.find_any_version(connection, scene, version.number)
        ledger.set_retired(connection, scene_id, found, version.retired, by, version.retired)


def _finish(
    connection: Connection, scene_id: int, entry: SceneEntry, by: str, at: datetime
) -> None:
    """Numbers once given stay given, and guards are set when the aliases have arrived."""
    here = (scenes.c.id == scene_id) & (scenes.c.last_number < entry.latest)
    connection.execute(update(scenes).where(here).values(last_number=entry.latest))
    for alias in entry.protected:
        step = Step(scene_id, entry.name, alias, 0, "import", by, at)
        ledger.set_protected(connection, step, True)


def _adrift(scene: str) -> InvalidUpload:
    return InvalidUpload(
        f"The aliases of {scene!r} are not where their history leads: export it again."
    )


def _diverged(scene: str, fact: str) -> Conflict:
    return Conflict(
        f"The scene {scene!r} went another way in this registry ({fact}): import it under another "
        "name with --as."
    )


def _send(entry: SceneEntry, source: Source, write: Write, progress: Progress | None) -> Transfer:
    kept = [version for version in entry.versions if version.swept is None]
    sent_bytes = 0
    for version in kept:
        sent_bytes += write(blob_key(version.digest), partial(source.read, version.digest))
        signature = source.signature(version.digest)
        if signature is not None:
            write(signature_key(version.digest), partial(bytes, signature))
        if progress is not None:
            progress(f"{entry.name}@{version.number}")
    return Transfer(entry.name, len(kept), len(entry.history), sent_bytes)
