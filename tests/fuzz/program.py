"""Inputs of the two state machines: the state to begin in, then steps.

state    1 byte
steps    kind (1 byte), argument (1 byte), size (2 bytes, big-endian), as many bytes
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from covey_shared import keys
from covey_shared.messages import (
    Certificate,
    CheckIn,
    Decline,
    MaskedUpdate,
    PlanSignature,
    Reveal,
    RosterVote,
    Shares,
    ViewVote,
    WantBlob,
)
from fuzz import msgpack
from fuzz.harness import Mutate
from lab import Lab

MAX_STEPS = 24
_BY_DEVICE = {
    CheckIn.CODE: 3,
    Decline.CODE: 3,
    WantBlob.CODE: 1,
    **dict.fromkeys(
        (kind.CODE for kind in (Shares, RosterVote, MaskedUpdate, ViewVote, Reveal)), 1
    ),
}
"""Code of a message that a device signs -> which of its fields names the device."""


@dataclass(frozen=True)
class Step:
    """One thing that happens."""

    kind: int
    argument: int
    payload: bytes = b""


def parsed(data: bytes) -> tuple[int, list[Step]]:
    """The state, and the steps. A last step that is cut off is as long as it is."""
    steps, at = [], 1
    while at + 4 <= len(data) and len(steps) < MAX_STEPS:
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        steps.append(Step(data[at], data[at + 1], data[at + 4 : at + 4 + size]))
        at += 4 + size
    return (data[0] if data else 0), steps


def written(state: int, steps: Iterable[Step]) -> bytes:
    """The other way."""
    made = bytearray((state,))
    for step in steps:
        made += (
            bytes((step.kind, step.argument)) + len(step.payload).to_bytes(2, "big") + step.payload
        )
    return bytes(made)


def mutator(kinds: int, envelope_kinds: frozenset[int], envelopes: Callable[[], list[bytes]]):  # type: ignore[no-untyped-def]
    """Steps put in, left out, doubled, exchanged, and the messages in them changed. envelopes: to put in."""

    def mutate_program(data: bytes, longest: int, chance: random.Random, mutate: Mutate) -> bytes:
        state, steps = parsed(data)
        for _ in range(chance.choice((1, 1, 2, 3))):
            at = chance.randrange(len(steps) + 1)
            inside = min(at, len(steps) - 1)
            match chance.randrange(10):
                case 0:
                    state = chance.randrange(256)
                case 1:
                    steps.insert(at, Step(chance.randrange(kinds), chance.randrange(256)))
                case 2:
                    kind = chance.choice(sorted(envelope_kinds))
                    steps.insert(at, Step(kind, chance.randrange(8), chance.choice(envelopes())))
                case 3 if steps:
                    del steps[inside]
                case 4 if steps:
                    steps.insert(at, chance.choice(steps))
                case 5 if steps:
                    step = steps[inside]
                    steps[inside] = Step(chance.randrange(kinds), step.argument, step.payload)
                case _ if steps:
                    step = steps[inside]
                    if step.payload and step.kind % kinds in envelope_kinds:
                        made = msgpack.mutated_envelope(step.payload, chance, mutate, 8000)
                    else:
                        made = mutate(step.payload, 400)
                    argument = step.argument if chance.random() < 0.8 else chance.randrange(256)
                    steps[inside] = Step(step.kind, argument, made[:65535])
        made = written(state, steps[:MAX_STEPS])
        return made if len(made) <= longest else data

    return mutate_program


def everybody(lab: Lab) -> msgpack.KeyOf:
    """Whoever signs a message of this kind. The fleet CA vouches for any key that is in its name."""

    def key_of(code: int, fields: list[object]) -> keys.SigningKey | None:
        if code == Certificate.CODE:
            return lab.ca
        if code == PlanSignature.CODE:
            return None
        at = _BY_DEVICE.get(code)
        if at is None:
            return lab.coordinator_key
        name = fields[at] if at < len(fields) else None
        return lab.identities.get(name) if isinstance(name, str) else None  # type: ignore[call-overload]

    return key_of


def coordinator_only(lab: Lab) -> msgpack.KeyOf:
    """What a coordinator that lies can sign."""
    whole = everybody(lab)

    def key_of(code: int, fields: list[object]) -> keys.SigningKey | None:
        return None if code == Certificate.CODE or code in _BY_DEVICE else whole(code, fields)

    return key_of


def devices_only(lab: Lab) -> msgpack.KeyOf:
    """What devices that lie, all together, can sign."""
    whole = everybody(lab)

    def key_of(code: int, fields: list[object]) -> keys.SigningKey | None:
        return whole(code, fields) if code in _BY_DEVICE else None

    return key_of
