"""Which endpoint took which event: what is owed to each, and how far it came.

An endpoint is known by its address, without password and query, which may be secret. From the
moment it is known, every event is owed to it by a row, in the event's own transaction. A row is
claimed by moving its next attempt into the future before the event is sent. So couriers may run
side by side, and one that dies leaves its events to the others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from sqlalchemy import ColumnElement, Connection, delete, func, insert, literal, select, update
from sqlalchemy import text as sql

from registry.database import Database
from registry.errors import InvalidReference, NotFound
from registry.events import Event, event_of
from registry.schema import ADDRESS_LENGTH, FAILURE_LENGTH, UNNAMED, deliveries, endpoints, outbox

# Longer than one event may take, or it would be sent twice for nothing.
CLAIM_S = 120.0
# With the courier's pauses, the last attempt comes about two days after the first.
MAX_ATTEMPTS = 20
BATCH = 20

_OPEN = deliveries.c.delivered.is_(None)
_LOST = _OPEN & (deliveries.c.attempts >= MAX_ATTEMPTS)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event on its way to one endpoint.

    Args:
        endpoint: Address.
        attempts: How often it was sent, this time included.
        failure: Why it was not taken, or None where it was.
        due: When it will be sent again; None where it was delivered or given up.
    """

    event: Event
    endpoint: str
    attempts: int
    failure: str | None = None
    due: datetime | None = None


@dataclass(frozen=True, slots=True)
class EndpointState:
    """How far an endpoint came.

    Args:
        endpoint: Address.
        delivered: Count of events that it took.
        waiting: Count of events that will be sent, or sent again.
        given_up: Count of events that wait for a person.
        failure: Why the newest event that failed was not taken; None where none failed.
    """

    endpoint: str
    delivered: int
    waiting: int
    given_up: int
    failure: str | None


def address_of(url: str) -> str:
    """The URL without what may be secret in it: a password, a query.

    Raises:
        InvalidReference: It is no address of a web server, or too long.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        # Such as a bracket that is not closed: as wrong as no address at all.
        parts = urlsplit("")
    host = parts.netloc.rpartition("@")[2].lower()
    address = f"{parts.scheme}://{host}{parts.path or '/'}"
    if parts.scheme not in ("http", "https") or not parts.hostname or len(address) > ADDRESS_LENGTH:
        raise InvalidReference(
            f"The webhook endpoint {url[:200]!r} is no address: write it like https://host/path, "
            f"in at most {ADDRESS_LENGTH} characters."
        )
    return address


def enlist(
    database: Database, addresses: Sequence[str], *, from_start: bool = False
) -> tuple[str, ...]:
    """Make endpoints known; those that are new are owed every event from now on.

    Args:
        from_start: Owe the new ones what happened before as well.

    Returns:
        The new ones.
    """
    with database.reading() as connection:
        if _known(connection, addresses) == set(addresses):
            return ()
    with database.writing() as connection:
        _hold_events(connection)
        known = _known(connection, addresses)
        new = tuple(address for address in addresses if address not in known)
        if new:
            connection.execute(insert(endpoints), [{"address": address} for address in new])
            if not _inherit(connection, new) and from_start:
                _owe_all(connection, new)
    return new


def claim(database: Database, address: str, now: datetime) -> list[Delivery]:
    """Events that are due at the endpoint, put off so that nobody else sends them meanwhile."""
    here = select(endpoints.c.id).where(endpoints.c.address == address).scalar_subquery()
    ripe = deliveries.c.due.is_(None) | (deliveries.c.due <= now)
    found = (
        select(outbox, deliveries.c.endpoint_id, deliveries.c.attempts)
        .join_from(outbox, deliveries, deliveries.c.event_id == outbox.c.id)
        .where(deliveries.c.endpoint_id == here, _OPEN, ~_LOST, ripe)
        .order_by(deliveries.c.event_id)
        .limit(BATCH)
        .with_for_update(skip_locked=True, of=deliveries)
    )
    with database.writing() as connection:
        rows = connection.execute(found).all()
        for k, row in enumerate(rows):
            # They are sent one after the other, so that the last waits for all before it.
            due = now + timedelta(seconds=CLAIM_S * (k + 1))
            connection.execute(
                update(deliveries)
                .where(deliveries.c.endpoint_id == row.endpoint_id, deliveries.c.event_id == row.id)
                .values(due=due, attempts=row.attempts + 1)
            )
    return [Delivery(event_of(row), address, row.attempts + 1) for row in rows]


def note(database: Database, delivery: Delivery, now: datetime) -> None:
    """Write down what became of a claimed event, unless another courier delivered it meanwhile."""
    failure = delivery.failure and delivery.failure[:FAILURE_LENGTH]
    delivered = now if failure is None else None
    here = _at([delivery.endpoint]) & (deliveries.c.event_id == delivery.event.id) & _OPEN
    with database.writing() as connection:
        connection.execute(
            update(deliveries)
            .where(here)
            .values(failure=failure, due=delivery.due, delivered=delivered)
        )


def send_again(database: Database, addresses: Collection[str]) -> int:
    """Let events that these endpoints never took be sent again from the start; their count."""
    with database.writing() as connection:
        lost = update(deliveries).where(_at(addresses), _LOST)
        return connection.execute(lost.values(attempts=0, due=None)).rowcount


def forget(database: Database, addresses: Sequence[str]) -> None:
    """Owe these endpoints nothing any more.

    Raises:
        NotFound: One of them is not known; nothing was changed.
    """
    with database.writing() as connection:
        _hold_events(connection)
        _check_known(connection, addresses)
        connection.execute(delete(deliveries).where(_at(addresses)))
        connection.execute(delete(endpoints).where(endpoints.c.address.in_(addresses)))


def states(database: Database, addresses: Sequence[str] = ()) -> list[EndpointState]:
    """How far these endpoints came, by default all, in the order of their addresses.

    Raises:
        NotFound: One of them is not known.
    """
    count = func.count(deliveries.c.event_id)
    newest_failed = func.max(deliveries.c.event_id).filter(_OPEN, deliveries.c.failure.is_not(None))
    counts = (
        select(
            endpoints.c.id,
            endpoints.c.address,
            count.filter(~_OPEN).label("delivered"),
            count.filter(_OPEN, ~_LOST).label("waiting"),
            count.filter(_LOST).label("given_up"),
            newest_failed.label("failed"),
        )
        .outerjoin_from(endpoints, deliveries, deliveries.c.endpoint_id == endpoints.c.id)
        .group_by(endpoints.c.id, endpoints.c.address)
        .subquery()
    )
    last = (deliveries.c.endpoint_id == counts.c.id) & (deliveries.c.event_id == counts.c.failed)
    found = select(counts, deliveries.c.failure).outerjoin_from(counts, deliveries, last)
    if addresses:
        found = found.where(counts.c.address.in_(addresses))
    with database.reading() as connection:
        _check_known(connection, addresses)
        rows = connection.execute(found.order_by(counts.c.address)).all()
    return [
        EndpointState(row.address, row.delivered, row.waiting, row.given_up, row.failure)
        for row in rows
    ]


def _hold_events(connection: Connection) -> None:
    """Wait for events that are being written, and hold back new ones until the transaction ends.

    Then each sees the endpoints as they will be. SQLite has one writer at a time already.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sql("LOCK TABLE outbox IN SHARE ROW EXCLUSIVE MODE"))


