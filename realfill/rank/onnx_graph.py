"""Writes ONNX files: nodes with static shapes, encoded as ONNX's protobuf schema lays them out.

torch's exporters need the packages onnx and onnxscript; the few dozen operations of a matcher do
not. Field numbers are those of onnx.proto.

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IR_VERSION, OPSET = 8, 17
FLOAT, INT64 = 1, 7
VARINT, BYTES, FIXED32 = 0, 2, 5

Attribute = int | float | Sequence[int]


class Graph:
    """An ONNX graph that is written node by node; values are known by name."""

    def __init__(self) -> None:
        self._nodes: list[bytes] = []
        self._constants: list[bytes] = []
        self._inputs: list[bytes] = []
        self._outputs: list[bytes] = []
        self._names = 0

    def input(self, name: str, shape: Sequence[int]) -> str:
        """Declare a float32 input."""
        self._inputs.append(_value(name, shape))
        return name

    def output(self, value: str, name: str, shape: Sequence[int]) -> None:
        """Give a value out as a float32 output."""
        self._nodes.append(_node("Identity", [value], name, {}))
        self._outputs.append(_value(name, shape))

    def constant(self, value: Tensor | Sequence[int] | float) -> str:
        """Keep a tensor as float32, a number likewise, or whole numbers as int64."""
        if isinstance(value, Tensor):
            array: NDArray[np.generic] = value.detach().cpu().float().numpy()
        elif isinstance(value, float):
            array = np.array(value, np.float32)
        else:
            array = np.array(value, np.int64)
        name = self._name()
        kind = FLOAT if array.dtype == np.float32 else INT64
        fields = [_field(1, dimension) for dimension in array.shape]
        fields += [_field(2, kind), _field(8, name), _field(9, array.tobytes())]
        self._constants.append(b"".join(fields))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Attribute) -> str:
        """Append a node of one output and return that output's name."""
        name = self._name()
        self._nodes.append(_node(kind, inputs, name, attributes))
        return name

    def encoded(self) -> bytes:
        """The whole model; equal graphs give equal bytes."""
        graph = b"".join(
            [
                *(_field(1, node) for node in self._nodes),
                _field(2, "matcher"),
                *(_field(5, constant) for constant in self._constants),
                *(_field(11, value) for value in self._inputs),
                *(_field(12, value) for value in self._outputs),
            ]
        )
        opset = _field(1, "") + _field(2, OPSET)
        return _field(1, IR_VERSION) + _field(2, "realfill") + _field(7, graph) + _field(8, opset)

    def _name(self) -> str:
        self._names += 1
        return f"v{self._names}"


def _node(kind: str, inputs: Sequence[str], output: str, attributes: dict[str, Attribute]) -> bytes:
    fields = [_field(1, name) for name in inputs]
    fields += [_field(2, output), _field(3, output), _field(4, kind)]
    fields += [_field(5, _attribute(name, value)) for name, value in attributes.items()]
    return b"".join(fields)


def _attribute(name: str, value: Attribute) -> bytes:
    """One attribute; its type's number comes last. 1 is a float, 2 an int, 7 a list of ints."""
    if isinstance(value, int):
        encoded = _field(3, value) + _field(20, 2)
    elif isinstance(value, float):
        encoded = _key(2, FIXED32) + struct.pack("<f", value) + _field(20, 1)
    else:
        encoded = b"".join(_field(8, item) for item in value) + _field(20, 7)
    return _field(1, name) + encoded


def _value(name: str, shape: Sequence[int]) -> bytes:
    """Name, type and shape of an input or an output."""
    dimensions = b"".join(_field(1, _field(1, side)) for side in shape)
    tensor = _field(1, FLOAT) + _field(2, dimensions)
    return _field(1, name) + _field(2, _field(1, tensor))


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _key(number, VARINT) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _key(number, BYTES) + _varint(len(content)) + content


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    """Seven bits a byte, low ones first; negative numbers as 64 bits in two's complement."""
    value &= 2**64 - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
