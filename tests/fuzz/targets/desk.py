"""The coordinator's enrolment desk: any request, from anybody, with or without a certificate.

The first byte of an input says who is at the other end and whether the request is signed again by the
identity it names, the second what the time is; the rest is the request. The fleet's directory is put back
after each.
"""

import contextlib
import logging
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import msgspec

from covey_coordinator.config import BrokerConfig, EnrolConfig
from covey_coordinator.devices import DeviceRecord, Grant, Revoked
from covey_coordinator.enrolment.desk import EnrolmentDesk, FailureLimit, Peer
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.tokens import TokenRecord
from covey_shared import enrolment, keys, wire
from covey_shared.enrolment import (
    Enrolled,
    EnrolRefused,
    EnrolRequest,
    FleetTrust,
    RenewRequest,
    WhoIsThere,
)
from covey_shared.messages import Certificate, DeviceId
from fuzz import msgpack
from fuzz.harness import Mutate, Run, Target, expect
from fuzz.targets.joining import TLS_KEY

NOW = 1_900_000_000
DAY = 86_400
IDENTITIES = {key.public: key for key in (keys.SigningKey(bytes((i,)) * 32) for i in range(10, 16))}
PUBLIC = list(IDENTITIES)
UNUSED, USED, EXPIRED, AGAIN, TAKEN = (bytes((i,)) * 16 for i in range(5))
SERIAL = 0x1234

_TIMES = (0, 1, 3600, DAY, 61 * DAY, 89 * DAY, 91 * DAY, 400 * DAY, -DAY, -NOW)
_PEERS = (
    Peer("10.0.0.7"),
    Peer("fe80::1%eth0", "pi-2", SERIAL),
    Peer("10.0.0.8", "pi-2", SERIAL + 1),
    Peer("2001:db8::7", "pi-1", 1),
)


def made_fleet(path: Path) -> FleetDirectory:
    """A fleet with tokens of each kind, a device that has joined, and one that was revoked."""
    fleet = FleetDirectory.create(
        path,
        "lab",
        BrokerConfig(),
        addresses=("coordinator.lan",),
        enrol=EnrolConfig(),
        now_unix=NOW - DAY,
    )
    for secret, device, changes in (
        (UNUSED, "pi-1", {}),
        (USED, "pi-2", {"used_by": PUBLIC[1].hex(), "used_unix": NOW - 5, "uses": 1}),
        (EXPIRED, "pi-3", {"expires_unix": NOW - 1}),
        (AGAIN, "pi-2", {"again": True}),
        (TAKEN, "pi-4", {}),
    ):
        record = TokenRecord(device=DeviceId(device), made_unix=NOW - DAY, expires_unix=NOW + DAY)
        fleet.tokens.add(secret, msgspec.structs.replace(record, **changes))  # type: ignore[arg-type]
    fleet.tokens.add(
        UNUSED, TokenRecord(device=DeviceId("pi-1"), made_unix=NOW, expires_unix=NOW + DAY)
    )
    for name, public in (("pi-2", PUBLIC[1]), ("pi-4", PUBLIC[2])):
        grant = Grant(serial=f"{SERIAL:x}", not_after_unix=NOW + 60 * DAY)
        fleet.book.save(
            DeviceRecord(
                device=DeviceId(name),
                identity=public.hex(),
                enrolled_unix=NOW - DAY,
                grants=[grant],
            )
        )
    fleet.book.revoke(
        Revoked(device=DeviceId("pi-4"), identity=PUBLIC[2].hex(), unix=NOW, grants=[])
    )
    return fleet


