"""Claims of those who serve a version: while held, it is neither retired nor swept.

A claim expires unless it is renewed, so that a service that died holds nothing for long.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import Connection, delete, insert, select

from registry.errors import LeaseLost
from registry.records import Lease
from registry.schema import blobs, leases


def hold(
    connection: Connection, digests: Collection[str], holder: str, at: datetime, expires: datetime
) -> list[Lease]:
    """Claim the bytes, or renew the holder's claims on them: all of them or none.

    Raises:
        LeaseLost: A sweep or an erasure took some of them.
    """
    wanted = sorted(set(digests))
    # Whoever locks several does it in the order of their digests: then nobody waits in a ring.
    kept = connection.execute(
        select(blobs.c.digest)
        .where(blobs.c.digest.in_(wanted), blobs.c.given_up.is_(None))
        .order_by(blobs.c.digest)
        .with_for_update()
    ).scalars()
    lost = sorted(set(wanted) - set(kept))
    if lost:
        raise LeaseLost(
            f"The bytes sha256:{lost[0]} cannot be held: the registry gave them up for removal or "
            "never had them. Resolve the scene again and fetch what it points to now."
        )
    connection.execute(delete(leases).where(leases.c.holder == holder, leases.c.digest.in_(wanted)))
    claims = [Lease(digest, holder, at, expires) for digest in wanted]
    if claims:
        rows = [
            {"digest": digest, "holder": holder, "taken": at, "expires": expires}
            for digest in wanted
        ]
        connection.execute(insert(leases), rows)
    return claims


def release(connection: Connection, holder: str, digests: Collection[str] | None) -> int:
    """Give up the holder's claims on these bytes, or with None on all; the count given up."""
    mine = leases.c.holder == holder
    if digests is not None:
        mine &= leases.c.digest.in_(sorted(digests))
    return connection.execute(delete(leases).where(mine)).rowcount


def holders(connection: Connection, digest: str, at: datetime) -> list[str]:
    """Who holds the bytes at this moment."""
    claims = select(leases.c.holder).where(leases.c.digest == digest, leases.c.expires > at)
    return list(connection.execute(claims.order_by(leases.c.holder)).scalars())


def claims_of(connection: Connection, at: datetime) -> list[Lease]:
    """Every claim that has not expired, by digest and holder."""
    rows = connection.execute(
        select(leases).where(leases.c.expires > at).order_by(leases.c.digest, leases.c.holder)
    )
    return [Lease(**row._mapping) for row in rows]
