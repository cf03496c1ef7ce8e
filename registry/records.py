"""What the registry answers with, and how text names a version.

A reference is one of

    tower              the version that the alias "live" of the scene points to
    tower@candidate    the version that another alias points to
    tower@3            version 3
    sha256:<64 hex>    the version with these bytes, in whichever scene
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from registry.errors import InvalidReference
from registry.schema import VALUE_LENGTH

LIVE = "live"
DIGEST_PREFIX = "sha256:"
MAX_NUMBER = 999_999_999

_SCENE = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,62}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable, numbered adapter of a scene.

    Args:
        number: 1 for the first version of the scene, never used twice.
        digest: SHA-256 of the capsule file, 64 hex digits: its identity.
        tensor_digest: SHA-256 of the tensor region: equal weights, whatever the header says.
        metadata: The header's `__metadata__`; its JSON values are decoded.
        aliases: Names that point here at this moment, sorted.
        retired: When the version was hidden, or None while it can be served.
        parent: Number of the version that training began from, if any.
        tags: What people say of it, by key.
        metrics: What was measured of it, by name.
        swept: When its bytes were given up for removal, or None while they are kept.
    """

    scene: str
    number: int
    digest: str
    tensor_digest: str
    size_bytes: int
    base: str
    base_fingerprint: str
    rank: int
    created: datetime
    created_by: str
    metadata: Mapping[str, Any]
    aliases: tuple[str, ...]
    retired: datetime | None = None
    parent: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    swept: datetime | None = None

    @property
    def reference(self) -> str:
        """The text that will always name this version, such as `tower@3`."""
        return f"{self.scene}@{self.number}"

    @property
    def etag(self) -> str:
        """The digest as an HTTP entity tag: it changes when an alias comes to mean other bytes."""
        return f'"{DIGEST_PREFIX}{self.digest}"'


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the versions that a search found, newest first.

    Args:
        after: What to pass as `after` for the next page; None on the last.
    """

    versions: tuple[Version, ...]
    after: str | None


@dataclass(frozen=True, slots=True)
class Scene:
    """One place and what the registry holds of it.

    Args:
        latest: Highest version number ever given, retired versions included.
        versions: Count of the versions that are not retired.
        aliases: Alias to version number, sorted by alias.
    """

    name: str
    created: datetime
    latest: int
    versions: int
    aliases: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One step of an alias from a version to another.

    Args:
        previous: Number the alias left; None where it was created.
        number: Number it points to since.
        action: publish, alias, promote or rollback.
    """

    scene: str
    alias: str
    previous: int | None
    number: int
    action: str
    moved: datetime
    moved_by: str


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that `Registry.verify` found wrong.

    Args:
        code: corrupt_object (bytes), altered_row (database) or dangling_alias.
        thing: What it was found on, such as `tower@3`.
        message: What is wrong and what to do.
    """

    code: str
    thing: str
    message: str


@dataclass(frozen=True, slots=True)
class Lease:
    """One holder's claim on a version's bytes: until it expires they are neither swept nor retired.

    Args:
        holder: Who serves them, such as a host and a process.
    """

    digest: str
    holder: str
    taken: datetime
    expires: datetime


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep did, or with `dry_run` would do. Digests of 64 hex digits, sorted.

    Args:
        marked: Blobs that nothing refers to, seen for the first time: the grace period begins.
        spared: Blobs that were marked and are referred to again.
        removed: Blobs whose grace period was over.
        removed_bytes: Their size.
        torn: Half-written files of interrupted uploads, removed too.
    """

    dry_run: bool
    marked: tuple[str, ...]
    spared: tuple[str, ...]
    removed: tuple[str, ...]
    removed_bytes: int
    torn: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What remains of a scene that was erased.

    Args:
        last_number: Count of the versions it ever had.
    """

    scene: str
    last_number: int
    erased: datetime
    erased_by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Erasure:
    """What the erasure of a scene did.

    Args:
        removed: Digests whose bytes are gone.
        shared: Digests that other scenes hold too; their bytes stay for those.
    """

    tombstone: Tombstone
    removed: tuple[str, ...]
    shared: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference: a digest, or a scene with either an alias or a number."""

    scene: str | None = None
    alias: str | None = None
    number: int | None = None
    digest: str | None = None

    @staticmethod
    def parse(text: str) -> Reference:
        """Read a reference.

        Raises:
            InvalidReference: The text has none of the four forms.
        """
        if text.startswith(DIGEST_PREFIX):
            digest = text.removeprefix(DIGEST_PREFIX)
            if not _HEX.fullmatch(digest):
                raise InvalidReference(
                    f"The reference {_quote(text)} is no digest: write sha256: and the 64 "
                    "lower-case hex digits that `registry show` prints."
                )
            return Reference(digest=digest)
        name, at, rest = text.partition("@")
        scene = check_scene(name)
        if not at:
            return Reference(scene=scene, alias=LIVE)
        if rest[:1].isdigit():
            if not _NUMBER.fullmatch(rest):
                raise InvalidReference(
                    f"The reference {_quote(text)} has no version number after the @: "
                    "write it like tower@3, counting from 1."
                )
            return Reference(scene=scene, number=int(rest))
        return Reference(scene=scene, alias=check_alias(rest))


def check_scene(name: str) -> str:
    """Return the scene name, or raise InvalidReference with the rule it breaks."""
    if not _SCENE.fullmatch(name):
        raise InvalidReference(
            f"The scene name {_quote(name)} is not allowed: use 1 to 63 of a-z, 0-9, dot, "
            "underscore and hyphen, and begin with a letter or digit."
        )
    return name


def check_alias(name: str) -> str:
    """Return the alias, or raise InvalidReference with the rule it breaks."""
    if not _ALIAS.fullmatch(name):
        raise InvalidReference(
            f"The alias {_quote(name)} is not allowed: use 1 to 63 of a-z, 0-9, dot, "
            "underscore and hyphen, and begin with a letter, so that it cannot be taken "
            "for a version number."
        )
    return name


def check_number(number: int) -> int:
    """Return the version number, or raise InvalidReference when none can have it."""
    if not 1 <= number <= MAX_NUMBER:
        raise InvalidReference(
            f"The version number {number} is not allowed: versions count from 1 to {MAX_NUMBER}."
        )
    return number


def check_tags(tags: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the tags, or raise InvalidReference with the rule one breaks."""
    for key, value in tags.items():
        check_label(key)
        storable = value is None or (len(value) <= VALUE_LENGTH and value.isprintable())
        if not storable or value == "":
            raise InvalidReference(
                f"The value of the tag {key!r} is not allowed: use 1 to {VALUE_LENGTH} printable "
                "characters."
            )
    return dict(tags)


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics, or raise InvalidReference with the rule one breaks."""
    for name, value in metrics.items():
        check_label(name)
        if not math.isfinite(value):
            raise InvalidReference(
                f"The metric {name!r} is {value}: only finite numbers can be compared."
            )
    return {name: float(value) for name, value in metrics.items()}


def check_label(name: str) -> str:
    """Return the key of a tag or the name of a metric, or raise InvalidReference."""
    if not _ALIAS.fullmatch(name):
        raise InvalidReference(
            f"The label {_quote(name)} is not allowed: use 1 to 63 of a-z, 0-9, dot, underscore "
            "and hyphen, and begin with a letter."
        )
    return name


def _quote(text: str) -> str:
    """The text in quotes, without control characters and not endless."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