class Directory:
    """What is in a directory, to be put back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = {file: file.read_bytes() for file in self._files()}
        self.modes = {file: file.stat().st_mode & 0o777 for file in self.kept}
        self.stamps = self._stamps()

    def _files(self) -> list[Path]:
        return [file for file in self.path.rglob("*") if file.is_file()]

    def _stamps(self) -> dict[Path, tuple[int, int]]:
        return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in self._files()}

    def restore(self) -> None:
        """Only what changed is written."""
        now = self._stamps()
        if now == self.stamps:
            return
        for file in now.keys() - self.kept.keys():
            file.unlink()
        for file, data in self.kept.items():
            if now.get(file) != self.stamps[file]:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.unlink(missing_ok=True)
                file.write_bytes(data)
                file.chmod(self.modes[file])
        self.stamps = self._stamps()


def _key_of(code: int, fields: list[object]) -> keys.SigningKey | None:
    at = {EnrolRequest.CODE: 2, RenewRequest.CODE: 2}.get(code)
    if at is None or at >= len(fields) or not isinstance(fields[at], bytes):
        return None
    return IDENTITIES.get(fields[at])  # type: ignore[call-overload,no-any-return]


class _Judge:
    def __init__(self, folder: Path) -> None:
        self.fleet = made_fleet(folder)
        self.directory = Directory(folder)
        self.said: list[str] = []
        self.desk = EnrolmentDesk(self.fleet, self.said.append)
        self.coordinator = self.fleet.coordinator_key().public

    def __call__(self, data: bytes) -> list[str]:
        if len(data) < 2:
            return []
        peer, now = _PEERS[data[0] % 4], NOW + _TIMES[data[1] % len(_TIMES)]
        request = data[2:]
        if not data[0] & 4:
            request = msgpack.resealed(request, _key_of)
        self.desk._limit = FailureLimit()
        trail = []
        try:
            for _ in range(2):  # an answer may get lost, and the same request come again
                answer = self.desk.handle(request, peer, now)
                trail.append(self.judged(answer, request, now))
        finally:
            self.directory.restore()
            self.said.clear()
        return trail

    def judged(self, answer: bytes, request: bytes, now: int) -> str:
        """An answer is one of three, signed, and small; certificates go to whom they are due."""
        expect(
            len(enrolment.frame(answer)) <= 4 + enrolment.MAX_FRAME_BYTES,
            "an answer too long to read",
        )
        signed = wire.decode(answer)
        signed.check(self.coordinator, signer="the coordinator")
        message = signed.message
        if isinstance(message, EnrolRefused):
            expect("trouble" not in message.reason, "what a peer sent is the coordinator's trouble")
            return f"refused {message.reason}"
        if isinstance(message, FleetTrust):
            return "trust"
        expect(isinstance(message, Enrolled), "another kind of answer")
        assert isinstance(message, Enrolled)
        asked = wire.decode(request)
        asked.check(message.identity, signer="whom the certificate is for")
        expect(message.identity != PUBLIC[2], "a certificate for who was revoked")
        if isinstance(asked.message, EnrolRequest):
            due = {UNUSED: "pi-1", AGAIN: "pi-2"}
            due |= {USED: "pi-2"} if message.identity == PUBLIC[1] else {}
            expect(due.get(asked.message.secret) == message.device, "a certificate without a token")
            expect(now < NOW + DAY, "a certificate for a token that has expired")
        else:
            expect((message.device, message.identity) == ("pi-2", PUBLIC[1]), "renewed for another")
        if message.certificate:
            certificate = wire.opened(
                Certificate, message.certificate, self.fleet.trust.ca, signer="the fleet CA"
            ).message
            expect(certificate.identity == message.identity, "an identity certificate of another")
        return f"enrolled {message.device}"


@contextlib.contextmanager
def ready() -> Iterator[Run]:
    """A networked fleet. Nothing waits for a disk."""
    memory = Path("/dev/shm")
    log = logging.getLogger("covey.enrolment")
    level = log.level
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        mock.patch.object(os, "fsync", return_value=None),
    ):
        log.setLevel(logging.CRITICAL)
        try:
            yield _Judge(Path(folder) / "fleet")
        finally:
            log.setLevel(level)


def _mutate(data: bytes, longest: int, chance: random.Random, mutate: Mutate) -> bytes:
    if len(data) < 3 or chance.random() < 0.03:
        return mutate(data, longest)
    head = data[:2]
    if chance.random() < 0.2:
        head = bytes((chance.randrange(8), chance.randrange(len(_TIMES))))
    rest = msgpack.mutated_envelope(data[2:], chance, mutate, longest - 2)
    fields = msgpack.unpacked(rest[msgpack.PREFIX :])
    if isinstance(fields, list) and len(fields) == 4 and chance.random() < 0.3:
        fields[1] = chance.choice(
            (fields[1], UNUSED, USED, EXPIRED, AGAIN, TAKEN, "pi-1", "pi-2", "pi-4")
        )
        fields[2] = chance.choice(PUBLIC)
        rest = rest[: msgpack.PREFIX] + msgpack.packed(fields)
    return (head + rest)[:longest]


def _seeds() -> Iterator[bytes]:
    for public, key in IDENTITIES.items():
        for secret in (UNUSED, USED, EXPIRED, AGAIN, TAKEN):
            request = EnrolRequest("lab", secret, public, TLS_KEY.csr)
            yield b"\x00\x00" + wire.sign(request, key).envelope
        for device in ("pi-1", "pi-2", "pi-4"):
            for csr in (TLS_KEY.csr, b""):
                renewal = RenewRequest("lab", DeviceId(device), public, csr)
                for when in range(0, len(_TIMES), 4):
                    yield bytes((1, when)) + wire.sign(renewal, key).envelope
    yield b"\x00\x00" + wire.sign(WhoIsThere(bytes(32)), next(iter(IDENTITIES.values()))).envelope


def _memory(n: int) -> int:
    # Records of all devices and tokens, certificates as text and as objects; OpenSSL's memory is not counted
    # here, but by libFuzzer's limit.
    return 1024 * 1024 + 100 * n


TARGET = Target(
    "desk",
    ready,
    memory=_memory,
    seeds=_seeds,
    mutate=_mutate,
    words=(b"\x30\x82", *PUBLIC),
    longest=6000,
)
