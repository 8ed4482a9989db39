"""The enrolment desk: one request in, one signed answer out. No sockets and no clock.

A token is spent before anything is issued: who was first is on disk, so that neither a second request
at the same moment nor a power cut gives it to another. The same identity may ask again until the token
ends, since its answer may have been lost.
"""

import hmac
import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from covey_coordinator import pki
from covey_coordinator.config import FleetConfig, load_fleet
from covey_coordinator.devices import (
    DeviceRecord,
    Refusal,
    Revoked,
    revoked_identities,
)
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.fleet_ca import certify
from covey_coordinator.tokens import TokenRecord
from covey_shared import enrolment, wire
from covey_shared.enrolment import (
    Enrolled,
    EnrolRefused,
    EnrolRequest,
    IdentityRequest,
    RenewRequest,
    WhoIsThere,
)
from covey_shared.errors import (
    ConfigError,
    MalformedError,
    RefusedError,
    RemoteProtocolError,
    StorageError,
)
from covey_shared.keys import in_groups
from covey_shared.messages import MAX_REASON_CHARS, Certificate, DeviceId, Message, for_display

log = logging.getLogger("covey.enrolment")

MAX_GRANTS = 50
"""TLS certificates of one device that have not ended; so bounds what a mad one can have issued."""

FAILURES = 5
FAILURES_WINDOW_S = 60
MAX_ADDRESSES = 10_000


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end. address: theirs. name, serial: of the TLS client certificate that was
    verified against the broker authority; None without one."""

    address: str
    name: str | None = None
    serial: int | None = None


@dataclass(slots=True)
class FailureLimit:
    """How often an address may show a token that is none, before it has to wait. An IPv6 host has a
    whole /64 to itself, which counts as one."""

    _failures: dict[str, list[float]] = field(default_factory=dict)

    def exhausted(self, address: str, now_unix: float) -> bool:
        """Whether it has to wait."""
        return len(self._recent(network_of(address), now_unix)) >= FAILURES

    def failed(self, address: str, now_unix: float) -> None:
        """Count one."""
        network = network_of(address)
        recent = [*self._recent(network, now_unix), now_unix]
        if network not in self._failures and len(self._failures) >= MAX_ADDRESSES:
            self._failures.pop(next(iter(self._failures)))
        self._failures[network] = recent[-FAILURES:]

    def _recent(self, network: str, now_unix: float) -> list[float]:
        times = self._failures.pop(network, [])
        recent = [t for t in times if 0 <= now_unix - t < FAILURES_WINDOW_S]
        if recent:
            self._failures[network] = recent
        return recent


class EnrolmentDesk:
    """One fleet's. say: tells the operator, a line each. Not for two threads at once."""

    def __init__(self, fleet: FleetDirectory, say: Callable[[str], None] = lambda line: None):
        """Raises ConfigError if the fleet is not networked, or a file of it is damaged."""
        self._fleet = fleet
        self._config: FleetConfig = load_fleet(fleet.path)
        if not self._config.networked:
            raise ConfigError("devices join a fleet with an address: covey init --address HOST")
        self._say = say
        self._key = fleet.coordinator_key()
        self._authority = fleet.tls.authority
        trust = fleet.trust_message(self._config)
        self._trust = wire.sign(trust, self._key)
        self._limit = FailureLimit()

    @property
    def fingerprint(self) -> bytes:
        """What this fleet's tokens pin."""
        return enrolment.fingerprint(self._trust.body)

    def handle(self, request: bytes, peer: Peer, now_unix: int) -> bytes:
        """The answer to a request: an envelope, signed by the coordinator. Never raises for what a peer
        can cause, nor for a disk that refuses."""
        try:
            signed = wire.decode(request)
            match signed.message:
                case WhoIsThere():
                    return self._who_is_there(signed.message, peer)
                case EnrolRequest():
                    answer = self._enrol(wire.decode_as(EnrolRequest, request), peer, now_unix)
                case RenewRequest():
                    answer = self._renew(wire.decode_as(RenewRequest, request), peer, now_unix)
                case other:
                    raise MalformedError(f"expected a request, got a {other.LABEL}")
            return self._signed(answer)
        except RemoteProtocolError as error:
            log.warning("refused at enrolment, %s: %s", peer.address, for_display(str(error)))
            return self._refusal(str(error))
        except (ConfigError, StorageError) as error:
            log.error("enrolment cannot go on: %s", error)
            return self._refusal("the coordinator is in trouble of its own; try again later")

    def refusal(self, reason: str) -> bytes:
        """An answer to what is not even a request."""
        return self._refusal(reason)

    # -- who is there -------------------------------------------------------------------------------

    def _who_is_there(self, question: WhoIsThere, peer: Peer) -> bytes:
        if not hmac.compare_digest(question.fingerprint, self.fingerprint):
            # It will find out itself, and not believe us.
            log.warning("%s has a token of another fleet, or a damaged one", peer.address)
        return self._trust.envelope

    # -- enrolling ----------------------------------------------------------------------------------

    def _enrol(self, signed: wire.Signed[EnrolRequest], peer: Peer, now_unix: int) -> Enrolled:
        request = signed.message
        if self._limit.exhausted(peer.address, now_unix):
            raise RefusedError("too many wrong tokens from your address; wait a minute")
        self._check_fleet(request.fleet)
        signed.check(request.identity, signer="the identity it names")
        # Before the token is spent: a device that asks in a wrong way may ask again.
        public = pki.requested_key(request.csr)
        with self._fleet.book.changing():
            found = self._fleet.tokens.find(request.secret)
            if found is None:
                self._limit.failed(peer.address, now_unix)
                raise RefusedError(
                    "this token is not one of this coordinator's, or was withdrawn; ask for a new one"
                )
            hash_, token = found
            try:
                self._check_token(token, request.identity, peer, now_unix)
                record = self._fleet.book.record(token.device)
                self._check_name(token, record, request.identity)
            except RefusedError as error:
                self._limit.failed(peer.address, now_unix)
                self._note_refusal(token.device, peer, str(error), now_unix)
                raise
            token.used_by, token.used_unix = request.identity.hex(), now_unix
            token.uses += 1
            self._fleet.tokens.save(hash_, token)
            if record is None or record.token != hash_:
                record = self._registered(token.device, record, request.identity, now_unix)
            record.token, record.token_uses = hash_, token.uses
            return self._issue(record, request.csr, public, now_unix)

    def _check_token(self, token: TokenRecord, identity: bytes, peer: Peer, now_unix: int) -> None:
        if token.used_by and token.used_by != identity.hex():
            self._say(
                f"WARNING: the token for {token.device} came a second time, from {peer.address} with "
                f"the identity {in_groups(identity)}: it may have been stolen. If that is your "
                f"device, revoke {token.device} and make a new token"
            )
            raise RefusedError(
                "this token was used by another device; if that was not yours, tell the fleet's "
                "operator: it was stolen"
            )
        if now_unix >= token.expires_unix:
            raise RefusedError("this token has expired; ask for a new one")

    def _check_name(self, token: TokenRecord, record: DeviceRecord | None, identity: bytes) -> None:
        if identity in revoked_identities(self._fleet.book.revoked()):
            raise RefusedError(
                "this device's identity was revoked; remove its identity key and join again"
            )
        known = record is not None and record.key == identity
        if record is not None and not known and not token.again:
            raise RefusedError(
                f"there is a device {token.device} already; the operator can replace it: covey device "
                "token --again"
            )
        for other in self._fleet.book.records():
            if other.device != token.device and other.key == identity:
                raise RefusedError(
                    "this identity is registered under another name; make a new one for each device"
                )

    def _registered(
        self, device: DeviceId, old: DeviceRecord | None, identity: bytes, now_unix: int
    ) -> DeviceRecord:
        """A new record. What was before it is revoked first, so that the power may go in between; of a
        device that kept its identity the certificates are, since who found its TLS key has them."""
        book = self._fleet.book
        if old is not None and (old.grants or old.key != identity):
            replaced = "" if old.key == identity else old.identity
            book.revoke(Revoked(device=device, identity=replaced, unix=now_unix, grants=old.grants))
            self._fleet.write_revocations(now_unix)
        self._say(f"device {device} joined with the identity {in_groups(identity)}")
        return DeviceRecord(
            device=device,
            identity=identity.hex(),
            enrolled_unix=now_unix,
            refusals=old.refusals if old is not None else [],
        )

    # -- renewing -----------------------------------------------------------------------------------

    def _renew(self, signed: wire.Signed[RenewRequest], peer: Peer, now_unix: int) -> Enrolled:
        request = signed.message
        self._check_fleet(request.fleet)
        if peer.name is None or peer.serial is None:
            raise RefusedError("a renewal comes over a connection with the device's certificate")
        if peer.name != request.device:
            raise RefusedError(
                f"a renewal for {request.device} came with the certificate of {peer.name}"
            )
        with self._fleet.book.changing():
            record = self._fleet.book.record(request.device)
            if record is None:
                raise RefusedError(f"there is no device {request.device} in this fleet")
            try:
                self._check_renewal(record, signed, peer.serial)
                public = pki.requested_key(request.csr) if request.csr else None
            except RemoteProtocolError as error:
                self._note_refusal(record.device, peer, str(error), now_unix)
                raise
            record.renewed_unix = now_unix
            return self._issue(record, request.csr, public, now_unix)

    def _check_renewal(
        self, record: DeviceRecord, signed: wire.Signed[RenewRequest], serial: int
    ) -> None:
        request, revoked = signed.message, self._fleet.book.revoked()
        if record.key in revoked_identities(revoked):
            raise RefusedError(f"device {record.device} was revoked")
        if f"{serial:x}" not in {grant.serial for grant in record.grants}:
            raise RefusedError(
                "the certificate of this connection is not one of this device's, or not any more"
            )
        if request.identity != record.key:
            raise RefusedError(f"{record.device} is registered with another identity")
        signed.check(record.key, signer=f"device {record.device}")

    # -- issuing ------------------------------------------------------------------------------------

    def _issue(
        self, record: DeviceRecord, csr: bytes, public: pki.PublicKey | None, now_unix: int
    ) -> Enrolled:
        """Certificates for a record that was checked. Who asks again for the same key, because the
        answer was lost, gets the same certificate."""
        certificate = self._identity_certificate(record, now_unix)
        tls_certificate = b""
        if public is not None:
            tls_certificate = self._issued_before(record, public, now_unix)
        if public is not None and not tls_certificate:
            if len([g for g in record.grants if g.not_after_unix > now_unix]) >= MAX_GRANTS:
                raise RefusedError(
                    f"{MAX_GRANTS} certificates of this device have not ended; something asks for "
                    "them in a loop"
                )
            tls_certificate = pki.client_certificate(
                self._authority, csr, record.device, days=self._config.enrol.days, now_unix=now_unix
            )
            leaf = pki.read_leaf(tls_certificate)
            record.granted(leaf.serial, leaf.not_after_unix, now_unix)
            record.tls_certificate = tls_certificate
        # Before the answer leaves: a certificate that is not in the record could not be revoked.
        self._fleet.book.save(record)
        return Enrolled(
            fleet=self._config.fleet,
            device=record.device,
            identity=record.key,
            tls_certificate=tls_certificate,
            certificate=certificate,
            broker_url=self._fleet.device_broker_url(self._config),
        )

    def _issued_before(self, record: DeviceRecord, public: pki.PublicKey, now_unix: int) -> bytes:
        if not record.tls_certificate:
            return b""
        leaf = pki.read_leaf(record.tls_certificate)
        same = pki.key_of(record.tls_certificate) == public
        stale = leaf.due(now_unix) or leaf.issued_unix < record.wanted_unix
        return record.tls_certificate if same and not stale else b""

    def _identity_certificate(self, record: DeviceRecord, now_unix: int) -> bytes:
        """The one there is, a new one if that is due, or nothing while the fleet CA is awaited."""
        envelope = self._fleet.book.certificate(record.device)
        if envelope is not None and not self._due(record, envelope, now_unix):
            record.requested_unix = 0
            return envelope
        if not self._fleet.ca_here:
            if not record.requested_unix:
                record.requested_unix = now_unix
                self._say(
                    f"device {record.device} waits for the fleet CA: covey ca requests -o FILE"
                )
            # What it has signed serves meanwhile: a device may not have it yet.
            return envelope if envelope and self._holds(record, envelope, now_unix) else b""
        request = IdentityRequest(
            fleet=self._config.fleet,
            device=record.device,
            identity=record.key,
            days=self._config.enrol.days,
        )
        made = certify(self._fleet.ca_key(), request, now_unix).envelope
        self._fleet.book.save(record)  # first: a certificate belongs to a registered identity
        self._fleet.book.install(record.device, made)
        record.requested_unix = 0
        return made

    def _due(self, record: DeviceRecord, envelope: bytes, now_unix: int) -> bool:
        certificate = self._opened(envelope)
        if certificate is None:
            return True
        life = certificate.not_after_unix - certificate.issued_unix
        return (
            certificate.identity != record.key
            or certificate.device != record.device
            or certificate.issued_unix < record.wanted_unix
            or now_unix >= certificate.issued_unix + life * 2 / 3
        )

    def _holds(self, record: DeviceRecord, envelope: bytes, now_unix: int) -> bool:
        """Whether it is this identity's, and has not ended."""
        certificate = self._opened(envelope)
        return (
            certificate is not None
            and (certificate.device, certificate.identity) == (record.device, record.key)
            and certificate.not_after_unix > now_unix
        )

    def _opened(self, envelope: bytes) -> Certificate | None:
        """None for what is damaged on our disk."""
        try:
            return wire.opened(
                Certificate, envelope, self._fleet.trust.ca, signer="the fleet CA"
            ).message
        except RemoteProtocolError:
            return None

    # -- small things -------------------------------------------------------------------------------

    def _check_fleet(self, fleet: str) -> None:
        if fleet != self._config.fleet:
            raise RefusedError(f"this is fleet {self._config.fleet}, not {fleet}")

    def _note_refusal(self, device: str, peer: Peer, reason: str, now_unix: int) -> None:
        record = self._fleet.book.record(device)
        if record is not None:
            record.refusals.append(Refusal(now_unix, peer.address, reason))
            self._fleet.book.save(record)

    def _refusal(self, reason: str) -> bytes:
        return self._signed(
            EnrolRefused(fleet=self._config.fleet, reason=for_display(reason)[:MAX_REASON_CHARS])
        )

    def _signed(self, message: Message) -> bytes:
        return wire.sign(message, self._key).envelope


def network_of(address: str) -> str:
    """What counts as one address: an IPv4 address, or an IPv6 host's /64."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False))
