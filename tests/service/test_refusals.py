"""Completions that cannot be: one sentence, a status, and nothing half done."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.fakes import PATH, Serve, encoded, hole, photo, refused, uploads


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"mask": encoded(hole(40, 40))}, "'mask' is 40x40 pixels, the target 48x40"),
        ({"mask": encoded(np.zeros((40, 48), np.uint8))}, "marks no pixel as missing"),
        ({"mask": encoded(np.full((40, 48), 255, np.uint8))}, "marks every pixel as missing"),
        ({"image": encoded(photo())[:900]}, "damaged or incomplete"),
        ({"image": encoded(photo(), "GIF")}, "is a GIF, whatever its name says"),
        ({"image": b"hello", "mask": b""}, "'image' is no image"),
        ({"image": b""}, "is empty"),
    ],
    ids=["another size", "empty mask", "full mask", "truncated", "GIF", "both text", "nothing"],
)
def test_an_unusable_picture_isrefused(serve: Serve, other: Any, sentence: str) -> None:
    """422 with one sentence that names the field, what is wrong and the remedy."""
    message = refused(serve().post(PATH, files=uploads(**other)), 422, "invalid_scene")
    assert sentence in message
    assert message.startswith("The field '")


def test_large_uploads_are_read_side_by_side_to_the_same_end(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answer, and what is wrong with the image is said first."""
    client = serve()
    small = client.post(PATH, files=uploads()).content
    monkeypatch.setattr("service.completions.SMALL_BYTES", 0)
    assert client.post(PATH, files=uploads()).content == small
    broken = client.post(PATH, files=uploads(image=b"hello", mask=b""))
    assert "'image' is no image" in refused(broken, 422, "invalid_scene")


def test_a_bomb_is_refused_before_it_is_decoded(serve: Serve) -> None:
    """Thirty megapixels in a few kilobytes."""
    bomb = io.BytesIO()
    Image.new("1", (6000, 5000)).save(bomb, "PNG")
    answer = serve().post(PATH, files=uploads(image=bomb.getvalue()))
    assert "6000x5000, 30000000 pixels" in refused(answer, 413, "image_too_large")


def test_a_bomb_for_a_mask_is_refused_too(serve: Serve) -> None:
    """A hundred megapixels, at which Pillow itself objects."""
    bomb = io.BytesIO()
    Image.new("1", (14000, 14000)).save(bomb, "PNG")
    refused(serve().post(PATH, files=uploads(mask=bomb.getvalue())), 413, "image_too_large")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"steps": "many"}, "'steps' is 'many': input should be a valid integer"),
        ({"seed": "1e3"}, "'seed' is '1e3'"),
        ({"seed": "-1"}, "'seed' is '-1': input should be greater than or equal to 0"),
        ({"candidates": "17"}, "'candidates' is 17: ask for at most 16"),
        ({"candidates": "2", "top": "3"}, "'top' is 3: ask for at most 2"),
        ({"sampler": "euler"}, "'sampler' is 'euler': input should be 'ddpm', 'ddim'"),
        ({"feather_px": "-3"}, "'feather_px' is '-3'"),
        ({"deadline_ms": "1" * 320}, "'deadline_ms' is '111"),
        ({"deadline_ms": "86400001"}, "should be less than or equal to 86400000"),
        ({"stepz": "20"}, "'stepz' is unknown: use image, mask, seed"),
        ({"seed": ["1", "2"]}, "'seed' is given twice"),
    ],
)
def test_a_bad_field_isrefused(serve: Serve, data: Any, sentence: str) -> None:
    """Nothing is guessed and nothing ignored."""
    message = refused(serve().post(PATH, files=uploads(), data=data), 422, "invalid_request")
    assert sentence in message


def test_a_missing_file_isrefused(serve: Serve) -> None:
    """The sentence names the field."""
    files = uploads()
    del files["mask"]
    message = refused(serve().post(PATH, files=files), 422, "invalid_request")
    assert "'mask' is given 0 times" in message


