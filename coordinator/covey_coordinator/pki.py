"""The broker authority: X.509 certificates for the connections to broker and enrolment port.

Not the fleet CA, which signs identities. This one only lets clients in, so it is always online, with
the coordinator; who steals it can play the broker, which the protocol is made to resist. A client
certificate's common name is the device's name. ECDSA P-256 throughout: mosquitto, OpenSSL and every
Pi know it. RFC 5280; the extensions are those that OpenSSL 3 wants under X509_V_FLAG_X509_STRICT.

No clock is read here: `now_unix` is seconds since 1970.
"""

import datetime
import ipaddress
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from covey_coordinator.config import normal_host
from covey_coordinator.files import write_atomic
from covey_shared.config import unreadable
from covey_shared.enrolment import MAX_DER_BYTES
from covey_shared.errors import ConfigError, LocalProtocolError, MalformedError, RefusedError

DAY_S = 86_400
AUTHORITY_DAYS = 30 * 365
"""Every device pins it, so that a new one means to enrol the whole fleet again."""

BACKDATE_S = DAY_S
"""Certificates are valid from a day ago on: a device's clock may be behind by a time zone."""

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Authority:
    """The broker authority, with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def der(self) -> bytes:
        """Its certificate, as devices pin it."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def pem(self) -> bytes:
        """Its certificate, as brokers and TLS libraries read it."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, slots=True)
class Pair:
    """A private key and its certificate, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What is in a certificate. name: its common name. hosts: what a server's is for."""

    name: str
    serial: int
    issued_unix: int
    not_after_unix: int
    hosts: frozenset[str] = frozenset()

    def due(self, now_unix: float) -> bool:
        """Two thirds of its life are over: time for a new one."""
        return now_unix >= self.issued_unix + (self.not_after_unix - self.issued_unix) * 2 / 3


def make_authority(fleet: str, now_unix: int) -> Authority:
    """A new broker authority. fleet: for its name alone."""
    key, subject = ec.generate_private_key(ec.SECP256R1()), _named(f"{fleet} broker authority")
    end = now_unix + AUTHORITY_DAYS * DAY_S
    certificate = (
        _builder(subject, subject, key.public_key(), key.public_key(), now_unix, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def save_authority(directory: Path, authority: Authority) -> None:
    """ca.key (0600) and ca.crt. Raises StorageError."""
    write_atomic(directory / "ca.key", _key_pem(authority.key), mode=0o600)
    write_atomic(directory / "ca.crt", authority.pem)


def load_authority(directory: Path) -> Authority:
    """What `save_authority` wrote. Raises ConfigError that names the file."""
    certificate = load_certificate(directory / "ca.crt")
    path = directory / "ca.key"
    try:
        mode, data = path.stat().st_mode & 0o777, path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode:04o}); run: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no private key of a broker authority; restore it")
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{path} does not belong to ca.crt beside it; restore both")
    return Authority(certificate, key)


