"""What an export says of its scenes: a JSON file beside the capsules, with a digest over itself.

    manifest.json                   scenes, their versions by digest, aliases and history
    blobs/sha256/ab/<digest>        the capsules
    signatures/sha256/ab/<digest>   signatures, of those that have one

As a directory, or the same in a tar file. The manifest is written last, so that an interrupted
export is none.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from registry.blobs import blob_key, signature_key
from registry.errors import CorruptObject, InvalidUpload, RegistryError, StorageUnavailable
from registry.records import (
    check_alias,
    check_metrics,
    check_number,
    check_scene,
    check_tags,
)

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 * 1024**2
MAX_CAPSULE_BYTES = 1024**3


@dataclass(frozen=True, slots=True)
class VersionEntry:
    """One version of an exported scene; its bytes are missing where a sweep had removed them."""

    number: int
    digest: str
    size_bytes: int
    created: datetime
    created_by: str
    retired: datetime | None
    swept: datetime | None
    parent: int | None
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class MoveEntry:
    """One step of an alias; `undoes` is the place in the history of the step a rollback undid."""

    alias: str
    previous: int | None
    number: int
    action: str
    undoes: int | None
    moved: datetime
    moved_by: str


@dataclass(frozen=True, slots=True)
class SceneEntry:
    """One exported scene: all that a registry says of it."""

    name: str
    created: datetime
    latest: int
    versions: Sequence[VersionEntry]
    aliases: Mapping[str, int]
    history: Sequence[MoveEntry]
    protected: Sequence[str] = field(default_factory=tuple)


class Source(Protocol):
    """Where scenes come from: an export, or another registry."""

    @property
    def place(self) -> str:
        """Its address, for messages."""

    def scenes(self) -> Sequence[SceneEntry]:
        """What it says of each scene."""

    def read(self, digest: str) -> bytes:
        """A capsule, checked against its digest.

        Raises:
            CorruptObject: The bytes are missing or altered.
        """

    def signature(self, digest: str) -> bytes | None:
        """The capsule's signature, unchecked, or None."""


def encode_manifest(scenes: Sequence[SceneEntry], exported: datetime) -> bytes:
    """The manifest of an export; the same scenes and moment give the same bytes."""
    content = {"format": FORMAT, "exported": exported, "scenes": [asdict(s) for s in scenes]}
    text = json.dumps(content, sort_keys=True, default=datetime.isoformat)
    plain = json.loads(text)
    return json.dumps({**plain, "digest": _digest(plain)}, indent=1, sort_keys=True).encode()


