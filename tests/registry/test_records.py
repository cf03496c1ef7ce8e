"""Tests of references and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidReference
from registry.records import MAX_NUMBER, Reference, check_number, check_scene

DIGEST = "0f" * 32
scene_names = st.text("abz09._-", min_size=1, max_size=62).map(lambda rest: f"a{rest}")
alias_names = scene_names


@given(scene_names, alias_names, st.integers(1, MAX_NUMBER))
def test_written_references_are_read_back(scene: str, alias: str, number: int) -> None:
    """Each of the three forms with a scene means what it was written from."""
    assert Reference.parse(scene) == Reference(scene=scene, alias="live")
    assert Reference.parse(f"{scene}@{alias}") == Reference(scene=scene, alias=alias)
    assert Reference.parse(f"{scene}@{number}") == Reference(scene=scene, number=number)


def test_digest_reference_has_no_scene() -> None:
    """A digest names bytes alone."""
    assert Reference.parse(f"sha256:{DIGEST}") == Reference(digest=DIGEST)


@given(st.text())
def test_any_text_is_read_or_refused_with_one_error(text: str) -> None:
    """No text makes the parser fail in another way, or puts control characters in a message."""
    message = ""
    try:
        Reference.parse(text)
    except InvalidReference as error:
        message = str(error)
    assert (message or "sound").isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "", "@live", "Tower", "to wer", "-tower", "../tower", "tower/", "a" * 64, "tower@",
        "tower@0", "tower@03", "tower@3x", "tower@1234567890", "tower@Live", "tower@live@live",
        "tower\n", "tower@live\n", "tower@3\n", "sha256:", "sha256:0f", f"sha256:{DIGEST.upper()}",
        f"sha256:{DIGEST}0", "türm", "tower@٣",
    ],
)  # fmt: skip
def test_malformed_reference_is_refused(text: str) -> None:
    """Paths, capitals, zero, spaces and half digests are no references."""
    with pytest.raises(InvalidReference):
        Reference.parse(text)


def test_refused_scene_name_is_told_the_rule() -> None:
    """The message holds the name and what may be used instead."""
    with pytest.raises(InvalidReference, match=r"'Old Tower' is not allowed: use 1 to 63 of a-z"):
        check_scene("Old Tower")


@pytest.mark.parametrize("number", [0, -1, MAX_NUMBER + 1, 2**70])
def test_impossible_version_number_is_refused(number: int) -> None:
    """Numbers that a column cannot hold never reach the database."""
    with pytest.raises(InvalidReference, match="versions count from 1"):
        check_number(number)
