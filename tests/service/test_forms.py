"""Reading requests: the Accept header and If-Match."""

from __future__ import annotations

import pytest

from service.errors import InvalidRequest, NotAcceptable
from service.forms import expected_version, wanted_form
from service.schemas import ImageFormat


@pytest.mark.parametrize(
    ("accept", "image_format", "wanted"),
    [
        (None, None, (False, "png")),
        ("*/*", None, (False, "png")),
        ("*/*", "webp", (False, "webp")),
        ("image/*", "jpeg", (False, "jpeg")),
        ("image/jpeg", None, (False, "jpeg")),
        ("application/json", None, (True, "png")),
        ("application/json", "jpeg", (True, "jpeg")),
        ("image/webp;q=0.5, application/json", None, (True, "png")),
        ("text/html, image/webp;q=0.9, */*;q=0.1", None, (False, "webp")),
        ("image/png, image/jpeg", "jpeg", (False, "jpeg")),
        ("application/json;q=0, image/png", None, (False, "png")),
    ],
)
def test_the_form_of_the_answer_follows_preference_and_format(
    accept: str | None, image_format: ImageFormat | None, wanted: tuple[bool, ImageFormat]
) -> None:
    """The first range, by quality, that agrees with the field format."""
    assert wanted_form(accept, image_format) == wanted


@pytest.mark.parametrize("accept", ["text/html", "text/event-stream", "image/gif", "image/png;q=x"])
def test_a_form_that_is_not_written_is_refused(accept: str) -> None:
    """The sentence names what there is."""
    with pytest.raises(NotAcceptable, match="image/png, image/jpeg, image/webp, application/json"):
        wanted_form(accept, None)


def test_a_format_against_the_header_is_refused() -> None:
    """Neither of two contradicting wishes wins silently."""
    with pytest.raises(NotAcceptable, match="with format=webp"):
        wanted_form("image/png", "webp")


@pytest.mark.parametrize(
    ("header", "number"), [(None, None), ("*", None), ('"3"', 3), ("3", 3), ('"0"', 0)]
)
def test_if_match_names_a_version(header: str | None, number: int | None) -> None:
    """Quoted as an entity tag, or bare."""
    assert expected_version(header) == number


@pytest.mark.parametrize("header", ['W/"abc"', "1" * 10, f'"{"1" * 6000}"'])
def test_an_if_match_that_is_no_number_is_refused(header: str) -> None:
    """A digest, say, or more digits than any version has."""
    with pytest.raises(InvalidRequest, match="If-Match is '") as caught:
        expected_version(header)
    assert len(str(caught.value)) < 200