def load_certificate(path: Path) -> x509.Certificate:
    """A certificate's PEM file. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, x509.InvalidVersion) as error:
        raise ConfigError(f"{path} is no certificate in PEM; restore it") from error


def server_certificate(
    authority: Authority, names: Iterable[str], *, days: int, now_unix: int
) -> Pair:
    """For broker and enrolment port. names: hosts and addresses by which clients come, in any order.

    Raises ConfigError for a name that is neither.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    alternatives = [_alternative(name) for name in sorted(set(names))]
    certificate = (
        _leaf(authority, "broker", key.public_key(), days, now_unix)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return Pair(_pem(certificate), _key_pem(key))


def client_certificate(
    authority: Authority, csr: bytes, name: str, *, days: int, now_unix: int
) -> bytes:
    """DER of a certificate for the key in a request, and for nothing else that the request asks.

    csr: DER PKCS#10, from the network. Raises MalformedError, RefusedError.
    """
    public = requested_key(csr)
    return _client(authority, public, name, days, now_unix).public_bytes(serialization.Encoding.DER)


def client_pair(authority: Authority, name: str, *, days: int, now_unix: int) -> Pair:
    """A client's key and certificate, made here: the coordinator's own."""
    key = ec.generate_private_key(ec.SECP256R1())
    return Pair(_pem(_client(authority, key.public_key(), name, days, now_unix)), _key_pem(key))


def requested_key(csr: bytes) -> PublicKey:
    """The key of a certificate request, whose holder signed it: P-256 or Ed25519.

    Raises MalformedError if it is no request, RefusedError for another kind of key or a signature
    that is not the key's.
    """
    if len(csr) > MAX_DER_BYTES:
        raise MalformedError(f"a certificate request has at most {MAX_DER_BYTES} bytes")
    try:
        request = x509.load_der_x509_csr(csr)
        public = request.public_key()
    except Exception as error:  # the library's own classes have no common base
        raise MalformedError("this is no certificate request (PKCS#10 in DER)") from error
    if isinstance(public, ec.EllipticCurvePublicKey):
        fits = isinstance(public.curve, ec.SECP256R1)
    else:
        fits = isinstance(public, ed25519.Ed25519PublicKey)
    if not fits or not isinstance(public, PublicKey):
        raise RefusedError("a certificate is for a key on P-256 or Ed25519, not of another kind")
    try:
        signed = request.is_signature_valid
    except Exception:  # as above
        signed = False
    if not signed:
        raise RefusedError("a certificate request is not signed with its own key")
    return public


def revocation_list(authority: Authority, revoked: Collection[int], now_unix: int) -> bytes:
    """PEM CRL. revoked: serial numbers.

    Its next update is the authority's end: once a list has expired, mosquitto refuses everybody.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(_time(now_unix - BACKDATE_S))
        .next_update(authority.certificate.not_valid_after_utc)
        .add_extension(_issuer_key(authority.key.public_key()), critical=False)
        .add_extension(x509.CRLNumber(now_unix), critical=False)
    )
    for serial in sorted(revoked):
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(serial)
            .revocation_date(_time(now_unix - BACKDATE_S))
            .build()
        )
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def listed(authority: Authority, pem: bytes) -> frozenset[int] | None:
    """The serial numbers in a revocation list; None if it is not this authority's, or damaged."""
    try:
        found = x509.load_pem_x509_crl(pem)
        ours = found.is_signature_valid(authority.key.public_key())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return frozenset(entry.serial_number for entry in found) if ours else None


def read_leaf(certificate: bytes | x509.Certificate) -> Leaf:
    """What a certificate of this authority's says. certificate: DER. Raises MalformedError."""
    if isinstance(certificate, bytes):
        try:
            certificate = x509.load_der_x509_certificate(certificate)
        except (ValueError, x509.InvalidVersion) as error:
            raise MalformedError("this is no certificate (X.509 in DER)") from error
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        hosts: frozenset[str] = frozenset()
    else:
        hosts = frozenset(
            [*alternatives.value.get_values_for_type(x509.DNSName)]
            + [str(a) for a in alternatives.value.get_values_for_type(x509.IPAddress)]
        )
    return Leaf(
        name=str(names[0].value) if names else "",
        serial=certificate.serial_number,
        issued_unix=int(certificate.not_valid_before_utc.timestamp()) + BACKDATE_S,
        not_after_unix=int(certificate.not_valid_after_utc.timestamp()),
        hosts=hosts,
    )


def issued_by(authority: Authority, certificate: x509.Certificate) -> bool:
    """Whether this authority signed it; another may have the same name."""
    try:
        certificate.verify_directly_issued_by(authority.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def key_of(certificate: bytes) -> object:
    """The public key in a certificate (DER) of ours, to be compared with another."""
    return x509.load_der_x509_certificate(certificate).public_key()


def _alternative(name: str) -> x509.GeneralName:
    host = normal_host(name)
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _client(
    authority: Authority, public: PublicKey, name: str, days: int, now_unix: int
) -> x509.Certificate:
    return (
        _leaf(authority, name, public, days, now_unix)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def _leaf(
    authority: Authority, name: str, public: PublicKey, days: int, now_unix: int
) -> x509.CertificateBuilder:
    if days < 1:
        raise LocalProtocolError(f"a certificate lasts at least a day, not {days}")
    last = int(authority.certificate.not_valid_after_utc.timestamp())
    end = min(now_unix + days * DAY_S, last)
    if end <= now_unix:
        raise ConfigError("the broker authority's own certificate has ended; make the fleet anew")
    issuer = authority.certificate.subject
    return (
        _builder(_named(name), issuer, public, authority.key.public_key(), now_unix, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: PublicKey,
    issuer_key: PublicKey,
    now_unix: int,
    end_unix: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now_unix - BACKDATE_S))
        .not_valid_after(_time(end_unix))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(_issuer_key(issuer_key), critical=False)
    )


def _issuer_key(public: PublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(public)


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _time(unix: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(unix, datetime.UTC)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
