"""Changing a graph without breaking its form: protobuf messages as trees, written with lengths that fit."""

import random
from dataclasses import dataclass, field

from fuzz.harness import Mutate

_NUMBERS = (0, 1, 2, 3, 6, 7, 9, 10, 11, 16, 18, 63, 64, 127, 128, 2**31, 2**32, 2**62, 2**63 - 1)


@dataclass
class Part:
    """A field. value: of a number or four bytes; parts: of a message inside, if it can be read as one."""

    number: int
    wire: int
    value: int | bytes
    parts: "list[Part] | None" = field(default=None)


def parsed(data: bytes, depth: int = 7) -> list[Part] | None:
    """The fields of a message; None for bytes that are none."""
    parts: list[Part] = []
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        if key is None or key >> 3 == 0:
            return None
        number, wire = key >> 3, key & 7
        value: int | bytes | None
        if wire == 0:
            value, at = _number(data, at)
        elif wire == 5:
            value, at = data[at : at + 4], at + 4
        elif wire == 2:
            size, at = _number(data, at)
            if size is None:
                return None
            value, at = data[at : at + size], at + size
        else:
            return None
        if value is None or at > len(data):
            return None
        inner = (
            parsed(value, depth - 1) if wire == 2 and depth and isinstance(value, bytes) else None
        )
        parts.append(Part(number, wire, value, inner if value else None))
    return parts


def written(parts: list[Part]) -> bytes:
    """The other way."""
    made = bytearray()
    for part in parts:
        made += _varint(part.number << 3 | part.wire)
        if part.wire == 0 and isinstance(part.value, int):
            made += _varint(part.value)
            continue
        value = part.value if part.parts is None else written(part.parts)
        if not isinstance(value, bytes):
            value = b""
        if part.wire == 2:
            made += _varint(len(value))
        made += value
    return bytes(made)


def _number(data: bytes, at: int) -> tuple[int | None, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            return None, at
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return None, at


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    made = bytearray()
    while True:
        made.append(value & 127 | (128 if value > 127 else 0))
        value >>= 7
        if not value:
            return bytes(made)


def mutated(
    data: bytes, chance: random.Random, mutate: Mutate, longest: int, words: tuple[bytes, ...]
) -> bytes:
    """The message with one or a few of its fields changed. words: texts that mean something."""
    parts = parsed(data)
    if parts is None or chance.random() < 0.05:
        return mutate(data, longest)
    for _ in range(chance.choice((1, 1, 2, 3))):
        _change(parts, chance, mutate, words)
    made = written(parts)
    return made if len(made) <= longest else data


def _change(
    parts: list[Part], chance: random.Random, mutate: Mutate, words: tuple[bytes, ...]
) -> None:
    if not parts:
        parts.append(Part(chance.randrange(1, 15), 0, chance.choice(_NUMBERS)))
        return
    # Large ones sooner: else every other change would be to the few fields at the top.
    weights = [1 + (len(part.value) if isinstance(part.value, bytes) else 0) for part in parts]
    (at,) = chance.choices(range(len(parts)), weights)
    part = parts[at]
    action = chance.random()
    if part.parts is not None and action < 0.8:
        _change(part.parts, chance, mutate, words)
        return
    if action < 0.06:
        del parts[at]
    elif action < 0.14:
        parts.insert(at, part)
    elif action < 0.2:
        other = chance.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    elif action < 0.25:
        parts.insert(at, Part(chance.randrange(1, 22), 0, chance.choice(_NUMBERS)))
    elif action < 0.28:
        parts[at] = Part(chance.randrange(1, 22), part.wire, part.value, part.parts)
    else:
        parts[at] = Part(part.number, part.wire, _value(part, chance, mutate, words))


def _value(
    part: Part, chance: random.Random, mutate: Mutate, words: tuple[bytes, ...]
) -> int | bytes:
    if part.wire == 0 and isinstance(part.value, int):
        near = chance.choice((part.value, part.value, *_NUMBERS)) + chance.choice((-1, 0, 0, 1))
        return near if chance.random() < 0.8 else -near
    value = part.value if isinstance(part.value, bytes) else b""
    if part.wire == 5:
        return mutate(value, 4)[:4].ljust(4, b"\0")
    if chance.random() < 0.6:
        return chance.choice(words)
    if len(value) % 8 == 0 and value and chance.random() < 0.5:  # integers of a constant
        at = chance.randrange(len(value) // 8) * 8
        number = chance.choice(_NUMBERS) * chance.choice((1, -1))
        return value[:at] + (number & 2**64 - 1).to_bytes(8, "little") + value[at + 8 :]
    return mutate(value, 2 * len(value) + 16)
