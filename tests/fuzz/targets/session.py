"""A device's machine, in any state of a round, fed with what a broker or a coordinator that lies may send."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from covey_device.session import Publish, Session
from covey_shared import wire
from covey_shared.errors import RemoteProtocolError
from covey_shared.messages import MaskedUpdate, Message, Reveal, RosterVote, Shares, ViewVote
from fuzz import msgpack, program
from fuzz.harness import Run, Target, expect
from fuzz.recorded import N_PARAMS, Recorded, crypto, recorded
from lab import Lab

try:
    from covey_device.session import Prepared
except ImportError:  # pragma: no cover
    from covey_device.actions import Prepared  # type: ignore[no-redef]

KINDS = 6
RECORDED, RAW, BY_ALL, BY_COORDINATOR, EVENT, RAW_TOO = range(KINDS)
_ONCE: tuple[type[Message], ...] = (Shares, RosterVote, MaskedUpdate, ViewVote, Reveal)
"""What a device signs once for a manifest, and never in two versions."""


class _Play:
    def __init__(self, known: Recorded, state: int) -> None:
        self.lab: Lab = known.lab
        self.mails = [mail.envelope for mail in known.mails if mail.sender is None]
        session, said = known.sessions[state % len(known.sessions)]
        self.session: Session = copy.deepcopy(session)
        self.signed: dict[tuple[type[Message], bytes], bytes] = {}
        for envelope in said:
            self.said(envelope)

    def said(self, envelope: bytes) -> None:
        """A message that the device published."""
        signed = wire.decode(envelope)
        if isinstance(signed.message, _ONCE):
            place = (type(signed.message), signed.message.h)
            before = self.signed.setdefault(place, signed.body)
            expect(
                before == signed.body, f"two versions of a {signed.message.LABEL} for one manifest"
            )

    def step(self, step: program.Step) -> str:
        kind = step.kind % KINDS
        match kind:
            case program_kind if program_kind == RECORDED:
                return self.receive(self.mails[step.argument % len(self.mails)])
            case program_kind if program_kind == BY_ALL:
                return self.receive(msgpack.resealed(step.payload, program.everybody(self.lab)))
            case program_kind if program_kind == BY_COORDINATOR:
                return self.receive(
                    msgpack.resealed(step.payload, program.coordinator_only(self.lab))
                )
            case program_kind if program_kind == EVENT:
                return self.did(self.event(step.argument))
        return self.receive(step.payload)

    def receive(self, data: bytes) -> str:
        before = self.facts()
        try:
            actions = self.session.receive(data)
        except RemoteProtocolError as error:
            expect(self.facts() == before, "a refused message changed something")
            return f"refused {error}"
        return self.did(actions)

    def facts(self) -> tuple[Any, ...]:
        session = self.session
        return session.phase, session.round_id, session._memory

    def event(self, argument: int) -> list[Any]:
        session = self.session
        round_id = session.round_id or 1
        match argument % 4:
            case 0:
                return session.ready(round_id, Prepared(N_PARAMS, 1, 1))
            case 1:
                return session.trained(round_id, np.full(N_PARAMS, 0.25, np.float32), 10, (1.0,))
            case 2:
                return session.training_failed(round_id, "the loss is no number \udcff")
            case _:
                return session.leave(round_id, "its data is gone")

    def did(self, actions: list[Any]) -> str:
        expect(len(actions) <= 8, "many actions at once")
        for action in actions:
            if isinstance(action, Publish):
                self.said(action.message.envelope)
        return " ".join(type(action).__name__ for action in actions)


@contextlib.contextmanager
def ready() -> Iterator[Run]:
    """A round was recorded; each input goes on from a copy."""
    with crypto():
        known = recorded()

        def read(data: bytes) -> list[str]:
            state, steps = program.parsed(data)
            play, trail = _Play(known, state), []
            for step in steps:
                phase = play.session.phase.value
                trail.append(f"{phase}: {step.kind % KINDS} {play.step(step)}")
            return trail

        yield read


@functools.cache
def _envelopes() -> list[bytes]:
    with crypto():
        return list(dict.fromkeys(m.envelope for m in recorded().mails if m.sender is None))


def _seeds() -> Iterator[bytes]:
    with crypto():
        n_states = len(recorded().sessions)
        n_mails = len([mail for mail in recorded().mails if mail.sender is None])
    envelopes = _envelopes()
    for state in range(n_states):
        for start in range(0, n_mails, 8):
            steps = [program.Step(RECORDED, i) for i in range(start, min(start + 8, n_mails))]
            yield program.written(state, steps)
        for envelope in envelopes if state % 2 else ():
            yield program.written(state, [program.Step(BY_ALL, 0, envelope)])
    for event in range(4):
        yield program.written(
            0, [program.Step(RECORDED, 0), program.Step(EVENT, 0), program.Step(EVENT, event)]
        )


TARGET = Target(
    "session",
    ready,
    # A copy of the machine, and of each message its values and its answer.
    memory=lambda n: 1024 * 1024 + 100 * n,
    seeds=_seeds,
    mutate=program.mutator(KINDS, frozenset((RAW, BY_ALL, BY_COORDINATOR)), _envelopes),
    longest=8 * 1024,
)
