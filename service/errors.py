"""Everything that the service raises on purpose, and the only table of HTTP statuses.

ServiceError
├── InvalidSettings     a setting that is unknown, out of range or unsafe
├── InvalidRequest      a request whose fields cannot be used as they are
├── InvalidQuery        a query string whose parameters cannot be used as they are
├── UnsupportedMedia    a request body of a kind that the route does not read
├── NotAcceptable       an answer asked for in a form that the route does not write
├── BodyTooLarge        a request body above the limit
├── ImageTooLarge       an image of more pixels than the limit
├── QueueFull           the lane has as much work as it may promise; try later
├── Cancelled           work given up because its client went away
├── DeadlineExceeded    work given up because it took longer than the request's limit
├── EngineClosed        the engine is shutting down or has stopped
├── ServiceUnreachable  the client found no service, or an answer that is not the service's
└── RequestRefused      the client's view of any error that a service answered with

``STATUS`` maps types to statuses along the MRO, so that a new subclass inherits a row; a test
fails where a class of the three trees has none of its own.
"""

from __future__ import annotations

from realfill.errors import (
    AdapterMismatch,
    BaseUnavailable,
    InvalidCapsule,
    InvalidScene,
    MatcherUnavailable,
    RealFillError,
    TrainingDiverged,
)
from registry.errors import (
    AlreadyExists,
    Conflict,
    CorruptObject,
    InvalidReference,
    InvalidUpload,
    LeaseLost,
    NotFound,
    PreconditionFailed,
    Protected,
    RegistryError,
    SignatureRefused,
    StorageUnavailable,
)


class ServiceError(Exception):
    """Base of the tree; the message names the thing, the value and the remedy."""

    code = "service_error"


class InvalidSettings(ServiceError):
    """A setting is unknown, out of range or unsafe, so the service does not start."""

    code = "invalid_settings"


class InvalidRequest(ServiceError):
    """The fields of a request cannot be used as they are."""

    code = "invalid_request"


class InvalidQuery(ServiceError):
    """The parameters of a query string cannot be used as they are."""

    code = "invalid_query"


class UnsupportedMedia(ServiceError):
    """The request body is of a kind that the route does not read."""

    code = "unsupported_media"


class NotAcceptable(ServiceError):
    """The client accepts no form of answer that the route writes."""

    code = "not_acceptable"


class BodyTooLarge(ServiceError):
    """The request body is above the limit in bytes."""

    code = "body_too_large"


class ImageTooLarge(ServiceError):
    """An uploaded image has more pixels than the limit."""

    code = "image_too_large"


class QueueFull(ServiceError):
    """The lane has as much work as it may promise.

    Args:
        message: One sentence for the client.
        retry_after_s: When the lane expects to have room again, in seconds.
    """

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Cancelled(ServiceError):
    """The work was given up because nobody waits for it any more; never sent to a client."""

    code = "cancelled"


class DeadlineExceeded(ServiceError):
    """The work took longer than the request's limit and was given up."""

    code = "deadline_exceeded"


class EngineClosed(ServiceError):
    """The engine is shutting down or has stopped, and takes no work."""

    code = "engine_closed"


class ServiceUnreachable(ServiceError):
    """The client reached no service, or something that answers unlike one."""

    code = "service_unreachable"


class RequestRefused(ServiceError):
    """A service answered with an error; raised by the client only.

    Args:
        message: The service's sentence.
        status: The answer's HTTP status.
        refusal: The service's own code for the error.
        request_id: What to look for in the service's log.
    """

    code = "request_refused"

    def __init__(self, message: str, *, status: int, refusal: str, request_id: str) -> None:
        super().__init__(message)
        self.status = status
        self.refusal = refusal
        self.request_id = request_id


STATUS: dict[type[Exception], int] = {
    RealFillError: 500,
    InvalidScene: 422,
    InvalidCapsule: 422,
    AdapterMismatch: 409,
    BaseUnavailable: 500,
    MatcherUnavailable: 500,
    TrainingDiverged: 500,
    RegistryError: 500,
    InvalidReference: 422,
    InvalidUpload: 422,
    NotFound: 404,
    AlreadyExists: 409,
    Conflict: 409,
    PreconditionFailed: 412,
    Protected: 409,
    LeaseLost: 409,
    CorruptObject: 500,
    SignatureRefused: 500,
    StorageUnavailable: 503,
    ServiceError: 500,
    InvalidSettings: 500,
    InvalidRequest: 422,
    InvalidQuery: 400,
    UnsupportedMedia: 415,
    NotAcceptable: 406,
    BodyTooLarge: 413,
    ImageTooLarge: 413,
    QueueFull: 429,
    # Nobody is there to read it; it marks the request in the log and the metrics.
    Cancelled: 499,
    DeadlineExceeded: 504,
    EngineClosed: 503,
    ServiceUnreachable: 500,
    RequestRefused: 500,
}


def status_of(error: Exception) -> int:
    """The HTTP status of an error: the row of its nearest ancestor, else 500."""
    return next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), 500)
