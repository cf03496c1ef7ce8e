"""Reading what a request asks for: strict multipart forms, the Accept header, If-Match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from registry.records import MAX_NUMBER
from service.errors import (
    Cancelled,
    InvalidQuery,
    InvalidRequest,
    NotAcceptable,
    ServiceError,
    UnsupportedMedia,
)
from service.images import MEDIA_TYPES
from service.schemas import CompletionFields, ImageFormat

JSON = "application/json"
FILES = ("image", "mask")
MAX_FIELDS, MAX_FIELD_BYTES = 32, 64 * 1024


async def read_form(request: Request) -> FormData:
    """Receive a multipart form; large files go to disk. The caller closes it.

    Raises:
        UnsupportedMedia: The body is no multipart form.
        InvalidRequest: The form is malformed, too large in parts, or not in the charset it states.
        Cancelled: The client went away before it had sent all.
    """
    kind = media_type(request)
    if kind != "multipart/form-data":
        raise UnsupportedMedia(
            f"The body is {kind or 'of no declared type'}: send multipart/form-data with the "
            "files 'image' and 'mask', as `curl -F image=@target.png -F mask=@mask.png` does."
        )
    try:
        return await request.form(max_files=8, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except HTTPException as error:
        raise _unreadable(error.detail[:1].lower() + error.detail[1:].rstrip(".")) from error
    except UnicodeError as error:
        raise _unreadable("its charset is not that of its text") from error
    except ClientDisconnect as error:
        raise Cancelled("The client left while it was sending.") from error


def _unreadable(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The form cannot be read ({why}): let the client set Content-Type by itself, and send at "
        f"most {MAX_FIELDS} fields of {MAX_FIELD_BYTES // 1024} KB."
    )


def no_query(request: Request) -> None:
    """Let no parameter pass where a route reads none.

    Raises:
        InvalidQuery: There is one.
    """
    for name in request.query_params:
        raise InvalidQuery(
            f"The field 'query.{name}' is unknown: this route has no parameters; leave it out."
        )


def media_type(request: Request) -> str:
    """The body's declared type, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def files_of(form: FormData) -> tuple[UploadFile, UploadFile]:
    """The files ``image`` and ``mask``.

    Raises:
        InvalidRequest: One is absent, given twice or given as text.
    """
    found = []
    for name in FILES:
        values = form.getlist(name)
        if len(values) != 1:
            raise InvalidRequest(f"The field {name!r} is given {len(values)} times: send one file.")
        if not isinstance(values[0], UploadFile):
            raise InvalidRequest(f"The field {name!r} is text: send it as a file, -F {name}=@path.")
        found.append(values[0])
    return found[0], found[1]


def fields_of(form: FormData, query: Mapping[str, str]) -> CompletionFields:
    """The text fields, strictly.

    Raises:
        InvalidRequest: A field is unknown, given twice, a file, or out of its range.
        InvalidQuery: A field is in the query string.
    """
    for name, given in query.items():
        raise InvalidQuery(
            f"The field {name!r} is in the query string: send it in the form, -F {name}={given}."
        )
    texts: dict[str, str] = {}
    for name, value in form.multi_items():
        if name in FILES:
            continue
        if isinstance(value, UploadFile):
            raise InvalidRequest(f"The field {name!r} is a file: send it as text, or not at all.")
        if name in texts:
            raise InvalidRequest(f"The field {name!r} is given twice: send it once.")
        texts[name] = value
    try:
        # Validation starts from text: a seed "1e3" or "true" is no number here.
        return CompletionFields.model_validate(texts)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False), CompletionFields.model_fields) from error


def refusal(errors: list[Any], known: Mapping[str, Any] | None = None) -> ServiceError:
    """The first of pydantic's faults as one sentence with field, value and remedy."""
    first = errors[0]
    name = ".".join(str(part) for part in first["loc"]) or "body"
    if first["type"] == "extra_forbidden":
        fields = f": use {', '.join([*FILES, *known])}" if known else ""
        return InvalidRequest(f"The field {name!r} is unknown{fields}.")
    said = str(first["msg"])
    shown = ascii(first.get("input"))
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return InvalidRequest(
        f"The field {name!r} is {shown}: {said[0].lower()}{said[1:]}; correct it or leave it out."
    )


def wanted_form(accept: str | None, image_format: ImageFormat | None) -> tuple[bool, ImageFormat]:
    """Choose the form of the answer.

    Args:
        accept: The Accept header; absent means anything.
        image_format: The field ``format``; PNG where neither says otherwise.

    Returns:
        Whether to answer with JSON, and the encoding of images.

    Raises:
        NotAcceptable: The client accepts nothing that this route writes.
    """
    for kind in _by_preference(accept or "*/*"):
        if kind in (JSON, "application/*"):
            return True, image_format or "png"
        if kind in ("*/*", "image/*"):
            return False, image_format or "png"
        if kind in MEDIA_TYPES and image_format in (None, MEDIA_TYPES[kind]):
            return False, MEDIA_TYPES[kind]
    wish = f" with format={image_format}" if image_format else ""
    raise NotAcceptable(
        f"Accept {accept!r}{wish} leaves no form of answer: accept one of "
        f"{', '.join([*MEDIA_TYPES, JSON])}, and let format agree with it."
    )


def _by_preference(accept: str) -> list[str]:
    """Media ranges of an Accept header by quality, then as written; those of quality 0 left out."""
    ranges: list[tuple[float, str]] = []
    for part in accept.split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        if kind and quality > 0:
            ranges.append((-quality, kind))
    return [kind for _, kind in sorted(ranges, key=lambda item: item[0])]


def expected_version(if_match: str | None) -> int | None:
    """The version number in an If-Match header, quoted or bare; None where there is no demand.

    Raises:
        InvalidRequest: The header is neither ``*`` nor one version number.
    """
    if if_match is None or if_match.strip() == "*":
        return None
    number = if_match.strip().strip('"')
    if not number.isdecimal() or len(number) > len(str(MAX_NUMBER)):
        raise InvalidRequest(
            f"If-Match is {if_match[:40]!r}: send the number of the version that the alias points "
            'to now, such as "3".'
        )
    return int(number)
