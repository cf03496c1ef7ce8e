"""Events of the outbox, delivered to HTTP endpoints: signed, at least once, retried.

Signatures follow Standard Webhooks (https://www.standardwebhooks.com): the headers `webhook-id`,
`webhook-timestamp` and `webhook-signature: v1,<base64 of HMAC-SHA256>` over
`<id>.<timestamp>.<body>`. The id is the same for every attempt.

An event is claimed by moving its next attempt into the future before it is sent. So couriers may
run side by side, and one that dies leaves its events to the others.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
from sqlalchemy import or_, select, update

from registry.errors import InvalidReference, SignatureRefused
from registry.events import Event, event_of
from registry.schema import outbox

if TYPE_CHECKING:
    from registry.registry import Registry

SECRET_PREFIX = "whsec_"
SECRET_VARIABLE = "REALFILL_WEBHOOK_SECRET"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
TOLERANCE_S = 300
TIMEOUT_S = 10.0
# Longer than all endpoints together may take, or an event would be sent twice for nothing.
CLAIM_S = 120.0
FIRST_RETRY_S = 5.0
LONGEST_RETRY_S = 6 * 3600.0
# With the pauses above, the last attempt comes about two days after the first.
MAX_ATTEMPTS = 20
BATCH = 20
FAILURE_LENGTH = 500


def sign(message_id: str, timestamp: int, body: bytes, secrets: Sequence[str]) -> str:
    """The header `webhook-signature`: one signature for each secret, so that they can be changed.

    Raises:
        InvalidReference: A secret is malformed.
    """
    signed = f"{message_id}.{timestamp}.".encode() + body
    digests = [hmac.digest(_key(secret), signed, hashlib.sha256) for secret in secrets]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def verify(
    headers: Mapping[str, str], body: bytes, secret: str, *, now: datetime | None = None
) -> None:
    """What a receiver does first with a request.

    Args:
        headers: Of the request, names in lower case.
        body: The bytes as they came.
        now: Present time; a signature counts for five minutes.

    Raises:
        SignatureRefused: The headers are missing, too old, or not made with this secret.
    """
    message_id = headers.get("webhook-id", "")
    text = headers.get("webhook-timestamp", "")
    at = int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else 0
    age_s = abs((now or datetime.now(UTC)).timestamp() - at)
    if not message_id or age_s > TOLERANCE_S:
        raise SignatureRefused(
            f"The webhook {message_id[:80]!r} is {age_s:.0f} s off or lacks its headers: check "
            "the clocks of both machines, and drop it."
        )
    expected = sign(message_id, at, body, [secret])
    given = headers.get("webhook-signature", "").split(" ")
    # Compared as bytes, since headers may hold any character.
    if not any(hmac.compare_digest(expected.encode(), one.encode()) for one in given):
        raise SignatureRefused(
            f"The webhook {message_id[:80]!r} was not signed with this secret: drop it, and "
            "compare the secrets if it should have been."
        )


@dataclass(frozen=True, slots=True)
class Delivery:
    """What became of one event in one round.

    Args:
        failure: Why it will be sent again, or None where every endpoint took it.
        due: When it will be sent again; None where it was delivered or given up.
    """

    event: Event
    failure: str | None
    due: datetime | None


class Courier:
    """Takes events to endpoints, round by round.

    Args:
        endpoints: URLs; each gets every event.
        secrets: `whsec_<base64>`; several while an old one is being replaced.
        client: HTTP client; by default one that follows no redirects.
        clock: Present time, in UTC.
        jitter: A number in [0, 1), so that retries of many couriers spread.

    Raises:
        InvalidReference: An endpoint or a secret is malformed, or there is none.
    """

    def __init__(
        self,
        registry: Registry,
        endpoints: Sequence[str],
        secrets: Sequence[str],
        *,
        client: httpx.Client | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        jitter: Callable[[], float] = random.random,
    ) -> None:
        for endpoint in endpoints:
            _check_endpoint(endpoint)
        if not endpoints or not secrets:
            raise InvalidReference(
                f"Webhooks need an endpoint and a secret: name a URL, and set {SECRET_VARIABLE} "
                f"to {SECRET_PREFIX} and 24 to 64 random bytes in base64."
            )
        sign("check", 0, b"", secrets)
        self._registry = registry
        self._endpoints = tuple(endpoints)
        self._secrets = tuple(secrets)
        self._client = client or httpx.Client(timeout=TIMEOUT_S)
        self._clock = clock
        self._jitter = jitter
        # Endpoints that took an event which others refused: they are not asked again.
        self._taken: dict[int, set[str]] = {}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def round(self) -> list[Delivery]:
        """Send what is due once, and say what became of it.

        Raises:
            StorageUnavailable: The database does not answer.
        """
        return [self._deliver(event) for event in self._claim()]

    def _claim(self) -> list[Event]:
        """Events that are due, put off so that nobody else sends them meanwhile."""
        now = self._clock()
        open_ = (
            outbox.c.delivered.is_(None)
            & (outbox.c.attempts < MAX_ATTEMPTS)
            & or_(outbox.c.due.is_(None), outbox.c.due <= now)
        )
        found = select(outbox).where(open_).order_by(outbox.c.id).limit(BATCH)
        with self._registry.database.writing() as connection:
            rows = connection.execute(found.with_for_update(skip_locked=True)).all()
            for k, row in enumerate(rows):
                # They are sent one after the other, so that the last waits for all before it.
                due = now + timedelta(seconds=CLAIM_S * (k + 1))
                connection.execute(
                    update(outbox)
                    .where(outbox.c.id == row.id)
                    .values(due=due, attempts=row.attempts + 1)
                )
        return [event_of(row) for row in rows]

    def _deliver(self, event: Event) -> Delivery:
        taken = self._taken.setdefault(event.id, set())
        failures = []
        for endpoint in self._endpoints:
            if endpoint in taken:
                continue
            failure = self._post(endpoint, event)
            if failure is None:
                taken.add(endpoint)
            else:
                failures.append(f"{_shown(endpoint)}: {failure}")
        return self._note(event, "; ".join(failures)[:FAILURE_LENGTH] or None)

    def _post(self, endpoint: str, event: Event) -> str | None:
        """Send one event; why it was not taken, or None."""
        timestamp = int(self._clock().timestamp())
        body = event.payload
        headers = {
            "content-type": "application/json",
            "user-agent": "realfill-registry",
            "webhook-id": event.message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(event.message_id, timestamp, body, self._secrets),
        }
        try:
            answer = self._client.post(endpoint, content=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return f"{type(error).__name__}: {error}"
        return None if answer.is_success else f"answered {answer.status_code}"

    def _note(self, event: Event, failure: str | None) -> Delivery:
        now, attempts = self._clock(), event.attempts + 1
        due = None
        if failure is not None and attempts < MAX_ATTEMPTS:
            due = now + timedelta(seconds=retry_s(attempts, self._jitter()))
        values = {"failure": failure, "due": due, "delivered": now if failure is None else None}
        with self._registry.database.writing() as connection:
            here = (outbox.c.id == event.id) & outbox.c.delivered.is_(None)
            connection.execute(update(outbox).where(here).values(**values))
        if due is None:
            self._taken.pop(event.id, None)
        return Delivery(event, failure, due)


def send_again(registry: Registry) -> int:
    """Let events that were given up be sent again from the start; their count."""
    lost = outbox.c.delivered.is_(None) & (outbox.c.attempts >= MAX_ATTEMPTS)
    with registry.database.writing() as connection:
        done = connection.execute(update(outbox).where(lost).values(attempts=0, due=None))
    return done.rowcount


def retry_s(attempts: int, jitter: float) -> float:
    """Pause after so many failed attempts: doubled each time, and up to a quarter longer."""
    return min(FIRST_RETRY_S * 2.0 ** (attempts - 1), LONGEST_RETRY_S) * (1 + jitter / 4)


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise InvalidReference(
            f"The webhook secret is malformed: write {SECRET_PREFIX} and {MIN_SECRET_BYTES} to "
            f"{MAX_SECRET_BYTES} random bytes in base64, as `openssl rand -base64 32` prints them."
        )
    return key


def _check_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidReference(
            f"The webhook endpoint {endpoint[:200]!r} is no address: write it like "
            "https://host/path."
        )


def _shown(endpoint: str) -> str:
    """The endpoint without what may be secret in it: a password, a query."""
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"
