"""Tests of capsule validation without torch."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from registry.errors import InvalidUpload
from registry.upload import MAX_HEADER_BYTES, inspect
from tests.registry.capsules import FINGERPRINT, capsule, frame, metadata, tensors, write
from tests.tiny import tiny_base, tiny_capsule


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensor region of a sound capsule."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_sound_capsule_is_described() -> None:
    """Identity, base and rank come out as they were written."""
    data = capsule()
    upload = inspect(data)
    region = header_of(data)[1]
    assert (upload.scene, upload.base, upload.base_fingerprint) == ("tower", "nano", FINGERPRINT)
    assert (upload.rank, upload.size_bytes) == (2, len(data))
    assert upload.digest == hashlib.sha256(data).hexdigest()
    assert upload.tensor_digest == hashlib.sha256(region).hexdigest()


def test_json_metadata_is_decoded() -> None:
    """Training, digests and target modules are structures, the rest stays text."""
    kept = inspect(capsule()).metadata
    assert kept["realfill.training"] == {"steps": 10, "probe_losses": [0.5, 0.25]}
    assert kept["realfill.target_modules"] == ["to_q"]
    assert kept["realfill.prompt"] == "a photo of sks"


def test_file_of_the_safetensors_library_is_accepted() -> None:
    """The library's own writer, with its padding and order, gives a sound capsule."""
    arrays = {name: values for name, (_, values) in tensors().items()}
    assert inspect(save(arrays, metadata())).rank == 2


def test_tensor_digest_survives_an_edit_of_the_header() -> None:
    """Equal weights are known as such though the file differs."""
    one, other = inspect(capsule()), inspect(capsule(prompt="another prompt"))
    assert one.digest != other.digest
    assert one.tensor_digest == other.tensor_digest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", None), ("format", "2"), ("scene", None), ("scene", " "),
        ("base", " "), ("base", "b" * 201), ("base_fingerprint", "5C" * 32),
        ("base_fingerprint", None), ("rank", "0"), ("rank", "129"), ("rank", "2.0"),
        ("rank", None), ("alpha", "nan"), ("scale", "-1"), ("scale", "many"), ("size_px", None),
        ("target_modules", "{}"), ("training", "[1"), ("training", '{"loss": NaN}'),
        ("training", '{"loss": 1e999}'), ("training", '{"note": "\\ud800"}'),
        ("training", '{"note": "\\u0000"}'), ("digests", None), ("licence", ""),
        ("prompt", None), ("prompt", "half a pair \ud800"),
    ],
)  # fmt: skip
def test_wrong_metadata_is_named(key: str, value: str | None) -> None:
    """A missing or impossible value is refused in one sentence about capsules."""
    with pytest.raises(InvalidUpload, match=r"^The capsule's"):
        inspect(capsule(**{key: value}))


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_is_refused(dtype: str, value: float) -> None:
    """NaN and infinity are found in every float type, and their tensor is named."""
    arrays = tensors()
    values = np.zeros((3, 5), dtype="<f4")
    values[1, 2] = value
    if dtype == "BF16":
        values = (values.view("<u4") >> 16).astype("<u2")
    elif dtype == "F16":
        values = values.astype("<f2")
    arrays["prompt_embedding"] = (dtype, values)
    with pytest.raises(InvalidUpload, match="'prompt_embedding' holds 1 values"):
        inspect(write(metadata(), arrays))


def test_largest_finite_values_are_accepted() -> None:
    """The scan does not take large numbers for infinite ones."""
    arrays = tensors()
    arrays["prompt_embedding"] = ("F16", np.full((2, 2), 65504, dtype="<f2"))
    arrays["thumbnail.0"] = ("U8", np.full((2, 2, 3), 255, dtype="u1"))
    arrays["reference_features.0"] = ("BF16", np.full((3,), 0x7F7F, dtype="<u2"))
    assert inspect(write(metadata(), arrays)).rank == 2


def test_rank_of_the_factors_must_be_the_header_s() -> None:
    """A capsule whose header and factors disagree is refused."""
    with pytest.raises(InvalidUpload, match=r"'unet.mid.to_q' has factors \(2, 8\) and \(8, 2\)"):
        inspect(capsule(rank="3"))