def decode_manifest(data: bytes, place: str) -> list[SceneEntry]:
    """Read a manifest.

    Raises:
        InvalidUpload: It was altered, is of another format, or does not add up.
    """
    try:
        content = dict(json.loads(data))
        digest = content.pop("digest", None)
        if content.get("format") != FORMAT:
            raise InvalidUpload(
                f"The manifest of {place} is of format {str(content.get('format'))[:20]} and this "
                f"registry reads {FORMAT}: export it again with a matching realfill."
            )
        if digest != _digest(content):
            raise InvalidUpload(
                f"The manifest of {place} was altered: its digest differs. Export it again."
            )
        return [_scene(entry) for entry in content["scenes"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidUpload(
            f"The manifest of {place} cannot be read ({error!r:.200}): export it again."
        ) from error
    except RegistryError as error:
        if isinstance(error, InvalidUpload):
            raise
        raise InvalidUpload(f"The manifest of {place} is wrong. {error}") from error


class DirectoryExport:
    """An export in a directory."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder)
        self._folder = folder

    def scenes(self) -> Sequence[SceneEntry]:
        """See Source."""
        try:
            data = (self._folder / MANIFEST).read_bytes()
        except OSError as error:
            raise _no_export(self.place, error) from error
        return decode_manifest(data, self.place)

    def read(self, digest: str) -> bytes:
        """See Source."""
        try:
            data = (self._folder / blob_key(digest)).read_bytes()
        except OSError as error:
            raise missing(digest, self.place) from error
        return checked(data, digest, self.place)

    def signature(self, digest: str) -> bytes | None:
        """See Source."""
        try:
            return (self._folder / signature_key(digest)).read_bytes()
        except OSError:
            return None


class TarExport:
    """An export in a tar file; nothing of it is ever unpacked to the disk."""

    def __init__(self, file: Path) -> None:
        self.place = str(file)
        self._file = file

    def scenes(self) -> Sequence[SceneEntry]:
        """See Source."""
        try:
            return decode_manifest(self._member(MANIFEST, MAX_MANIFEST_BYTES), self.place)
        except KeyError as error:
            raise _no_export(self.place, error) from error

    def read(self, digest: str) -> bytes:
        """See Source."""
        try:
            data = self._member(blob_key(digest), MAX_CAPSULE_BYTES)
        except KeyError as error:
            raise missing(digest, self.place) from error
        return checked(data, digest, self.place)

    def signature(self, digest: str) -> bytes | None:
        """See Source."""
        try:
            return self._member(signature_key(digest), MAX_MANIFEST_BYTES)
        except KeyError:
            return None

    @cached_property
    def _members(self) -> dict[str, tarfile.TarInfo]:
        """Where each member lies; of equal names the last, as tar has it."""
        with tarfile.open(self._file, "r:") as tar:
            return {member.name: member for member in tar.getmembers()}

    def _member(self, name: str, max_bytes: int) -> bytes:
        try:
            member = self._members[name]
            with tarfile.open(self._file, "r:") as tar:
                opened = tar.extractfile(member) if member.isreg() else None
                if opened is None or member.size > max_bytes:
                    raise KeyError(name)
                return opened.read()
        except (tarfile.TarError, OSError) as error:
            raise InvalidUpload(
                f"{self.place} is no readable tar file ({str(error)[:200]}): give one that "
                "`registry export` wrote."
            ) from error


def open_export(place: Path) -> Source:
    """The export in a directory or a tar file."""
    return DirectoryExport(place) if place.is_dir() else TarExport(place)


def checked(data: bytes, digest: str, place: str) -> bytes:
    """The bytes, if they have the digest.

    Raises:
        CorruptObject: They were altered.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise CorruptObject(
            f"The bytes of sha256:{digest} in {place} were altered: they have sha256 {found}. "
            "Export the scene again."
        )
    return data


def missing(digest: str, place: str) -> CorruptObject:
    """The error for a capsule that the manifest promises and nobody has."""
    return CorruptObject(
        f"The bytes of sha256:{digest} are missing from {place}: export the scene again."
    )


def _no_export(place: str, error: Exception) -> RegistryError:
    if isinstance(error, PermissionError):
        return StorageUnavailable(f"{place} cannot be read: check its permissions.")
    return InvalidUpload(
        f"{place} holds no {MANIFEST}, so it is no export, or an interrupted one: run "
        "`registry export` again."
    )


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _scene(entry: Mapping[str, Any]) -> SceneEntry:
    versions = [_version(fields) for fields in entry["versions"]]
    history = [_move(fields) for fields in entry["history"]]
    numbers = [version.number for version in versions]
    latest = int(entry["latest"])
    known = set(numbers)
    sound = (
        numbers == sorted(known)
        and max(numbers, default=0) <= latest
        and all(move.number in known and move.previous != move.number for move in history)
        and all(move.undoes is None or 0 <= move.undoes < k for k, move in enumerate(history))
    )
    if not sound:
        raise ValueError(f"the versions and moves of {entry['name']!r} do not add up")
    return SceneEntry(
        name=check_scene(entry["name"]),
        created=_moment(entry["created"]),
        latest=latest,
        versions=versions,
        aliases={check_alias(name): int(number) for name, number in entry["aliases"].items()},
        history=history,
        protected=[check_alias(name) for name in entry["protected"]],
    )


def _version(fields: Mapping[str, Any]) -> VersionEntry:
    digest = str(fields["digest"])
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError(f"the digest {digest[:80]!r} is none")
    tags = check_tags(fields["tags"])
    return VersionEntry(
        number=check_number(int(fields["number"])),
        digest=digest,
        size_bytes=int(fields["size_bytes"]),
        created=_moment(fields["created"]),
        created_by=str(fields["created_by"]),
        retired=fields["retired"] and _moment(fields["retired"]),
        swept=fields["swept"] and _moment(fields["swept"]),
        parent=None if fields["parent"] is None else check_number(int(fields["parent"])),
        tags={key: value for key, value in tags.items() if value is not None},
        metrics=check_metrics(fields["metrics"]),
    )


def _move(fields: Mapping[str, Any]) -> MoveEntry:
    return MoveEntry(
        alias=check_alias(fields["alias"]),
        previous=None if fields["previous"] is None else int(fields["previous"]),
        number=int(fields["number"]),
        action=str(fields["action"])[:20],
        undoes=None if fields["undoes"] is None else int(fields["undoes"]),
        moved=_moment(fields["moved"]),
        moved_by=str(fields["moved_by"]),
    )


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"the time {text[:40]!r} has no zone")
    return moment