def test_text_for_a_file_isrefused(serve: Serve) -> None:
    """A URL, say: the service fetches nothing."""
    files = uploads()
    del files["image"]
    answer = serve().post(PATH, files=files, data={"image": "http://127.0.0.1/x.png"})
    assert "'image' is text" in refused(answer, 422, "invalid_request")


def test_another_body_than_a_form_isrefused(serve: Serve) -> None:
    """415, with the form that is wanted."""
    answer = serve().post(PATH, json={"image": "..."})
    assert "multipart/form-data" in refused(answer, 415, "unsupported_media")


def test_a_torn_form_isrefused(serve: Serve) -> None:
    """A multipart body without its boundary."""
    answer = serve().post(
        PATH, content=b"--x\r\nbroken", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    refused(answer, 422, "invalid_request")


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        ("multipart/form-data", 0, "missing boundary in multipart"),
        ("multipart/form-data; boundary=y", 0, "invalid multipart data"),
        ("multipart/form-data; boundary=x; charset=punycode", 1, "its charset is not that"),
        ("multipart/form-data; boundary=x; charset=undefined", 1, "its charset is not that"),
        ("multipart/form-data; boundary=x", 33, "too many fields"),
    ],
)
def test_an_unreadable_form_is_refused_with_the_remedy(
    serve: Serve, kind: str, fields: int, sentence: str
) -> None:
    """422 as for other forms, and not the parser's bare words."""
    part = b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\n\xff\xfe1\r\n'
    answer = serve().post(
        PATH, content=part * max(fields, 1) + b"--x--\r\n", headers={"Content-Type": kind}
    )
    message = refused(answer, 422, "invalid_request")
    assert sentence in message
    assert "let the client set Content-Type by itself, and send at most 32 fields" in message


def test_fields_in_the_query_string_are_refused(serve: Serve) -> None:
    """They would be ignored."""
    answer = serve().post(f"{PATH}?candidates=16", files=uploads())
    assert "-F candidates=16" in refused(answer, 400, "invalid_query")


def test_an_unwritable_answer_isrefused(serve: Serve) -> None:
    """406 names what can be had."""
    answer = serve().post(PATH, files=uploads(), headers={"Accept": "text/html"})
    assert "image/png" in refused(answer, 406, "not_acceptable")


def test_an_unknown_scene_is_not_found(serve: Serve) -> None:
    """404 with the registry's sentence."""
    answer = serve().post("/v1/scenes/bridge/complete", files=uploads())
    assert "bridge" in refused(answer, 404, "not_found")


def test_a_scene_that_is_no_name_isrefused(serve: Serve) -> None:
    """422 with the rule."""
    refused(serve().post("/v1/scenes/a b/complete", files=uploads()), 422, "invalid_reference")


def test_a_capsule_with_a_flipped_byte_is_reported(serve: Serve, tmp_path: Path) -> None:
    """Damage on the disk is a 500 that says which object, not a wrong picture."""
    client = serve()
    blobs = [p for p in (tmp_path / "registry").rglob("*") if len(p.name) >= 64 and p.is_file()]
    for blob in blobs:
        stored = bytearray(blob.read_bytes())
        stored[-5] ^= 1
        blob.chmod(0o600)
        blob.write_bytes(stored)
    refused(client.post(PATH, files=uploads()), 500, "corrupt_object")


def test_a_body_above_the_limit_isrefused(serve: Serve) -> None:
    """By its declared length, and the sentence has the limit."""
    answer = serve(max_body_bytes=1000).post(PATH, files=uploads())
    assert "limit of 1000 bytes" in refused(answer, 413, "body_too_large")


def test_a_chunked_body_above_the_limit_isrefused(serve: Serve) -> None:
    """No length is declared: the bytes are counted as they come."""

    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for _ in range(20):
            yield b"0" * 100

    answer = serve(max_body_bytes=1000).post(
        PATH, content=chunks(), headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    refused(answer, 413, "body_too_large")
