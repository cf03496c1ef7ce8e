"""The container: safetensors bytes that are written in one way only and believed in nothing."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realfill.capsule_format import canonical, pack, tensors_of, unpack
from realfill.errors import InvalidCapsule

TENSORS = {
    "half": torch.arange(10).reshape(2, 5).half(),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "single": torch.tensor([[1.5], [-2.5]]),
    "brain": torch.tensor(3.25, dtype=torch.bfloat16),
}


def _written() -> bytes:
    return pack(TENSORS, {"scene": "tower", "place": "größe"})


def _read(data: bytes) -> dict[str, torch.Tensor]:
    return tensors_of(unpack(data))


def test_container_round_trip_is_exact() -> None:
    """Every dtype and shape, a scalar included, comes back as it was."""
    tensors = _read(_written())

    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_container_aligns_tensors_to_their_items() -> None:
    """Large items come first, and the region begins at a multiple of eight."""
    data = _written()
    entries = unpack(data).entries

    assert list(entries) == ["single", "brain", "half", "bytes"]
    assert (len(data) - len(unpack(data).region)) % 8 == 0


def test_container_does_not_depend_on_order() -> None:
    """Dictionaries in another order give the same bytes."""
    data = pack(dict(reversed(TENSORS.items())), {"place": "größe", "scene": "tower"})

    assert data == _written()


def test_tensors_can_be_written_to_without_touching_the_file() -> None:
    """What is read is a copy."""
    data = _written()
    _read(data)["half"].zero_()

    assert data == _written()


@settings(deadline=None, max_examples=200)
@given(position=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_any_flipped_bits_are_seen(position: int, bits: int) -> None:
    """Any change of any one byte of the file makes it unreadable."""
    data = bytearray(_written())
    data[position % len(data)] ^= bits
    with pytest.raises(InvalidCapsule):
        _read(bytes(data))


@settings(deadline=None, max_examples=60)
@given(length=st.integers(0, 10**6))
def test_a_torn_capsule_is_refused(length: int) -> None:
    """However much of the file arrived, less than all of it is refused."""
    data = _written()
    with pytest.raises(InvalidCapsule):
        _read(data[: length % len(data)])
    with pytest.raises(InvalidCapsule):
        _read(data + b"\0")


@settings(deadline=None, max_examples=100)
@given(junk=st.binary(max_size=200))
def test_junk_is_refused(junk: bytes) -> None:
    """Arbitrary bytes raise our error and no other, with or without a fitting length."""
    for data in (junk, len(junk).to_bytes(8, "little") + junk):
        with pytest.raises(InvalidCapsule):
            _read(data)


@pytest.mark.parametrize(
    "header,message",
    [
        (b"[" * 100_000, r"does not begin like a capsule"),
        (b'{"a":' * 100_000, r"damaged \(nested too deeply\)"),
        (b'{"a":1,"a":2}', r"a key appears twice"),
        (b'{"a":NaN}', r"NaN is no JSON number"),
        (b'{"a":"\xff"}', r"damaged .*utf-8"),
        (b'{"a":{}}', r"no text metadata"),
        (b'{"__metadata__":{"a":1}}', r"no text metadata"),
        (b'{"__metadata__":{}}', r"not the one that was written"),
    ],
)
def test_a_malformed_header_is_refused(header: bytes, message: str) -> None:
    """Each way to break the header has its sentence."""
    with pytest.raises(InvalidCapsule, match=message):
        unpack(len(header).to_bytes(8, "little") + header)


def test_a_header_over_the_bound_is_refused_before_it_is_read() -> None:
    """Four mebibytes are enough for any header."""
    data = (4 * 1024 * 1024 + 1).to_bytes(8, "little") + bytes(64)
    with pytest.raises(InvalidCapsule, match=r"claims 4194305 bytes, at most 4194304"):
        unpack(data)


def _forged(changes: dict[str, Any]) -> bytes:
    """A container whose entry `half` was changed by someone who can make the digest fit."""
    data = _written()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["half"].update(changes)
    metadata = header["__metadata__"]
    del metadata["realfill.header_digest"]
    text = json.dumps(header, sort_keys=True)
    metadata["realfill.header_digest"] = hashlib.sha256(text.encode()).hexdigest()
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + size :]


@pytest.mark.parametrize(
    "changes",
    [
        {"data_offsets": [0, 20]},
        {"data_offsets": [10**9, 10**9 + 20]},
        {"shape": [2, 6]},
        {"shape": [-2, -5]},
        {"shape": [True, 10]},
        {"shape": [1] * 9},
        {"shape": []},
        {"shape": [2.0, 5]},
        {"dtype": "F64"},
        {"dtype": ["F16"]},
        {"more": 1},
        {"data_offsets": "ab"},
    ],
)
def test_forged_tensor_entries_are_refused(changes: dict[str, Any]) -> None:
    """Offsets, shapes and dtypes must agree with one another and with the file."""
    data = _forged(changes)
    with pytest.raises(InvalidCapsule, match=r"'half' is described as|begins at byte"):
        unpack(data)


def test_canonical_json_ignores_the_order_of_keys() -> None:
    """Equal values have equal texts."""
    assert canonical({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
