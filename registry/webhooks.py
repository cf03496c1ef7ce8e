"""Events of the outbox, delivered to HTTP endpoints: signed, at least once, retried.

Signatures follow Standard Webhooks (https://www.standardwebhooks.com): the headers `webhook-id`,
`webhook-timestamp` and `webhook-signature: v1,<base64 of HMAC-SHA256>` over
`<id>.<timestamp>.<body>`. The id is the same for every attempt.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import httpx

from registry.deliveries import MAX_ATTEMPTS, Delivery, address_of, claim, enlist, note
from registry.errors import InvalidReference, SignatureRefused
from registry.events import Event

if TYPE_CHECKING:
    from registry.registry import Registry

SECRET_PREFIX = "whsec_"
SECRET_VARIABLE = "REALFILL_WEBHOOK_SECRET"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
TOLERANCE_S = 300
TIMEOUT_S = 10.0
FIRST_RETRY_S = 5.0
LONGEST_RETRY_S = 6 * 3600.0


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


class Courier:
    """Takes events to endpoints, round by round.

    Args:
        endpoints: URLs; each gets every event that comes after it was first named.
        secrets: `whsec_<base64>`; several while an old one is being replaced.
        from_start: Send endpoints that are new what happened before as well.
        client: HTTP client; by default one that follows no redirects.
        clock: Present time, in UTC.
        jitter: A number in [0, 1), so that retries of many couriers spread.

    Attributes:
        new: Addresses that the registry did not know before.

    Raises:
        InvalidReference: An endpoint or a secret is malformed, there is none, or two endpoints
            have one address.
        StorageUnavailable: The database does not answer.
    """

    def __init__(
        self,
        registry: Registry,
        endpoints: Sequence[str],
        secrets: Sequence[str],
        *,
        from_start: bool = False,
        client: httpx.Client | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if not endpoints or not secrets:
            raise InvalidReference(
                f"Webhooks need an endpoint and a secret: name a URL, and set {SECRET_VARIABLE} "
                f"to {SECRET_PREFIX} and 24 to 64 random bytes in base64."
            )
        sign("check", 0, b"", secrets)
        self._urls = _by_address(endpoints)
        self._database = registry.database
        self._secrets = tuple(secrets)
        self._client = client or httpx.Client(timeout=TIMEOUT_S)
        self._clock = clock
        self._jitter = jitter
        self.new = enlist(self._database, tuple(self._urls), from_start=from_start)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def round(self) -> list[Delivery]:
        """Send each endpoint what is due there once, and say what became of it.

        Raises:
            StorageUnavailable: The database does not answer.
        """
        return [
            self._deliver(url, claimed)
            for address, url in self._urls.items()
            for claimed in claim(self._database, address, self._clock())
        ]

    def _deliver(self, url: str, claimed: Delivery) -> Delivery:
        failure = self._post(url, claimed.event)
        now = self._clock()
        due: datetime | None = None
        if failure is not None and claimed.attempts < MAX_ATTEMPTS:
            due = now + timedelta(seconds=retry_s(claimed.attempts, self._jitter()))
        delivery = replace(claimed, failure=failure, due=due)
        note(self._database, delivery, now)
        return delivery

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


def _by_address(urls: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for url in urls:
        address = address_of(url)
        if found.setdefault(address, url) != url:
            raise InvalidReference(
                f"Two webhook endpoints have the address {address}, by which the registry knows "
                "them: a password or a query does not tell them apart, so give them two paths."
            )
    return found
