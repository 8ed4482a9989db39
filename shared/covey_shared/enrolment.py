"""Enrolment: the messages by which a device joins a fleet, and the token that lets it.

Unlike a round's messages they go over a TLS connection of their own, straight between device and
coordinator: one request and one answer each, behind a four-byte length (`frame`). Which:

===============  ========================  ========================================================
message          from -> to                says
===============  ========================  ========================================================
WhoIsThere       device -> coordinator     tell me whom this fleet trusts
FleetTrust       coordinator -> device     the keys and the authority that a device pins
EnrolRequest     device -> coordinator     I hold this token; certify my keys
RenewRequest     device -> coordinator     certify my keys again (over mutual TLS)
Enrolled         coordinator -> device     your certificates, and where the broker is
EnrolRefused     coordinator -> device     no, and why
IdentityRequest  coordinator -> fleet CA   certify these identities (in a file, carried by hand)
RenewalWanted    coordinator -> device     ask for new certificates now (over MQTT, in its inbox)
===============  ========================  ========================================================

The token names the coordinator's address, pins the hash of its FleetTrust, and carries a secret that
works once. So a device that was given it needs nothing else, and nobody between the two can put other
keys into its hands: it asks WhoIsThere of whoever answers at the address, believes the answer only if
its hash is the token's, and gives the secret away only over a connection that the authority in that
answer vouches for.
"""

import base64
import binascii
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from msgspec import Meta

from covey_shared import keys
from covey_shared.errors import ConfigError, MalformedError
from covey_shared.messages import (
    MAX_ENVELOPE_BYTES,
    Bytes16,
    Bytes32,
    Device,
    FleetName,
    Message,
    Reason,
    Unix,
)

MAX_FRAME_BYTES = 16 * 1024
"""Of one enrolment message; bounds what either side reads before it knows who is there."""

MAX_DER_BYTES = 4096
TOKEN_PREFIX = "covey1"  # noqa: S105  (no secret: what every token begins with)

Der = Annotated[bytes, Meta(min_length=1, max_length=MAX_DER_BYTES)]
Url = Annotated[str, Meta(min_length=1, max_length=300)]
MaybeEnvelope = Annotated[bytes, Meta(max_length=MAX_ENVELOPE_BYTES)]
MaybeDer = Annotated[bytes, Meta(max_length=MAX_DER_BYTES)]


class WhoIsThere(Message, frozen=True):
    """The first question, asked of a stranger: its signature is not checked. fingerprint: the one that
    the token pins, so that a coordinator can tell a device that came to the wrong one."""

    CODE: ClassVar[int] = 64
    LABEL: ClassVar[str] = "who is there"

    fingerprint: Bytes32


class FleetTrust(Message, frozen=True):
    """What a device pins. tls_ca: DER certificate of the authority of the broker's connections."""

    CODE: ClassVar[int] = 65
    LABEL: ClassVar[str] = "fleet trust"

    fleet: FleetName
    fleet_ca: Bytes32
    coordinator: Bytes32
    tls_ca: Der


class EnrolRequest(Message, frozen=True):
    """Signed with the identity it asks for. csr: DER PKCS#10 of the TLS key; its subject is ignored."""

    CODE: ClassVar[int] = 66
    LABEL: ClassVar[str] = "enrol request"

    fleet: FleetName
    secret: Bytes16
    identity: Bytes32
    csr: Der


class RenewRequest(Message, frozen=True):
    """Signed with the identity that is registered. csr: empty to ask for the identity's alone."""

    CODE: ClassVar[int] = 67
    LABEL: ClassVar[str] = "renew request"

    fleet: FleetName
    device: Device
    identity: Bytes32
    csr: MaybeDer


class Enrolled(Message, frozen=True):
    """tls_certificate: DER; empty if none was asked for. certificate: the identity's envelope; empty
    while the fleet CA, on another machine, has yet to sign it. broker_url: where rounds are."""

    CODE: ClassVar[int] = 68
    LABEL: ClassVar[str] = "enrolled"

    fleet: FleetName
    device: Device
    identity: Bytes32
    tls_certificate: MaybeDer
    certificate: MaybeEnvelope
    broker_url: Url


