"""Removing the bytes that nothing refers to: mark, wait, then remove.

A blob is garbage when every version that has it is retired, or none has it, and no lease holds
it. A sweep marks garbage; one that comes after the grace period gives it up and removes it. What
may be killed at any moment is safe because of the order:

1. The row says that the bytes are given up, in a transaction of its own that holds the row.
2. Then the bytes are removed, the row held again; whoever publishes the same bytes holds it too,
   sees that they were given up, and stores them once more before the transaction ends.
3. Then the row says that they are removed. Without it, the next sweep removes them again; as it
   does where the store has them although the row says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice

from sqlalchemy import ColumnElement, Connection, select, update

from registry.blobs import Blobs
from registry.database import Database
from registry.ledger import insert_if_new, lock_blob, record
from registry.records import Sweep
from registry.schema import blobs, leases, scenes, versions

GRACE = timedelta(days=7)
BATCH = 500


@dataclass(frozen=True)
class Broom:
    """Where one sweep takes place, when, and on whose account."""

    database: Database
    store: Blobs
    at: datetime
    by: str

    def sweep(self, grace: timedelta, *, dry_run: bool) -> Sweep:
        """See `Registry.sweep`."""
        before = self.at - grace
        strangers, returned = self._look_through(dry_run)
        marked = strangers + self._mark(dry_run)
        spared = self._spare(dry_run)
        if dry_run:
            doomed = self._doomed(before) + returned
            doomed += [digest for digest in marked if before >= self.at]
            torn = self.store.torn(before)
        else:
            for digest in self._doomed(before):
                self._give_up(digest, before)
            left = {*self._given_up(), *returned}
            doomed = [digest for digest in left if self.remove(digest)]
            torn = self.store.remove_torn(before)
        sizes = self._sizes(doomed)
        return Sweep(
            dry_run=dry_run,
            marked=tuple(sorted(marked)),
            spared=tuple(sorted(spared)),
            removed=tuple(sorted(doomed)),
            removed_bytes=sum(sizes),
            torn=tuple(sorted(torn)),
        )

    def remove(self, digest: str) -> bool:
        """Remove given-up bytes from the store; False where someone stored them again."""
        with self.database.writing() as connection:
            row = lock_blob(connection, digest)
            if row.given_up is None:
                return False
            self.store.delete(digest)
            connection.execute(
                update(blobs).where(blobs.c.digest == digest).values(removed=self.at)
            )
        return True

    def _look_through(self, dry_run: bool) -> tuple[list[str], list[str]]:
        """Find the bytes in the store that no sweep counts with.

        Returns:
            Bytes without a row, which get a marked one: their publisher died, or is about to
            commit. And bytes that were removed and are back: their publisher was refused.
        """
        strangers: list[str] = []
        returned: list[str] = []
        for page in _pages(self.store.digests(), BATCH):
            found = select(blobs.c.digest, blobs.c.removed).where(blobs.c.digest.in_(page))
            with self.database.reading() as connection:
                removed = {row.digest: row.removed for row in connection.execute(found)}
            fresh = sorted(set(page) - set(removed))
            if fresh and not dry_run:
                self._adopt(fresh)
            strangers += fresh
            returned += [digest for digest in page if removed.get(digest) is not None]
        return strangers, returned

    def _adopt(self, digests: list[str]) -> None:
        """Give a marked row to bytes without one."""
        rows = [
            {"digest": digest, "tensor_digest": "", "size_bytes": 0}
            | {"stored": self.at, "marked": self.at}
            for digest in digests
        ]
        with self.database.writing() as connection:
            insert_if_new(connection, blobs, rows)

    def _mark(self, dry_run: bool) -> list[str]:
        fresh = blobs.c.marked.is_(None) & blobs.c.given_up.is_(None)
        return self._change(fresh & ~self._in_use(), self.at, dry_run)

    def _spare(self, dry_run: bool) -> list[str]:
        waiting = blobs.c.marked.is_not(None) & blobs.c.given_up.is_(None)
        return self._change(waiting & self._in_use(), None, dry_run)

    def _change(
        self, which: ColumnElement[bool], marked: datetime | None, dry_run: bool
    ) -> list[str]:
        chosen = select(blobs.c.digest).where(which).order_by(blobs.c.digest)
        if dry_run:
            with self.database.reading() as connection:
                return list(connection.execute(chosen).scalars())
        with self.database.writing() as connection:
            digests = list(connection.execute(chosen.with_for_update()).scalars())
            for page in _pages(digests, BATCH):
                here = blobs.c.digest.in_(page)
                connection.execute(update(blobs).where(here).values(marked=marked))
        return digests

    def _doomed(self, before: datetime) -> list[str]:
        ripe = (blobs.c.marked <= before) & blobs.c.given_up.is_(None) & ~self._in_use()
        with self.database.reading() as connection:
            return list(connection.execute(select(blobs.c.digest).where(ripe)).scalars())

    def _give_up(self, digest: str, before: datetime) -> None:
        """Decide under the row's lock, because a version or a lease may have come since."""
        with self.database.writing() as connection:
            row = lock_blob(connection, digest)
            still = select(blobs.c.digest).where(blobs.c.digest == digest, ~self._in_use())
            ripe = row.given_up is None and row.marked is not None and row.marked <= before
            if not ripe or connection.execute(still).one_or_none() is None:
                return
            connection.execute(
                update(blobs).where(blobs.c.digest == digest).values(given_up=self.at)
            )
            for scene, number in _versions_of(connection, digest):
                details = {"number": number, "digest": digest}
                record(connection, "version.swept", scene, self.by, self.at, details)

    def _given_up(self) -> list[str]:
        left = blobs.c.given_up.is_not(None) & blobs.c.removed.is_(None)
        with self.database.reading() as connection:
            return list(connection.execute(select(blobs.c.digest).where(left)).scalars())

    def _sizes(self, digests: list[str]) -> Iterator[int]:
        with self.database.reading() as connection:
            for page in _pages(digests, BATCH):
                sizes = select(blobs.c.size_bytes).where(blobs.c.digest.in_(page))
                yield from connection.execute(sizes).scalars()

    def _in_use(self) -> ColumnElement[bool]:
        served = select(versions.c.number).where(
            versions.c.digest == blobs.c.digest, versions.c.retired.is_(None)
        )
        held = select(leases.c.holder).where(
            leases.c.digest == blobs.c.digest, leases.c.expires > self.at
        )
        return served.exists() | held.exists()


def _versions_of(connection: Connection, digest: str) -> list[tuple[str, int]]:
    rows = connection.execute(
        select(scenes.c.name, versions.c.number)
        .join(versions, versions.c.scene_id == scenes.c.id)
        .where(versions.c.digest == digest)
        .order_by(scenes.c.name)
    )
    return [(row.name, row.number) for row in rows]


def _pages(digests: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(digests)
    while page := list(islice(rest, size)):
        yield page
