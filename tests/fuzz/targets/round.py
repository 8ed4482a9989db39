"""The coordinator's machine, in any state of a round, fed with what a broker or devices that lie may send."""

import contextlib
import copy
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

from covey_coordinator.round import Abandoned, Completed, Expect, Publish, Round
from covey_shared import wire
from covey_shared.errors import RemoteProtocolError
from covey_shared.messages import MaskedUpdate
from covey_shared.secagg.cohort import Cohort
from fuzz import msgpack, program
from fuzz.harness import Run, Target, expect
from fuzz.recorded import N, Recorded, crypto, recorded
from lab import NOW_UNIX, Lab

KINDS = 8
RECORDED, RAW, BY_ALL, BY_DEVICES, TICK, PRESENCE, UPLOAD, OWN_UPLOAD = range(KINDS)


class _Play:
    def __init__(self, known: Recorded, state: int) -> None:
        self.known = known
        self.lab: Lab = known.lab
        self.mails = [mail for mail in known.mails if mail.sender is not None]
        machine, self.now = known.rounds[state % len(known.rounds)]
        self.round: Round = copy.deepcopy(machine)
        self.expected = {device: action.payload for device, action in self._awaited(self.round)}
        self.ended: list[Any] = []

    def _awaited(self, machine: Round) -> list[tuple[Any, Any]]:
        cohort: Cohort | None = machine.cohort
        if cohort is None:
            return []
        return [(cohort.peers[i].device, update.message) for i, update in machine._updates.items()]

    def step(self, step: program.Step) -> str:
        names = self.lab.names
        name = names[step.argument % len(names)]
        match step.kind % KINDS:
            case 0:
                mail = self.mails[step.argument % len(self.mails)]
                return self.receive(mail.envelope, mail.sender)
            case 2:
                return self.receive(
                    msgpack.resealed(step.payload, program.everybody(self.lab)), name
                )
            case 3:
                data = msgpack.resealed(step.payload, program.devices_only(self.lab))
                return self.receive(data, self.named(data) if step.argument & 8 else name)
            case 4:
                self.now += step.argument / 8
                return self.did(self.round.tick(self.now, NOW_UNIX))
            case 5:
                return self.did(
                    self.round.presence(name, bool(step.argument & 16), self.now, NOW_UNIX)
                )
            case 6:
                return self.upload(name, self.known.payloads.get(name, b""))
            case 7:
                return self.own_upload(name, step.payload)
        return self.receive(step.payload, name)

    def named(self, data: bytes) -> Any:
        """The device that a message names."""
        with contextlib.suppress(RemoteProtocolError):
            message = wire.decode(data).message
            return (
                getattr(message, "device", None)
                or getattr(message, "member", None)
                or self.lab.names[0]
            )
        return self.lab.names[0]

    def receive(self, data: bytes, sender: Any) -> str:
        before = self.facts()
        try:
            actions = self.round.receive(data, sender, self.now, NOW_UNIX)
        except RemoteProtocolError as error:
            expect(self.facts() == before, "a refused message changed something")
            return f"refused {error}"
        return self.did(actions)

    def facts(self) -> tuple[Any, ...]:
        machine = self.round
        kept = (machine._check_ins, machine._shares, machine._roster_votes, machine._updates)
        kept += (machine._view_votes, machine._reveals, machine._declined)  # type: ignore[assignment]
        return machine.phase, machine.progress, tuple(map(len, kept))

    def upload(self, name: Any, payload: bytes) -> str:
        """The service hands over what has the digest that was announced, and nothing else."""
        if self.expected.get(name) != hashlib.sha256(payload).digest():
            return "no such upload"
        try:
            return self.did(self.round.uploaded(name, payload, self.now, NOW_UNIX))
        except RemoteProtocolError as error:
            return f"upload refused {error}"

    def own_upload(self, name: Any, payload: bytes) -> str:
        """A device announces bytes of its own choice, and sends them."""
        cohort = self.round.cohort
        if cohort is None:
            return ""
        like = self.known.payloads[self.lab.names[0]]
        if len(payload) % 2:
            payload = (payload + bytes(len(like)))[: len(like)]
        size = max(1, len(payload))
        digest = hashlib.sha256(payload).digest()
        update = MaskedUpdate(cohort.h, name, cohort.bitmap(self.round.roster), digest, size)
        said = self.receive(wire.sign(update, self.lab.identities[name]).envelope, name)
        return f"{said} {self.upload(name, payload)}"

    def did(self, actions: list[Any]) -> str:
        for action in actions:
            match action:
                case Publish(message):
                    wire.decode(message.envelope)
                case Expect():
                    self.expected[action.device] = action.payload
                case Completed():
                    self.ended.append(action)
                    expect(len(action.survivors) >= self.round.spec.call.n_min, "a sum of too few")
                    ring_sum = action.ring_sum
                    self.round.publish_result(hashlib.sha256(ring_sum.tobytes()).digest(), ring_sum)
                case Abandoned():
                    self.ended.append(action)
        expect(len(self.ended) <= 1, "a round that ended twice")
        facts = self.facts()
        expect(max(facts[2]) <= N, "more was kept than there are devices")
        expect(len(actions) <= 8 * N, "many actions at once")
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
                phase = play.round.phase.value
                trail.append(f"{phase}: {step.kind % KINDS} {play.step(step)}")
            return trail

        yield read


@functools.cache
def _envelopes() -> list[bytes]:
    with crypto():
        return list(dict.fromkeys(m.envelope for m in recorded().mails if m.sender is not None))


def _seeds() -> Iterator[bytes]:
    with crypto():
        known = recorded()
    mails = [mail for mail in known.mails if mail.sender is not None]
    names = known.lab.names
    for state in range(len(known.rounds)):
        for start in range(0, len(mails), 8):
            steps = [program.Step(RECORDED, i) for i in range(start, min(start + 8, len(mails)))]
            yield program.written(state, steps)
        yield program.written(state, [program.Step(TICK, 255)] * 4)
        yield program.written(
            state, [program.Step(PRESENCE, i) for i in range(N)] + [program.Step(TICK, 99)]
        )
        yield program.written(state, [program.Step(UPLOAD, i) for i in range(N)])
        yield program.written(state, [program.Step(OWN_UPLOAD, i, bytes(1)) for i in range(N)])
    for mail in mails:
        sender = mail.sender
        if sender is not None:
            step = program.Step(BY_DEVICES, 8 | names.index(sender), mail.envelope)
            for state in range(0, len(known.rounds), 8):
                yield program.written(state, [step])


TARGET = Target(
    "round",
    ready,
    # A copy of the machine, of each message its values, and what is said to each device.
    memory=lambda n: 1024 * 1024 + 100 * n,
    seeds=_seeds,
    mutate=program.mutator(KINDS, frozenset((RAW, BY_ALL, BY_DEVICES)), _envelopes),
    longest=8 * 1024,
)
