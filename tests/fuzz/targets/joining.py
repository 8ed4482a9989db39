"""Enrolment as a device sees it: tokens, frames, and answers of whoever sits at the address.

The first byte of an input says what the rest is: a token, the beginning of a frame, or the answer to one of
the two questions; answers are signed again by the coordinator, unless a bit says that somebody in between
made them.
"""

import contextlib
import random
import ssl
from collections.abc import Iterator

import msgspec
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from covey_coordinator import pki
from covey_device import enrol, tls
from covey_device.config import DeviceConfig
from covey_shared import config, keys, wire
from covey_shared.enrolment import (
    MAX_FRAME_BYTES,
    Enrolled,
    EnrolRefused,
    FleetTrust,
    Token,
    decode_token,
    fingerprint,
    frame,
    frame_size,
)
from covey_shared.errors import ConfigError, MalformedError, RemoteProtocolError
from covey_shared.messages import Certificate, DeviceId
from fuzz import msgpack
from fuzz.harness import Mutate, Run, Target, expect

NOW = 1_900_000_000
DAY = 86_400
COORDINATOR, FLEET_CA, IDENTITY = (keys.SigningKey(bytes((i,)) * 32) for i in (1, 2, 3))
TLS_KEY = enrol._tls_key(ec.derive_private_key(12345, ec.SECP256R1()))


def authority() -> pki.Authority:
    """A broker authority whose key is always the same, so that what it signed once holds for ever."""
    made = pki.make_authority("lab", NOW - DAY)
    key = ec.derive_private_key(6789, ec.SECP256R1())
    subject = made.certificate.subject
    builder = pki._builder(
        subject, subject, key.public_key(), key.public_key(), NOW - DAY, NOW + 9000 * DAY
    )
    for extension in made.certificate.extensions:
        if extension.oid.dotted_string in ("2.5.29.19", "2.5.29.15"):
            builder = builder.add_extension(extension.value, critical=extension.critical)
    return pki.Authority(builder.sign(key, hashes.SHA256()), key)


