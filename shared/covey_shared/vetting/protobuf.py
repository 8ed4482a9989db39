"""A strict reader of the protobuf wire format, for the few messages that a plan's graph consists of.

Ours, because the `onnx` package with protobuf takes 17 MB of a device's disk and more of its memory, and
because it reads what it should refuse. Protobuf itself is lenient: unknown fields are skipped, a field that
comes twice is merged or the last one wins, numbers may be padded with zeros. Two readers that each choose a
little differently see two graphs in the same bytes. Here one form is accepted, the one that a canonical
serialiser writes: fields in ascending order, singular ones once, numbers in as few bytes as possible, no
field that is not in the table, lengths that end exactly where their message ends.

Nothing is copied: bytes are handed on as views. No function here calls itself, so that the depth of
what is read is the depth of the caller's code. Every refusal is a MalformedError.
"""

import struct
from dataclasses import dataclass
from enum import Enum
from typing import Any

from covey_shared.errors import MalformedError

PUBLIC = "the plan's graph breaks the rules for plans"
"""What a device tells others of any refusal: fixed, so that nothing of the device can stand in it."""

_FLOAT = struct.Struct("<f")
_VARINT, _BYTES, _FIXED32 = 0, 2, 5


def refusal(message: str) -> MalformedError:
    """An error for the device's own log; others are told `PUBLIC`."""
    error = MalformedError(message)
    error.public = PUBLIC
    return error


class Kind(Enum):
    """What a field holds, and with it the only wire type that it may have."""

    INT = "int"  # int32, int64, enum: a signed 64-bit number
    FLOAT = "float"
    TEXT = "text"
    BYTES = "bytes"  # also a nested message


_WIRE = {Kind.INT: _VARINT, Kind.FLOAT: _FIXED32, Kind.TEXT: _BYTES, Kind.BYTES: _BYTES}


@dataclass(frozen=True, slots=True)
class Field:
    """A field that may stand in a message. most: how often; 1 for a singular field.

    longest: of its bytes, if it has a length.
    """

    name: str
    kind: Kind
    most: int = 1
    longest: int = 1 << 31


@dataclass(frozen=True, slots=True)
class Schema:
    """A kind of message: number -> field. known: fields of the format that are refused, by name."""

    name: str
    fields: dict[int, Field]
    known: dict[int, str]


class Meter:
    """Counts fields over a whole file, so that many small messages cannot add up to much memory."""

    def __init__(self, most: int) -> None:
        """most: fields of a file, of all messages together."""
        self._left = self._most = most

    def count(self) -> None:
        """One more field. Raises MalformedError beyond the bound."""
        self._left -= 1
        if self._left < 0:
            raise refusal(f"it has more than {self._most} fields")


def varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """-> (unsigned 64-bit number, where it ends). Refuses padding and more than 64 bits."""
    value = shift = 0
    while True:
        if at >= end:
            raise refusal(f"a number is cut off at byte {end}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > 63:
            raise refusal(f"a number at byte {at} has more than 10 bytes")
    if (byte == 0 and shift) or value >> 64:
        raise refusal(f"a number that ends at byte {at} is not in its shortest form")
    return value, at


def read(data: memoryview, schema: Schema, meter: Meter) -> dict[int, Any]:
    """Field number -> its value, or the list of its values if it may stand more than once.

    data: one message and nothing else. Values are int, float, str or memoryview. Absent fields are
    absent.
    """
    found: dict[int, Any] = {}
    at, end, last = 0, len(data), 0
    while at < end:
        meter.count()
        key, at = varint(data, at, end)
        number, wire = key >> 3, key & 7
        field = schema.fields.get(number)
        if field is None:
            what = schema.known.get(number, f"field {number}")
            raise refusal(f"{schema.name} has {what}, which a plan's has not")
        if wire != _WIRE[field.kind]:
            raise refusal(f"{schema.name}.{field.name} has wire type {wire}")
        if number < last:
            raise refusal(f"{schema.name}.{field.name} does not stand in its place")
        value: Any
        if wire == _VARINT:
            value, at = varint(data, at, end)
            value -= (value >> 63) << 64  # two's complement
        else:
            length = 4
            if wire == _BYTES:
                length, at = varint(data, at, end)
                if length > field.longest:
                    raise refusal(
                        f"{schema.name}.{field.name} has {length} bytes; at most {field.longest}"
                    )
            if length > end - at:
                raise refusal(f"{schema.name}.{field.name} is longer than what is left")
            value = _value(data[at : at + length], field, schema)
            at += length
        if field.most == 1:
            if number == last:
                raise refusal(f"{schema.name}.{field.name} stands there twice")
            found[number] = value
        else:
            values = found.setdefault(number, [])
            if len(values) >= field.most:
                raise refusal(f"{schema.name} has more than {field.most} of {field.name}")
            values.append(value)
        last = number
    return found


def _value(view: memoryview, field: Field, schema: Schema) -> Any:
    if field.kind is Kind.FLOAT:
        return _FLOAT.unpack(view)[0]
    if field.kind is Kind.BYTES:
        return view
    try:
        text = str(view, "utf-8")
    except UnicodeDecodeError:
        raise refusal(f"{schema.name}.{field.name} is not UTF-8") from None
    if not text.isprintable():
        raise refusal(f"{schema.name}.{field.name} is {text!a}: not printable")
    return text
