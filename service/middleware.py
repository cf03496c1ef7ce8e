"""The two pure ASGI layers around the routes: one request's record, and the limit of its body.

Neither lets an exception escape: above the app sits BentoML's timeout, which waits for a first
byte that would never come.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge, status_of
from service.metrics import Metrics

log = logging.getLogger("service.requests")

_RECORD = "realfill.record"
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# A client that has nearly sent its body reads our answer only after the rest; beyond this factor
# of the limit, or this time, the connection is closed on it.
_DRAIN_FACTOR = 4
_DRAIN_S = 10.0


@dataclass
class RequestRecord:
    """What one request's log line says; handlers add ``fields``."""

    request_id: str
    fields: dict[str, Any] = field(default_factory=dict)


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that a scope belongs to."""
    record: RequestRecord = scope[_RECORD]
    return record


def error_response(
    error: Exception, request_id: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """The one error shape; an error that is none of ours does not show its text."""
    code = getattr(error, "code", None)
    message = str(error)
    if code is None:
        code = "internal_error"
        message = "The service failed unexpectedly: look for this request_id in its log."
    return fault_response(status_of(error), str(code), message, request_id, headers)


def fault_response(
    status: int, code: str, message: str, request_id: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """The one error shape, from its parts."""
    fault = {"code": code, "message": message, "request_id": request_id}
    return JSONResponse({"error": fault}, status_code=status, headers=headers)


class RecordRequests:
    """Gives each request an id, answers what nobody caught, logs one line, counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        asked = Headers(scope=scope).get("x-request-id", "")
        record = RequestRecord(asked if _SAFE_ID.fullmatch(asked) else uuid.uuid4().hex)
        scope[_RECORD] = record
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            log.exception("unhandled", extra={"fields": {"request_id": record.request_id}})
            if status == 0:
                await _send_quietly(error_response(error, record.request_id), scope, send_with_id)
        finally:
            self._finish(scope, record, status, time.perf_counter() - started)

    def _finish(self, scope: Scope, record: RequestRecord, status: int, seconds: float) -> None:
        # Empty where only the mount that this app hangs on matched.
        route = getattr(scope.get("route"), "path", "") or "unmatched"
        self.metrics.count_request(scope["method"], route, status, seconds)
        level = logging.DEBUG if route in ("/livez", "/readyz", "/metrics") else logging.INFO
        fields = {
            "request_id": record.request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "total_ms": round(seconds * 1000, 1),
            **record.fields,
        }
        log.log(level, "request", extra={"fields": fields})


class LimitBody:
    """Answers 413 itself, for a declared length as for a body that only turns out too long."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse its body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.max_body_bytes:
            # A client that waits for "100 Continue" has sent nothing yet and need not.
            if "expect" not in headers:
                await self._drain(receive)
            await self._refuse(scope, send)
            return
        await self._count(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        received, more, started = 0, True, False

        async def counted() -> Message:
            nonlocal received, more
            message = await receive()
            received += len(message.get("body", b""))
            more = message.get("more_body", False)
            if received > self.max_body_bytes:
                raise BodyTooLarge(f"more than {self.max_body_bytes} bytes")
            return message

        async def unless_refused(message: Message) -> None:
            nonlocal started
            if received > self.max_body_bytes and not started:
                return
            started = True
            await send(message)

        try:
            await self.app(scope, counted, unless_refused)
        except Exception:
            if received <= self.max_body_bytes:
                raise
        if received > self.max_body_bytes and not started:
            if more:
                await self._drain(receive)
            await self._refuse(scope, send)

    async def _drain(self, receive: Receive) -> None:
        left = self.max_body_bytes * _DRAIN_FACTOR
        try:
            async with asyncio.timeout(_DRAIN_S):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return
        except TimeoutError:
            return

    async def _refuse(self, scope: Scope, send: Send) -> None:
        error = BodyTooLarge(
            f"The request body is above the limit of {self.max_body_bytes} bytes: send smaller "
            "images, or raise REALFILL_MAX_BODY_BYTES."
        )
        response = error_response(error, record_of(scope).request_id, {"Connection": "close"})
        await _send_quietly(response, scope, send)


async def _send_quietly(response: JSONResponse, scope: Scope, send: Send) -> None:
    """Send an answer that must not fail, whoever is still there to read it."""
    try:
        await response(scope, _nothing_more, send)
    except Exception:
        log.debug("the client left before the answer", exc_info=True)


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, logger, event, and the record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr() -> None:
    """Let the service's INFO lines reach stderr, whatever level the root logger has."""
    logger = logging.getLogger("service")
    if not any(isinstance(handler.formatter, JsonLines) for handler in logger.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
