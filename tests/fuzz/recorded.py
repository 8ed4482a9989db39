"""One small round, played in memory once, the same in every process: what its machines were like before each
message, and all that was said. Inputs name messages of it by number."""

import contextlib
import copy
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

from covey_coordinator.round import Round
from covey_device.session import Session
from covey_shared import keys
from covey_shared.messages import DeviceId
from lab import Lab, Mail, Parcel, Play
from simulation import quick_crypto

N, N_PARAMS = 4, 6
DEVICE = DeviceId("pi-000")


class Stream:
    """Chance that can be copied: the copies go on alike. Instances are called like `os.urandom`."""

    def __init__(self, seed: str) -> None:
        self._seed, self._n = seed, 0

    def __call__(self, n: int = 32) -> bytes:
        self._n += 1
        return hashlib.shake_256(f"{self._seed} {self._n}".encode()).digest(n)


def _never_copied(self: object, memo: object) -> object:
    return self


@contextlib.contextmanager
def crypto() -> Iterator[None]:
    """OpenSSL's instead of pycryptodome's; nothing of one input is remembered for the next."""

    def verify(public: bytes, label: str, body: bytes, signature: bytes, *, signer: str) -> None:
        text = keys.DOMAIN + label.encode() + b"\x00" + body
        if not quick_crypto._verified.__wrapped__(public, text, signature):
            raise keys.SignatureError(f"{label} is not signed by {signer}")

    with quick_crypto.quick_crypto(Stream("boxes")), contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(keys, "verify", verify))
        stack.enter_context(
            mock.patch.object(
                keys, "check_agreement_key", quick_crypto.check_agreement_key.__wrapped__
            )
        )
        for kind in (keys.SigningKey, keys.AgreementKey):  # they never change
            stack.enter_context(mock.patch.object(kind, "__deepcopy__", _never_copied, create=True))
        yield


@dataclass(frozen=True)
class Recorded:
    """sessions: of one device, before each message that it received, and what it had published by then;
    rounds: the coordinator's, likewise, and the time. mails: everything that was said. payloads: what was
    uploaded."""

    lab: Lab
    sessions: tuple[tuple[Session, tuple[bytes, ...]], ...]
    rounds: tuple[tuple[Round, float], ...]
    mails: tuple[Mail, ...]
    payloads: dict[str, bytes]


class _Recorder(Play):
    """Keeps copies on the way. One device vanishes before it uploads, so that there is one to recover."""

    def __init__(self, lab: Lab, machine: Round) -> None:
        super().__init__(lab, machine)
        machine._rng = Stream("coordinator")
        self.sessions: list[tuple[Session, tuple[bytes, ...]]] = []
        self.rounds: list[tuple[Round, float]] = []

    def deliver(self, mail: Mail) -> None:
        self.keep()
        super().deliver(mail)

    def deliver_parcel(self, parcel: Parcel) -> None:
        self.keep()
        super().deliver_parcel(parcel)

    def keep(self) -> None:
        session = self.lab.sessions[DEVICE]
        said = tuple(
            action.message.envelope for action in self.actions[DEVICE] if hasattr(action, "message")
        )
        if not self.sessions or (session.phase, said) != (
            self.sessions[-1][0].phase,
            self.sessions[-1][1],
        ):
            self.sessions.append((copy.deepcopy(session), said))
        progress = (self.machine.phase, self.machine.progress)
        last = self.rounds[-1][0] if self.rounds else None
        if last is None or progress != (last.phase, last.progress):
            self.rounds.append((copy.deepcopy(self.machine), self.now))


@functools.cache
def recorded() -> Recorded:
    """The round. Call it under `crypto`, and use it there."""
    lab = Lab(N, n_params=N_PARAMS)
    for name, session in lab.sessions.items():
        session._rng = Stream(name)
    machine = lab.round().machine
    play = _Recorder(lab, machine)
    play.on_train = lambda name: name != lab.names[-1]
    play.run()
    play.keep()
    if play.completed is None:
        raise AssertionError(f"the round to be recorded was abandoned: {play.abandoned}")
    return Recorded(
        lab, tuple(play.sessions), tuple(play.rounds), tuple(play.seen), dict(play.uploads)
    )


def envelopes() -> list[bytes]:
    """What was said in the round, each once."""
    with crypto():
        return list(dict.fromkeys(mail.envelope for mail in recorded().mails))