class EnrolRefused(Message, frozen=True):
    """No certificate."""

    CODE: ClassVar[int] = 69
    LABEL: ClassVar[str] = "enrol refused"

    fleet: FleetName
    reason: Reason


class IdentityRequest(Message, frozen=True):
    """What `covey ca sign` is given. days: how long the certificate shall last."""

    CODE: ClassVar[int] = 70
    LABEL: ClassVar[str] = "identity request"

    fleet: FleetName
    device: Device
    identity: Bytes32
    days: Annotated[int, Meta(ge=1, le=3650)]


class RenewalWanted(Message, frozen=True):
    """The operator wants new certificates on this device. At worst, replayed, it makes for one more
    renewal; a device answers it at most once an hour."""

    CODE: ClassVar[int] = 71
    LABEL: ClassVar[str] = "renewal wanted"

    fleet: FleetName
    device: Device
    issued_unix: Unix


ALL: tuple[type[Message], ...] = (
    WhoIsThere,
    FleetTrust,
    EnrolRequest,
    RenewRequest,
    Enrolled,
    EnrolRefused,
    IdentityRequest,
    RenewalWanted,
)


def fingerprint(body: bytes) -> bytes:
    """What a token pins: 32 bytes that commit to every key a device will believe. body: of the
    FleetTrust message, without its signature."""
    return keys.digest("fleet trust", body)


def frame(envelope: bytes) -> bytes:
    """An envelope behind its length (4 bytes, big-endian), as it goes over the connection."""
    return len(envelope).to_bytes(4, "big") + envelope


def frame_size(prefix: bytes) -> int:
    """The length that a frame's first four bytes announce. Raises MalformedError beyond the limit."""
    size = int.from_bytes(prefix, "big")
    if len(prefix) != 4 or not 0 < size <= MAX_FRAME_BYTES:
        raise MalformedError(f"an enrolment message has 1 to {MAX_FRAME_BYTES} bytes, not {size}")
    return size


@dataclass(frozen=True, slots=True)
class Token:
    """One line that lets one device join. host, port: the coordinator's. secret: 16 bytes; whoever
    has it first, and before it expires, becomes the device it was made for."""

    host: str
    port: int
    fingerprint: bytes
    secret: bytes = field(repr=False)

    def encode(self) -> str:
        """covey1:HOST:PORT:FINGERPRINT:SECRET; the last two in URL-safe base64, IPv6 in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return ":".join(
            (TOKEN_PREFIX, host, str(self.port), _base64(self.fingerprint), _base64(self.secret))
        )


def decode_token(text: str) -> Token:
    """Raises ConfigError that says what is wrong, and never quotes the secret."""
    text = "".join(text.split())  # a terminal may have wrapped it
    head, _, rest = text.partition(":")
    where, _, tail = rest.rpartition(":")
    where, _, pinned = where.rpartition(":")
    host, _, port = where.rpartition(":")
    if head != TOKEN_PREFIX or not host:
        raise ConfigError(
            "this is no enrolment token: copy the whole line that `covey device token` printed, "
            f"from {TOKEN_PREFIX}: on"
        )
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    digits = port.isascii() and port.isdigit() and len(port) <= 5  # int() refuses thousands of them
    if not digits or not 0 < int(port) < 65536 or len(host) > 255:
        raise ConfigError("the token's address is damaged: copy the whole line again")
    token_hash, secret = _unbase64(pinned), _unbase64(tail)
    if len(token_hash) != 32 or len(secret) != keys.SEED_BYTES:
        raise ConfigError("the token is cut short or damaged: copy the whole line again")
    return Token(host, int(port), token_hash, secret)


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unbase64(text: str) -> bytes:
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
    return data if _base64(data) == text else b""