class _World:
    """What a device knows after the first question."""

    def __init__(self) -> None:
        self.authority = authority()
        self.tls_ca = self.authority.certificate.public_bytes(serialization.Encoding.DER)
        self.trust = FleetTrust("lab", FLEET_CA.public, COORDINATOR.public, self.tls_ca)
        pinned = fingerprint(wire.body_of(self.trust))
        self.token = Token("coordinator.lan", 8884, pinned, bytes(16))

    def enrolled(self) -> Enrolled:
        certificate = wire.sign(
            Certificate("lab", DeviceId("pi-1"), IDENTITY.public, NOW - DAY, NOW + DAY), FLEET_CA
        )
        tls_certificate = pki.client_certificate(
            self.authority, TLS_KEY.csr, "pi-1", days=30, now_unix=NOW
        )
        return Enrolled(
            fleet="lab",
            device=DeviceId("pi-1"),
            identity=IDENTITY.public,
            tls_certificate=tls_certificate,
            certificate=certificate.envelope,
            broker_url="mqtts://coordinator.lan:8883",
        )

    def key_of(self, code: int, fields: list[object]) -> keys.SigningKey | None:
        return FLEET_CA if code == Certificate.CODE else COORDINATOR

    # -- what a device does with bytes ---------------------------------------------------------------

    def read_token(self, data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        try:
            token = decode_token(text)
        except ConfigError as error:
            secret = text.rpartition(":")[2].strip()
            expect(len(secret) < 12 or secret not in str(error), "an error that quotes the secret")
            raise MalformedError(str(error)) from error
        expect(decode_token(token.encode()) == token, "a token does not come back")
        expect(len(token.secret) == 16 and len(token.fingerprint) == 32, "sizes in a token")

    def read_frame(self, data: bytes) -> None:
        size = frame_size(data[:4])
        expect(0 < size <= MAX_FRAME_BYTES, "a frame beyond the limit")
        expect(
            frame(data[4 : 4 + size])[:4] == data[:4] or len(data) - 4 < size, "a frame's length"
        )

    def read_trust(self, data: bytes, *, expected: bool, sealed: bool) -> None:
        token = self.token
        if sealed:
            data = msgpack.resealed(data, self.key_of)
            pinned = fingerprint(data[msgpack.PREFIX :])
            token = msgspec_replace(token, pinned)
        trust = enrol.believed(data, token, FLEET_CA.public.hex()[:8] if expected else None)
        expect(fingerprint(wire.body_of(trust)) == token.fingerprint, "believed what is not pinned")
        with contextlib.suppress(ssl.SSLError, ValueError):  # what `join` makes a RefusedError of
            tls.pinned(trust.tls_ca, lambda: NOW)

    def read_answer(self, data: bytes, *, sealed: bool) -> None:
        if sealed:
            data = msgpack.resealed(data, self.key_of)
        enrolled = enrol.granted(
            data, fleet="lab", identity=IDENTITY.public, coordinator=COORDINATOR.public
        )
        if enrolled.certificate:
            certificate = enrol.check_identity_certificate(
                enrolled.certificate,
                fleet="lab",
                fleet_ca=FLEET_CA.public,
                device=enrolled.device,
                identity=IDENTITY.public,
                now_unix=NOW,
            )
            expect(certificate.device == enrolled.device, "another's certificate")
        enrol._check_broker(enrolled.broker_url)
        # The files that `join` writes can be read.
        table = enrol.device_toml(self.token, self.trust, enrolled, "enrolment-1", None, None)
        written = config.parse(enrol.toml(table), DeviceConfig, file="device.toml")
        expect(written.broker.url == enrolled.broker_url, "another broker is written")
        enrol.check_tls_certificate(
            enrolled.tls_certificate,
            self.tls_ca,
            device=enrolled.device,
            public=TLS_KEY.public,
            now_unix=NOW,
        )


def msgspec_replace(token: Token, pinned: bytes) -> Token:
    """The same token, with another hash."""
    return Token(token.host, token.port, pinned, token.secret)


@contextlib.contextmanager
def ready() -> Iterator[Run]:
    """A device in the middle of `join`."""
    world = _World()

    def read(data: bytes) -> list[str]:
        if not data:
            return []
        kind, rest = data[0], data[1:]
        names = ("token", "frame", "trust", "answer")
        name = names[kind % 4]
        try:
            match name:
                case "token":
                    world.read_token(rest)
                case "frame":
                    world.read_frame(rest)
                case "trust":
                    world.read_trust(rest, expected=bool(kind & 8), sealed=not kind & 4)
                case _:
                    world.read_answer(rest, sealed=not kind & 4)
        except RemoteProtocolError as error:
            expect(len(str(error)) < 4096, "an error that is no line")
            return [f"{name} {error}"]
        return [f"a sound {name}"]

    yield read


def _mutate(data: bytes, longest: int, chance: random.Random, mutate: Mutate) -> bytes:
    if not data or data[0] % 4 < 2 or chance.random() < 0.05:
        return mutate(data, longest)
    return data[:1] + msgpack.mutated_envelope(data[1:], chance, mutate, longest - 1)


def _seeds() -> Iterator[bytes]:
    world = _World()
    yield b"\x00" + world.token.encode().encode()
    yield b"\x00" + Token("2001:db8::1", 1, bytes(range(32)), bytes(range(16))).encode().encode()
    yield b"\x00covey1:h:" + b"1" * 4400 + b":a:b"
    yield b"\x01" + frame(b"an envelope")
    trust, refused = (
        wire.sign(message, COORDINATOR).envelope
        for message in (world.trust, EnrolRefused("lab", "no \x1b[2J"))
    )
    answer = wire.sign(world.enrolled(), COORDINATOR).envelope
    waiting = msgspec.structs.replace(world.enrolled(), certificate=b"")
    for kind in (2, 6, 10):
        yield bytes((kind,)) + trust
        yield bytes((kind,)) + refused
    for kind in (3, 7):
        yield bytes((kind,)) + answer
        yield bytes((kind,)) + refused
        yield bytes((kind,)) + wire.sign(waiting, COORDINATOR).envelope


TARGET = Target(
    "joining",
    ready,
    # Up to MAX_DER_BYTES of certificates, decoded, encoded again and written as text; OpenSSL's memory is not
    # counted here, but by libFuzzer's limit.
    memory=lambda n: 512 * 1024 + 96 * n,
    seeds=_seeds,
    mutate=_mutate,
    words=(b"covey1:", b"[::1]", b"mqtts://", b"mqtt://"),
    longest=6000,
)
