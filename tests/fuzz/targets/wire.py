"""The wire decoder: any bytes as any message."""

import contextlib
import random
from collections.abc import Iterator

from covey_shared import enrolment, messages, wire
from covey_shared.errors import MalformedError
from fuzz import recorded
from fuzz.harness import Mutate, Run, Target, expect, refused
from fuzz.msgpack import mutated_envelope
from vectors import load

KINDS = (*messages.ALL, *enrolment.ALL)


def _read(data: bytes) -> list[str]:
    signed = refused(MalformedError, lambda: wire.decode(data))
    for kind in KINDS if signed is not None else KINDS[len(data) % len(KINDS) :][:2]:
        typed = refused(MalformedError, lambda kind=kind: wire.decode_as(kind, data))  # type: ignore[misc]
        expect(
            (typed is not None) == (signed is not None and type(signed.message) is kind),
            "decode_as",
        )
    if signed is None:
        wire.decode(data)  # once more, for the error's own words
        return []
    expect(signed.envelope == data, "an accepted message keeps its bytes")
    again = wire.body_of(signed.message)
    expect(again == signed.body == data[66:], "what was decoded encodes to other bytes")
    expect(len(signed.signature) == 64, "a signature of 64 bytes")
    for text in (getattr(signed.message, "reason", ""), repr(signed.message)):
        messages.for_display(text).encode()
    return [f"a sound {signed.message.LABEL}", *_sizes(signed.message)]


def _sizes(message: messages.Message) -> list[str]:
    """How long its variable parts are, roughly."""
    parts = {name: getattr(message, name) for name in message.__struct_fields__}
    return [
        f"{message.LABEL} {name} {'x' * (len(value).bit_length() // 2)}"
        for name, value in parts.items()
        if isinstance(value, bytes | str | tuple)
    ]


@contextlib.contextmanager
def ready() -> Iterator[Run]:
    """Nothing to make."""
    yield _read


def _mutate(data: bytes, longest: int, chance: random.Random, mutate: Mutate) -> bytes:
    return mutated_envelope(data, chance, mutate, longest)


def _seeds() -> Iterator[bytes]:
    for known in load("messages")["messages"]:
        yield bytes.fromhex(known["envelope"])
    yield from recorded.envelopes()


TARGET = Target(
    "wire",
    ready,
    # A body that is refused only at its end is a list of small objects by then: up to 64 bytes for each of
    # its own. Refused before it is read: whatever exceeds MAX_MESSAGE_BYTES.
    memory=lambda n: 64 * 1024 + (80 * n if n <= wire.MAX_MESSAGE_BYTES else 0),
    seeds=_seeds,
    mutate=_mutate,
    words=(
        b"\xc4\x20",
        b"\xc4\x10",
        b"\xdd\xff\xff\xff\xff",
        b"\xdc\xff\xff",
        b"\xcb",
        b"\xcf",
        b"\xd9",
    ),
    longest=16 * 1024,
)