def _inherit(connection: Connection, new: Sequence[str]) -> bool:
    """Hand the new endpoints what revision 0002 owed to endpoints whose names it did not keep."""
    unnamed = connection.execute(
        select(endpoints.c.id).where(endpoints.c.address == UNNAMED)
    ).scalar_one_or_none()
    if unnamed is None:
        return False
    kept = [deliveries.c[name] for name in ("attempts", "due", "failure", "delivered")]
    owed = (
        select(endpoints.c.id, deliveries.c.event_id, *kept)
        .join_from(endpoints, deliveries, deliveries.c.endpoint_id == unnamed)
        .where(endpoints.c.address.in_(new))
    )
    names = ["endpoint_id", "event_id", *(column.name for column in kept)]
    connection.execute(insert(deliveries).from_select(names, owed))
    connection.execute(delete(deliveries).where(deliveries.c.endpoint_id == unnamed))
    connection.execute(delete(endpoints).where(endpoints.c.id == unnamed))
    return True


def _owe_all(connection: Connection, new: Sequence[str]) -> None:
    every = select(endpoints.c.id, outbox.c.id, literal(0))
    owed = every.join_from(endpoints, outbox, endpoints.c.address.in_(new))
    names = ["endpoint_id", "event_id", "attempts"]
    connection.execute(insert(deliveries).from_select(names, owed))


def _at(addresses: Collection[str]) -> ColumnElement[bool]:
    chosen = select(endpoints.c.id).where(endpoints.c.address.in_(addresses))
    return deliveries.c.endpoint_id.in_(chosen)


def _known(connection: Connection, addresses: Sequence[str]) -> set[str]:
    found = select(endpoints.c.address).where(endpoints.c.address.in_(addresses))
    return set(connection.execute(found).scalars())


def _check_known(connection: Connection, addresses: Sequence[str]) -> None:
    unknown = set(addresses) - _known(connection, addresses)
    if unknown:
        raise NotFound(
            f"There is no endpoint {min(unknown)} in the registry: `registry deliver --status` "
            "lists them."
        )
