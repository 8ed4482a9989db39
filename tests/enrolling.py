"""A small device for tests of enrolment: keys, requests and a TLS client, apart from the real one's code."""

import asyncio
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from covey_coordinator.config import BrokerConfig, EnrolConfig
from covey_coordinator.enrolment import EnrolmentDesk, Peer
from covey_coordinator.fleet import FleetDirectory
from covey_shared import keys, wire
from covey_shared.enrolment import (
    Enrolled,
    EnrolRefused,
    EnrolRequest,
    FleetTrust,
    RenewRequest,
    Token,
    WhoIsThere,
    frame,
    frame_size,
)
from covey_shared.messages import Certificate, DeviceId, Message

M = TypeVar("M", bound=Message)

NOW = 1_790_000_000
ADDRESS = "10.1.2.3"


def make_fleet(
    path: Path, *, now: int = NOW, port: int = 8884, **settings: object
) -> FleetDirectory:
    """A networked fleet at 127.0.0.1."""
    return FleetDirectory.create(
        path, "farm", BrokerConfig(), addresses=("127.0.0.1",), enrol=EnrolConfig(port=port),
        now_unix=now, **settings,  # type: ignore[arg-type]
    )  # fmt: skip


def new_csr(subject: str = "x") -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """A TLS key and a request for its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return key, request.public_bytes(serialization.Encoding.DER)


@dataclass
class Applicant:
    """A device, or somebody who would like to be one. seed: of its identity."""

    seed: int
    fleet: str = "farm"
    enrolled: Enrolled | None = None
    tls_key: ec.EllipticCurvePrivateKey = field(init=False)
    csr: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.identity = keys.SigningKey(self.seed.to_bytes(32, "big"))
        self.tls_key, self.csr = new_csr()

    @property
    def public(self) -> bytes:
        return self.identity.public

    def asks(self, token: Token, csr: bytes | None = None) -> bytes:
        """An EnrolRequest."""
        return self.signed(
            EnrolRequest(
                fleet=self.fleet,
                secret=token.secret,
                identity=self.public,
                csr=self.csr if csr is None else csr,
            )
        )

    def renews(self, device: str, csr: bytes | None = None) -> bytes:
        """A RenewRequest."""
        return self.signed(
            RenewRequest(
                fleet=self.fleet,
                device=DeviceId(device),
                identity=self.public,
                csr=self.csr if csr is None else csr,
            )
        )

    def signed(self, message: Message) -> bytes:
        return wire.sign(message, self.identity).envelope

    def peer(self, address: str = ADDRESS) -> Peer:
        """As the port would know this device, over its own certificate."""
        assert self.enrolled is not None
        certificate = x509.load_der_x509_certificate(self.enrolled.tls_certificate)
        return Peer(address, self.enrolled.device, certificate.serial_number)

    def pair(self, directory: Path) -> Path:
        """The TLS key and certificate in one file."""
        assert self.enrolled is not None
        path = directory / f"{self.public.hex()[:8]}.pem"
        path.write_bytes(
            self.tls_key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + ssl.DER_cert_to_PEM_cert(self.enrolled.tls_certificate).encode()
        )
        return path


class Bench:
    """A fleet and its desk, with a clock that tests set."""

    def __init__(self, path: Path, **settings: object) -> None:
        self.fleet = make_fleet(path, **settings)  # type: ignore[arg-type]
        self.said: list[str] = []
        self.now = NOW
        self.desk = EnrolmentDesk(self.fleet, self.said.append)

    def token(self, name: str, *, again: bool = False, hours: float | None = None) -> Token:
        return self.fleet.make_token(name, hours=hours, again=again, now_unix=self.now)[0]

    def answer(self, request: bytes, peer: Peer | None = None) -> Message:
        """What the desk says, its signature checked."""
        signed = wire.decode(self.desk.handle(request, peer or Peer(ADDRESS), self.now))
        signed.check(self.fleet.trust.coordinator, signer="the coordinator")
        return signed.message

    def enrol(self, name: str, applicant: Applicant, *, again: bool = False) -> Enrolled:
        """The whole way in."""
        answer = self.answer(applicant.asks(self.token(name, again=again)))
        assert isinstance(answer, Enrolled), answer
        applicant.enrolled = answer
        return answer

    def renew(self, applicant: Applicant, csr: bytes | None = None) -> Enrolled:
        assert applicant.enrolled is not None
        answer = self.answer(applicant.renews(applicant.enrolled.device, csr), applicant.peer())
        assert isinstance(answer, Enrolled), answer
        return answer

    def refused(self, request: bytes, peer: Peer | None = None) -> str:
        """The reason of a refusal."""
        answer = self.answer(request, peer)
        assert isinstance(answer, EnrolRefused), answer
        return answer.reason

    def certificate(self, enrolled: Enrolled) -> Certificate:
        return wire.opened(
            Certificate, enrolled.certificate, self.fleet.trust.ca, signer="the fleet CA"
        ).message


class Client:
    """Talks to the port. directory: for the files of TLS."""

    def __init__(self, port: int, directory: Path, fleet: FleetDirectory) -> None:
        self.port, self.directory, self.fleet = port, directory, fleet

    def context(self, pair: Path | None = None, *, trusting: bool = True) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = trusting
        context.verify_mode = ssl.CERT_REQUIRED if trusting else ssl.CERT_NONE
        if trusting:
            context.load_verify_locations(self.fleet.tls.path / "ca.crt")
        if pair is not None:
            context.load_cert_chain(pair)
        return context

    async def ask(
        self, request: bytes, pair: Path | None = None, *, trusting: bool = True
    ) -> Message:
        """One request, one answer, and then the end."""
        reader, writer = await self.connect(pair, trusting=trusting)
        try:
            writer.write(frame(request))
            await writer.drain()
            return await self.read(reader)
        finally:
            writer.close()

    async def connect(
        self, pair: Path | None = None, *, trusting: bool = True
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = self.context(pair, trusting=trusting)
        return await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=context, server_hostname="127.0.0.1"
        )

    async def read(self, reader: asyncio.StreamReader) -> Message:
        answer = await reader.readexactly(frame_size(await reader.readexactly(4)))
        assert await reader.read() == b""
        signed = wire.decode(answer)
        signed.check(self.fleet.trust.coordinator, signer="the coordinator")
        return signed.message


def who_is_there(token: Token) -> bytes:
    """The first question, signed by a key made for it."""
    question = WhoIsThere(fingerprint=token.fingerprint)
    return wire.sign(question, keys.SigningKey(bytes(32))).envelope


__all__ = ["Applicant", "Bench", "Client", "Enrolled", "FleetTrust", "make_fleet", "new_csr"]
