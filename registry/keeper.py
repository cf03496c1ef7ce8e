"""Looking after what was published: labels, leases, retiring, sweeping, erasing, verifying."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta

from registry import catalog, erasure, ledger, verification
from registry.aliases import Step
from registry.errors import InvalidReference
from registry.leases import hold, release
from registry.reader import Reader
from registry.records import (
    LIVE,
    Erasure,
    Fault,
    Lease,
    Sweep,
    Tombstone,
    Version,
    check_alias,
    check_metrics,
    check_number,
    check_scene,
    check_tags,
)
from registry.sweep import GRACE, Broom

LEASE = timedelta(minutes=5)
MAX_REASON = 500


class Keeper(Reader):
    """Labels, leases and everything that removes."""

    def tag(
        self,
        scene: str,
        number: int,
        tags: Mapping[str, str | None],
        *,
        metrics: Mapping[str, float] | None = None,
        by: str | None = None,
    ) -> Version:
        """Set tags of a version, and metrics with them or not at all.

        Args:
            tags: By key; None as a value removes the tag.
            metrics: As `measure` sets them.

        Raises:
            InvalidReference: A key or a value is not allowed.
            NotFound: There is no such version.
        """
        return self._label(scene, number, check_tags(tags), check_metrics(metrics or {}), by)

    def measure(
        self, scene: str, number: int, metrics: Mapping[str, float], *, by: str | None = None
    ) -> Version:
        """Set metrics of a version, such as a quality measured after training.

        Raises:
            InvalidReference: A name is not allowed, or a value not finite.
            NotFound: There is no such version.
        """
        return self._label(scene, number, {}, check_metrics(metrics), by)

    def _label(
        self,
        scene: str,
        number: int,
        tags: Mapping[str, str | None],
        metrics: Mapping[str, float],
        by: str | None,
    ) -> Version:
        check_number(number)
        with self._database.writing() as connection:
            scene_id = ledger.lock_scene(connection, check_scene(scene))
            step = Step(scene_id, scene, "", number, "label", person(by), self._clock())
            ledger.set_labels(connection, step, tags, metrics)
            return catalog.find_any_version(connection, scene, number)

    def protect(self, scene: str, alias: str = LIVE, *, by: str | None = None) -> None:
        """Guard an alias: from now on it moves only with `override`; or NotFound."""
        self._set_protected(scene, alias, True, by)

    def unprotect(self, scene: str, alias: str = LIVE, *, by: str | None = None) -> None:
        """Lift the guard of an alias, or raise NotFound."""
        self._set_protected(scene, alias, False, by)

    def _set_protected(self, scene: str, alias: str, protected: bool, by: str | None) -> None:
        check_scene(scene)
        check_alias(alias)
        with self._database.writing() as connection:
            scene_id = ledger.lock_scene(connection, scene)
            step = Step(scene_id, scene, alias, 0, "protect", person(by), self._clock())
            ledger.set_protected(connection, step, protected)

    def hold(
        self, digests: Collection[str], holder: str, *, lasting: timedelta = LEASE
    ) -> list[Lease]:
        """Claim the bytes of versions that are served, or renew the claims: all or none.

        Args:
            digests: 64 hex digits each.
            holder: Who serves them; the same at each renewal.
            lasting: When the claims expire unless they are renewed.

        Raises:
            LeaseLost: A sweep or an erasure took some of the bytes.
        """
        with self._database.writing() as connection:
            at = self._clock()
            return hold(connection, digests, person(holder), at, at + lasting)

    def release(self, holder: str, digests: Collection[str] | None = None) -> int:
        """Give up the holder's claims on these bytes, by default on all; the count given up."""
        with self._database.writing() as connection:
            return release(connection, person(holder), digests)

    def retire(self, scene: str, number: int, *, by: str | None = None) -> Version:
        """Hide a version; its number is kept, and its bytes until a sweep.

        Raises:
            NotFound: There is no such version.
            Conflict: An alias points to it, or a lease holds it.
        """
        return self._set_retired(scene, number, self._clock(), by)

    def restore(self, scene: str, number: int, *, by: str | None = None) -> Version:
        """Show a retired version again.

        Raises:
            NotFound: There is no such version.
            Conflict: A sweep removed its bytes.
        """
        return self._set_retired(scene, number, None, by)

    def _set_retired(
        self, scene: str, number: int, retired: datetime | None, by: str | None
    ) -> Version:
        check_scene(scene)
        check_number(number)
        with self._database.writing() as connection:
            scene_id = ledger.lock_scene(connection, scene)
            version = catalog.find_any_version(connection, scene, number)
            if (version.retired is None) != (retired is None):
                at = self._clock()
                ledger.set_retired(connection, scene_id, version, retired, person(by), at)
            return catalog.find_any_version(connection, scene, number)

    def sweep(
        self, *, grace: timedelta = GRACE, dry_run: bool = False, by: str | None = None
    ) -> Sweep:
        """Mark bytes that no version in use and no lease needs, and remove those marked long ago.

        It may be interrupted and repeated at any time, and others may publish meanwhile.

        Args:
            grace: How long bytes stay marked before they are removed.
            dry_run: Only say what would be done.

        Raises:
            StorageUnavailable: The store or the database failed; sweep again.
        """
        return self._broom(by).sweep(grace, dry_run=dry_run)

    def erase(
        self, scene: str, *, reason: str, force: bool = False, by: str | None = None
    ) -> Erasure:
        """Remove a scene for good: versions, aliases, history and bytes; a tombstone remains.

        The name is not given again, and the same bytes are not taken again. Audit rows stay:
        they hold names, numbers, digests and tags, and nothing of the photographs.

        Args:
            reason: Why, for the tombstone.
            force: Even while a service holds a lease on some of it.

        Raises:
            NotFound: There is no such scene.
            Conflict: A lease holds some of its bytes, and force is False.
        """
        if not 1 <= len(reason) <= MAX_REASON or not reason.isprintable():
            raise InvalidReference(
                f"The reason of an erasure must be 1 to {MAX_REASON} printable characters: say "
                "who asked for it or which rule demands it."
            )
        broom = self._broom(by)
        tombstone = Tombstone(check_scene(scene), 0, broom.at, broom.by, reason)
        with self._database.writing() as connection:
            tombstone, alone, shared = erasure.erase_rows(connection, tombstone, force=force)
        self._database.forget()
        for digest in alone:
            broom.remove(digest)
        return Erasure(tombstone, tuple(alone), tuple(shared))

    def tombstone(self, scene: str) -> Tombstone | None:
        """What remains of an erased scene, or None where none of this name was erased."""
        with self._database.reading() as connection:
            return catalog.find_tombstone(connection, check_scene(scene))

    def verify(self, progress: Callable[[Version], None] | None = None) -> list[Fault]:
        """Read every capsule and compare it with its digest and its row; slow, changes nothing.

        Args:
            progress: Called after each version.
        """
        return verification.verify(self, self._database, self._blobs, progress)

    def _broom(self, by: str | None) -> Broom:
        return Broom(self._database, self._blobs, self._clock(), person(by))


def person(by: str | None) -> str:
    """Who does something: the name that was given, or the login name, as a column can hold it."""
    if by is None:
        try:
            by = getpass.getuser()
        except (OSError, KeyError):
            by = "unknown"
    # PostgreSQL takes neither NUL nor half of a surrogate pair.
    return by.encode("utf-8", "replace").decode().replace("\0", "")[:200]
