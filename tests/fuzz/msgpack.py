"""Changing messages without breaking their form: MessagePack, envelopes in envelopes, their signatures."""

import random
from collections.abc import Callable
from typing import Any

import msgspec

from covey_shared import enrolment, messages, wire
from covey_shared.keys import SigningKey
from covey_shared.secagg.cohort import check_ins_digest
from fuzz.harness import Mutate

PREFIX = 66
LABELS = {kind.CODE: kind.LABEL for kind in (*messages.ALL, *enrolment.ALL)}
CODES = tuple(LABELS)

_NUMBERS = (
    0,
    1,
    2,
    3,
    127,
    128,
    255,
    256,
    65535,
    65536,
    2**31,
    2**32,
    2**53,
    2**53 + 1,
    2**63,
    2**64 - 1,
)
_FLOATS = (0.0, -0.0, 1.0, float("nan"), float("inf"), float("-inf"), 1e308, 5e-324, 2592000.0)
_LENGTHS = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 80, 128, 1024, 1025)
_NAMES = ("", "a", "pi-000", "pi-001", "lab", "-", "a" * 32, "a" * 33, "pi-000\n", "\u202e", "\x00")


def unpacked(body: bytes) -> Any:
    """The values of a body, untyped; None if it is no MessagePack."""
    try:
        return msgspec.msgpack.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def packed(value: Any) -> bytes:
    """The other way."""
    return msgspec.msgpack.encode(value)


def envelope_in(value: Any) -> bool:
    """Whether bytes look like a message of their own."""
    return isinstance(value, bytes) and len(value) > PREFIX and value[1] in LABELS


def mutated_body(body: bytes, chance: random.Random, mutate: Mutate, longest: int) -> bytes:
    """A body with one of its values changed; or with its bytes changed, once in a while."""
    value = unpacked(body)
    if value is None or chance.random() < 0.1:
        return mutate(body, longest)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        value = changed(value, chance, mutate, longest)
    try:
        made = packed(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return mutate(body, longest)
    return made if len(made) <= longest else body


def mutated_envelope(data: bytes, chance: random.Random, mutate: Mutate, longest: int) -> bytes:
    """An envelope whose body was changed, or now and then its prefix."""
    if len(data) <= PREFIX or chance.random() < 0.05:
        return mutate(data, longest)
    prefix = data[:PREFIX]
    if chance.random() < 0.03:
        prefix = bytes((data[0], chance.choice(CODES))) + data[2:PREFIX]
    return prefix + mutated_body(data[PREFIX:], chance, mutate, longest - PREFIX)


def changed(value: Any, chance: random.Random, mutate: Mutate, longest: int) -> Any:
    """A value with something inside of it changed, of the types that MessagePack and JSON have."""
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        action = chance.random()
        if action < 0.72:
            return [*value[:at], changed(value[at], chance, mutate, longest), *value[at + 1 :]]
        if action < 0.8:
            return [*value[:at], *value[at + 1 :]]
        if action < 0.88:
            return [*value[:at], *[value[at]] * chance.choice((2, 2, 3, 129)), *value[at + 1 :]]
        other = chance.randrange(len(value))
        swapped = list(value)
        swapped[at], swapped[other] = swapped[other], swapped[at]
        return swapped
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        return {**value, key: changed(value[key], chance, mutate, longest)}
    if envelope_in(value) and chance.random() < 0.8:
        return mutated_envelope(value, chance, mutate, longest)
    return _leaf(value, chance, mutate, longest)


def _leaf(value: Any, chance: random.Random, mutate: Mutate, longest: int) -> Any:
    if chance.random() < 0.08:
        return chance.choice((None, True, [], {}, "", b"", 0, -1, 1.5, [[]], bytes(32), "a"))
    match value:
        case bool() | None:
            return chance.choice((None, False, 0, b""))
        case int():
            near = chance.choice((value, *_NUMBERS)) + chance.choice((-1, 0, 1))
            return near if -(2**63) <= near < 2**64 else 0
        case float():
            return chance.choice((*_FLOATS, value * 2, -value))
        case str():
            made = mutate(value.encode(), 400).decode("utf-8", "replace")
            return chance.choice((made, *_NAMES))
        case bytes():
            if chance.random() < 0.3:
                size = chance.choice(_LENGTHS)
                return (value + bytes(size))[:size]
            if value and chance.random() < 0.5:
                at = chance.randrange(len(value))
                return value[:at] + bytes((value[at] ^ 1 << chance.randrange(8),)) + value[at + 1 :]
            return mutate(value, min(longest, 2 * len(value) + 16))
        case _:
            return value


# -- signing again ---------------------------------------------------------------------------------

KeyOf = Callable[[int, list[Any]], SigningKey | None]
"""(type of a message, its fields) -> the key that signs it; None to leave its signature as it is."""


def signed(code: int, body: bytes, key: SigningKey) -> bytes:
    """An envelope around any body at all."""
    return bytes((wire.VERSION, code)) + key.sign(LABELS.get(code, "?"), body) + body


def resealed(envelope: bytes, key_of: KeyOf, depth: int = 3) -> bytes:
    """The same message with good signatures, also on the messages inside, and a manifest's head that fits its
    check-ins: what somebody who has all those keys could send."""
    if not envelope_in(envelope):
        return envelope
    code, body = envelope[1], envelope[PREFIX:]
    fields = unpacked(body)
    if not isinstance(fields, list):
        return envelope
    if depth:
        inner = _resealed_inside(fields, key_of, depth - 1)
        if inner != fields:
            fields = inner
        if code == messages.Manifest.CODE:
            _fit_head(fields)
        body = packed(fields) if packed(unpacked(body)) == body else body
    key = key_of(code, fields)
    if key is None:
        return envelope[:PREFIX] + body
    return signed(code, body, key)


def _resealed_inside(fields: list[Any], key_of: KeyOf, depth: int) -> list[Any]:
    made: list[Any] = []
    for value in fields:
        if isinstance(value, list):
            made.append(_resealed_inside(value, key_of, depth))
        else:
            made.append(resealed(value, key_of, depth) if envelope_in(value) else value)
    return made


def _fit_head(fields: list[Any]) -> None:
    match fields:
        case [list() as head, list() as check_ins] if len(head) > 7:
            if all(isinstance(envelope, bytes) for envelope in check_ins):
                head[6] = check_ins_digest(tuple(check_ins))