def test_factor_without_its_partner_is_refused() -> None:
    """A lone lora_A is no adapter."""
    arrays = tensors()
    del arrays["unet.mid.to_q.lora_B"]
    with pytest.raises(InvalidUpload, match="and None"):
        inspect(write(metadata(), arrays))


def test_capsule_without_factors_is_refused() -> None:
    """There must be something to serve."""
    arrays = {"prompt_embedding": tensors()["prompt_embedding"]}
    with pytest.raises(InvalidUpload, match="holds no LoRA factors"):
        inspect(write(metadata(), arrays))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"1234567", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(100),
        struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 100) + b"{}", frame(b"[]", b""),
        frame(b"{", b""), frame(b"\xff\xfe", b""), frame(b"[" * 100_000, b""), frame(b"{}", b""),
        frame(b'{"a": 1, "a": 2}', b""), frame(b'{"a": ' + b"9" * 5000 + b"}", b""),
        frame({"__metadata__": {"realfill.format": 1}}, b""), frame({"__metadata__": []}, b""),
    ],
)  # fmt: skip
def test_other_files_are_refused(data: bytes) -> None:
    """Pictures, archives, broken JSON and endless nesting give InvalidUpload."""
    with pytest.raises(InvalidUpload):
        inspect(data)


def test_header_above_the_bound_is_refused_unread() -> None:
    """A header that claims more than the bound is not parsed, even if the bytes are there."""
    with pytest.raises(InvalidUpload, match="are allowed"):
        inspect(frame(b" " * (MAX_HEADER_BYTES + 1), b""))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F8"}, {"dtype": []}, {"shape": [2, -8]}, {"shape": [2, True]},
        {"shape": [2, 8.0]}, {"shape": "28"}, {"shape": [2, 9]}, {"shape": [1] * 9},
        {"data_offsets": [0, 32, 64]}, {"data_offsets": [32, 0]}, {"data_offsets": None},
        {"extra": 1},
    ],
)  # fmt: skip
def test_tensor_entry_that_does_not_add_up_is_refused(change: dict[str, Any]) -> None:
    """Dtype, shape and offsets must agree, and there is nothing else."""
    header, region = header_of(capsule())
    header["unet.mid.to_q.lora_A"] |= change
    with pytest.raises(InvalidUpload, match="does not add up"):
        inspect(frame(header, region))


def test_gap_and_overlap_and_rest_are_refused() -> None:
    """Every byte of the region belongs to exactly one tensor."""
    header, region = header_of(capsule())
    begin, end = header["unet.mid.to_q.lora_B"]["data_offsets"]
    for shift in (-2, 2):
        header["unet.mid.to_q.lora_B"]["data_offsets"] = [begin + shift, end + shift]
        with pytest.raises(InvalidUpload, match="gaps and overlaps"):
            inspect(frame(header, region + bytes(2)))
    with pytest.raises(InvalidUpload, match="torn"):
        inspect(capsule() + b"!")
    with pytest.raises(InvalidUpload, match="torn"):
        inspect(capsule()[:-1])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_capsule_never_fails_in_another_way(data: st.DataObject) -> None:
    """Whatever is overwritten or cut off, the answer is a description or InvalidUpload."""
    sound = capsule()
    start = data.draw(st.integers(0, len(sound)))
    patch = data.draw(st.binary(max_size=12))
    end = data.draw(st.sampled_from([len(sound), start + len(patch), start]))
    damaged = sound[:start] + patch + sound[min(end, len(sound)) :]
    try:
        upload = inspect(damaged)
    except InvalidUpload:
        return
    assert upload.digest == hashlib.sha256(damaged).hexdigest()


@pytest.mark.parametrize("part", ["header", "tensor"])
def test_bytes_that_changed_since_they_were_written_are_refused(part: str) -> None:
    """A capsule of the trainer states its digests; a flipped bit in either part is seen."""
    written = tiny_capsule(tiny_base())
    assert inspect(written).scene == "tower"
    flipped = bytearray(written)
    place = written.index(b"a photo of sks") if part == "header" else len(written) - 100
    flipped[place] ^= 1
    with pytest.raises(InvalidUpload, match=f"{part} is not the one that was written"):
        inspect(bytes(flipped))
