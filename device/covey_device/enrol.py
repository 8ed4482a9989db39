"""Joining a fleet: from a token to keys, certificates and a device.toml.

In this order, and why:

1. Ask whoever answers at the token's address whom the fleet trusts, over TLS that believes anybody.
   The answer proves itself: its hash is in the token.
2. Make the keys and write them, 0600, before anything is asked for: if the answer gets lost, the same
   keys may ask again with the same token, and no others.
3. Give the token's secret away, over TLS that trusts only the authority in that answer.
4. Check everything that comes back, then write it. All of one enrolment lies in a directory of its
   own; device.toml, which names that directory, is replaced last and by a rename. So whenever the power
   goes there is the old enrolment or the new one, whole.

The secret is in no log, error, file or argument list of another process. `cryptography` is imported
where it is needed: the service, which uses parts of this module, must not hold it in memory.
"""

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from covey_device import audit, tls
from covey_device.files import write_durably
from covey_device.keystore import load_identity
from covey_shared import keys, wire
from covey_shared.enrolment import (
    Enrolled,
    EnrolRefused,
    EnrolRequest,
    FleetTrust,
    Token,
    WhoIsThere,
    fingerprint,
    frame,
    frame_size,
)
from covey_shared.errors import (
    ConfigError,
    MalformedError,
    RefusedError,
    StorageError,
    TransportError,
)
from covey_shared.messages import Certificate, for_display
from covey_shared.mqtt import parse_broker_url

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

CONNECT_S = 10.0
ANSWER_S = 30.0
"""For a whole exchange. A coordinator on a Pi signs within a fraction of a second."""

ATTEMPTS = 2
"""Of one request whose answer gets lost."""

IDENTITY, CERTIFICATE, BROKER_CA, BROKER_PAIR = (
    "identity.key",
    "certificate",
    "broker.ca",
    "broker.pem",
)
"""Files of an enrolment. broker.pem: the TLS key and its certificate in one file, so that the two
cannot but fit each other after a power cut."""

_TLS_KEY = "broker.key"


@dataclass(frozen=True, slots=True)
class TlsKey:
    """A new TLS key, P-256. pem: the private key; csr: DER, a request for its certificate; public: DER."""

    pem: bytes = field(repr=False)
    csr: bytes
    public: bytes


@dataclass(frozen=True, slots=True)
class Joined:
    """What `join` did. keys: the directory of keys and certificates. data: the
    file of examples, there or not. waiting: the fleet CA has yet to
    sign the identity. kept: the device.toml that was replaced."""

    device: str
    fleet: str
    fleet_ca: bytes
    identity: bytes
    keys: Path
    config: Path
    data: str
    data_there: bool
    waiting: bool
    kept: Path | None


# -- what a peer says ----------------------------------------------------------------------------------


def believed(answer: bytes, token: Token, expect_ca: str | None = None) -> FleetTrust:
    """The answer to the first question, if it is what the token pins.

    Raises RefusedError for anything else: somebody in between, another fleet, or keys made anew.
    """
    where = _where(token.host, token.port)
    signed = wire.decode(answer)
    message = signed.message
    if isinstance(message, EnrolRefused):
        raise RefusedError(f"{where} refuses: {for_display(message.reason)}")
    if not isinstance(message, FleetTrust):
        raise MalformedError(f"expected a fleet trust, got a {message.LABEL}")
    if fingerprint(signed.body) != token.fingerprint:
        raise RefusedError(
            f"whoever answers at {where} has other keys than the fleet that made this token: somebody "
            "is in between, or another fleet has this address now; nothing was given away. Ask for a "
            "new token, and compare the fleet CA's fingerprint with your operator"
        )
    signed.check(message.coordinator, signer="the coordinator that the token pins")
    if expect_ca is not None and not message.fleet_ca.hex().startswith(expect_ca):
        raise RefusedError(
            f"the token is of a fleet whose CA is {keys.in_groups(message.fleet_ca)}, not the one that you "
            "expect; nothing was given away. Ask your operator where the token comes from"
        )
    return message


def granted(
    answer: bytes, *, fleet: str, identity: bytes, coordinator: bytes, device: str | None = None
) -> Enrolled:
    """The answer to a request, if the coordinator signed it and it is for us.

    Raises RefusedError with the coordinator's reason if it says no; SignatureError, MalformedError.
    """
    signed = wire.decode(answer)
    message = signed.message
    if not isinstance(message, Enrolled | EnrolRefused):
        raise MalformedError(f"expected an answer to a request, got a {message.LABEL}")
    signed.check(coordinator, signer="the coordinator; somebody may be in between")
    if message.fleet != fleet:
        raise RefusedError(f"an answer of fleet {message.fleet}, not {fleet}")
    if isinstance(message, EnrolRefused):
        raise RefusedError(f"the coordinator refuses: {for_display(message.reason)}")
    if message.identity != identity:
        raise RefusedError("an answer for another identity key than this device's")
    if device is not None and message.device != device:
        raise RefusedError(f"an answer for device {message.device}, not {device}")
    return message


def check_tls_certificate(
    der: bytes, authority: bytes, *, device: str, public: bytes, now_unix: float
) -> "x509.Certificate":
    """A TLS client certificate, if the broker authority issued it to this device for this key.

    authority: DER. public: the key, DER. Its beginning is not judged; see `tls`. Raises RefusedError.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    try:
        certificate, issuer = x509.load_der_x509_certificate(der), _certificate(authority)
        certificate.verify_directly_issued_by(issuer)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        key = _spki(certificate.public_key())
        ends = certificate.not_valid_after_utc.timestamp()
        began = max(issuer.not_valid_before_utc, certificate.not_valid_before_utc).timestamp()
    except (InvalidSignature, TypeError) as error:
        raise RefusedError(
            "the TLS certificate is not from the fleet's broker authority"
        ) from error
    except x509.ExtensionNotFound as error:
        raise RefusedError("the TLS certificate does not say what it is for") from error
    except Exception as error:  # the library's own classes have no common base
        raise RefusedError("the TLS certificate is not one that can be read") from error
    if [name.value for name in names] != [device]:
        raise RefusedError(f"the TLS certificate is for another name than {device}")
    if key != public:
        raise RefusedError("the TLS certificate is for a key that is not this device's")
    if ExtendedKeyUsageOID.CLIENT_AUTH not in usage or basic.ca:
        raise RefusedError("the TLS certificate is not a client's")
    _check_end("the TLS certificate", ends, max(now_unix, began))
    return certificate


def check_pair_file(path: Path, ca_file: Path, device: str) -> None:
    """What `join` wrote, checked again but for its end. Raises ConfigError that names the file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        authority = der_of(ca_file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"broker.cert_file {path} is no certificate in PEM") from error

    der = certificate.public_bytes(serialization.Encoding.DER)
    public = _spki(certificate.public_key())
    try:
        check_tls_certificate(der, authority, device=device, public=public, now_unix=0.0)
    except RefusedError as error:
        raise ConfigError(
            f"broker.cert_file {path}: {error}; enrol this device anew with `covey-device join --force`"
        ) from error


def check_identity_certificate(
    envelope: bytes, *, fleet: str, fleet_ca: bytes, device: str, identity: bytes, now_unix: float
) -> Certificate:
    """An identity certificate, if the fleet CA signed it for this device. Raises RemoteProtocolError."""
    certificate = wire.opened(Certificate, envelope, fleet_ca, signer="the fleet CA").message
    if (certificate.fleet, certificate.device, certificate.identity) != (fleet, device, identity):
        raise RefusedError(
            f"the identity certificate is for {certificate.device} of fleet {certificate.fleet} and its "
            f"key, not for {device} of fleet {fleet} and the key of this device"
        )
    ends = certificate.not_after_unix
    _check_end("the identity certificate", ends, max(now_unix, certificate.issued_unix))
    return certificate


def _check_end(what: str, ends_unix: float, now_unix: float) -> None:
    if ends_unix <= now_unix:
        raise RefusedError(
            f"{what} ended on {tls.in_words(ends_unix)}, and this device's clock says "
            f"{tls.in_words(now_unix)}; set the clock, or ask your operator about the coordinator's"
        )


# -- keys ------------------------------------------------------------------------------------------------


def make_tls_key() -> TlsKey:
    """A new one."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return _tls_key(ec.generate_private_key(ec.SECP256R1()))


def _tls_key(key: "ec.EllipticCurvePrivateKey") -> TlsKey:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    csr = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    return TlsKey(pem, csr, _spki(key.public_key()))


def pair(key: TlsKey, certificate: "x509.Certificate") -> bytes:
    """Key and certificate as one file, PEM."""
    from cryptography.hazmat.primitives import serialization

    return key.pem + certificate.public_bytes(serialization.Encoding.PEM)


def der_of(pem: bytes) -> bytes:
    """A PEM certificate as DER. Raises ConfigError."""
    try:
        return ssl.PEM_cert_to_DER_cert(pem.decode("ascii").strip())
    except ValueError as error:
        raise ConfigError("this is no certificate in PEM") from error


def _certificate(der: bytes) -> "x509.Certificate":
    from cryptography import x509

    return x509.load_der_x509_certificate(der)


def _spki(public: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    der: bytes = public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return der


def _kept_keys(directory: Path, rng: keys.Rng) -> tuple[keys.SigningKey, TlsKey]:
    """The keys of an earlier attempt with the same token, or new ones, written before they are used.

    Raises StorageError, ConfigError.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _cannot("make", directory, error) from error
    identity_file, tls_file = directory / IDENTITY, directory / _TLS_KEY
    if not identity_file.exists():
        write_durably(identity_file, rng(32).hex().encode() + b"\n")
    if not tls_file.exists():
        write_durably(tls_file, make_tls_key().pem)
    identity = load_identity(identity_file)
    try:
        key = serialization.load_pem_private_key(tls_file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{tls_file} of an earlier attempt is damaged; remove {directory} and ask for a new token"
        )
    return identity, _tls_key(key)


# -- the connection ----------------------------------------------------------------------------------------


def exchange(host: str, port: int, context: ssl.SSLContext, envelope: bytes) -> bytes:
    """One request, one answer. Raises TransportError that says what to do; MalformedError."""
    where = _where(host, port)
    deadline = time.monotonic() + ANSWER_S
    try:
        plain = socket.create_connection((host, port), timeout=CONNECT_S)
    except OSError as error:
        raise TransportError(_unreachable(host, where, error)) from error
    try:
        with plain, context.wrap_socket(plain, server_hostname=host) as secure:
            secure.sendall(frame(envelope))
            size = frame_size(_read(secure, 4, deadline))
            return _read(secure, size, deadline)
    except ssl.SSLCertVerificationError as error:
        raise TransportError(
            f"the TLS certificate of {where} does not hold ({error.verify_message}); is this the "
            "address of the fleet's coordinator, and is this device's clock right?"
        ) from error
    except ssl.SSLEOFError as error:
        raise LostError(f"{where} closed the connection without an answer; try again") from error
    except ssl.SSLError as error:
        raise TransportError(
            f"no TLS connection with {where} ({(error.reason or str(error)).lower()}); is this the "
            "fleet's enrolment port, and does the coordinator still know this device?"
        ) from error
    except OSError as error:
        raise LostError(
            f"the connection with {where} broke off ({error.strerror or error}); try again"
        ) from error


class LostError(TransportError):
    """A request may have arrived, and its answer did not."""


def _read(secure: ssl.SSLSocket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(None, f"no answer within {ANSWER_S:g} s")
        secure.settimeout(left)
        part = secure.recv(size - len(data))
        if not part:
            raise ConnectionResetError(None, "it ended without an answer")
        data += part
    return bytes(data)


def _unreachable(host: str, where: str, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return (
            f"cannot look up the host {host} ({error.strerror}); check this device's network, and "
            "whether the coordinator's address is known here"
        )
    if isinstance(error, ConnectionRefusedError):
        return f"nobody answers at {where}: connection refused; does `covey up` run there?"
    if isinstance(error, TimeoutError):
        return (
            f"nobody answers at {where} within {CONNECT_S:g} s; check the address, and that no "
            "firewall is in between"
        )
    return f"cannot reach {where}: {error.strerror or error}; check this device's network"


def _where(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# -- joining -------------------------------------------------------------------------------------------------


def join(
    token: Token,
    config_path: Path,
    *,
    data: Path | None = None,
    expect_ca: str | None = None,
    force: bool = False,
    home: Path | None = None,
    write: Callable[[Path, bytes], None] | None = None,
    rng: keys.Rng = os.urandom,
    now: Callable[[], float] = time.time,
) -> Joined:
    """Enrol this device, and write its configuration. expect_ca: how the fleet CA's key must begin,
    hexadecimal. home: a directory for everything but the configuration, which then names all by absolute
    paths; None: the configuration's own. write: writes the configuration, if not `write_durably`.

    force: replace an enrolment that is there; its data, policy and files are kept. now: seconds since
    1970 by this device's clock, right or not. Raises CoveyError; then nothing is changed but that
    keys may wait for another attempt.
    """
    base = config_path.parent if home is None else home
    existing = _existing(config_path, force)
    trust = believed(
        exchange(token.host, token.port, tls.anybody(), _who_is_there(token, rng)), token, expect_ca
    )
    try:
        context = tls.pinned(trust.tls_ca, now)
    except (ssl.SSLError, ValueError) as error:
        raise RefusedError("the fleet's broker authority is not one that can be used") from error
    # Of the token, and of no other: whoever has the files of one attempt learns nothing of the secret.
    name = keys.digest("enrolment directory", token.secret).hex()[:16]
    pending, final = base / f".joining-{name}", base / f"enrolment-{name}"
    _take_back(pending, final, existing)
    try:
        base.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot("make", base, error) from error
    identity, tls_key = _kept_keys(pending, rng)
    request = EnrolRequest(
        fleet=trust.fleet, secret=token.secret, identity=identity.public, csr=tls_key.csr
    )
    answer = _asked(token.host, token.port, context, wire.sign(request, identity).envelope)
    enrolled = granted(
        answer, fleet=trust.fleet, identity=identity.public, coordinator=trust.coordinator
    )
    certificate = check_tls_certificate(
        enrolled.tls_certificate,
        trust.tls_ca,
        device=enrolled.device,
        public=tls_key.public,
        now_unix=now(),
    )
    if enrolled.certificate:
        check_identity_certificate(
            enrolled.certificate,
            fleet=trust.fleet,
            fleet_ca=trust.fleet_ca,
            device=enrolled.device,
            identity=identity.public,
            now_unix=now(),
        )
        write_durably(pending / CERTIFICATE, enrolled.certificate)
    _check_broker(enrolled.broker_url)
    write_durably(pending / BROKER_CA, ssl.DER_cert_to_PEM_cert(trust.tls_ca).encode())
    write_durably(pending / BROKER_PAIR, pair(tls_key, certificate))
    table = device_toml(token, trust, enrolled, final.name, data, existing, home)
    kept = _put_in_place(config_path, pending, final, table, write or write_durably)
    audit.note(
        base / table["state"],
        "enrolled",
        fleet=trust.fleet,
        device=enrolled.device,
        fleet_ca=trust.fleet_ca,
        identity=identity.public,
        certificate="issued" if enrolled.certificate else "awaited",
    )
    source = table["data"].get("file") or table["data"].get("features", "")
    if table["data"]["kind"] == "python":
        source = ""
    source = config_path.parent / source if source else ""
    return Joined(
        device=enrolled.device,
        fleet=trust.fleet,
        fleet_ca=trust.fleet_ca,
        identity=identity.public,
        keys=final,
        config=config_path,
        data=str(source),
        data_there=not source or Path(source).exists(),
        waiting=not enrolled.certificate,
        kept=kept,
    )


def _take_back(pending: Path, final: Path, existing: dict[str, Any] | None) -> None:
    """An earlier attempt that ended just before device.toml was written is gone on with."""
    if not final.exists():
        return
    if existing is not None and Path(existing["identity"]).parent.name == final.name:
        raise ConfigError("this token was used on this device already; ask for a new one")
    try:
        final.rename(pending)
    except OSError as error:
        raise _cannot("write", pending, error) from error


def _who_is_there(token: Token, rng: keys.Rng) -> bytes:
    # Nobody can check this signature yet; the envelope wants one.
    return wire.sign(WhoIsThere(fingerprint=token.fingerprint), keys.SigningKey(rng(32))).envelope


def _asked(host: str, port: int, context: ssl.SSLContext, request: bytes) -> bytes:
    """`exchange`, once more if the answer gets lost: the same request gets the same answer."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(LostError):
            return exchange(host, port, context, request)
    return exchange(host, port, context, request)


def _check_broker(url: str) -> None:
    try:
        if parse_broker_url(url).tls:
            return
    except ConfigError:
        pass
    raise RefusedError("the coordinator names no broker with TLS; ask your operator")


def must_be_free(config_path: Path, force: bool) -> None:
    """Raises ConfigError if a device is enrolled there, and is not to be anew."""
    if config_path.exists() and not force:
        raise ConfigError(
            f"{config_path} is there already: this device has joined a fleet; --force enrols it anew "
            "and keeps its data and policy"
        )


def _existing(config_path: Path, force: bool) -> "dict[str, Any] | None":
    """The device.toml that --force replaces, as far as it is kept."""
    from covey_device import config as configuration

    must_be_free(config_path, force)
    if not config_path.exists():
        return None
    old = configuration.load(config_path)
    table: dict[str, Any] = msgspec.to_builtins(old)
    return table


def device_toml(
    token: Token,
    trust: FleetTrust,
    enrolled: Enrolled,
    directory: str,
    data: Path | None,
    existing: dict[str, Any] | None,
    home: Path | None = None,
) -> dict[str, Any]:
    """The tables of a new device.toml. existing: those of the one that it replaces."""
    old = existing or {}
    at = "" if home is None else f"{home}/"
    directory = f"{at}{directory}"
    # What a device remembers belongs to its name: not to be lost, and of no use to another.
    state = f"{at}state/{trust.fleet}.{enrolled.device}"
    if (old.get("fleet"), old.get("device")) == (trust.fleet, enrolled.device):
        state = old["state"]
    if data is not None:
        source: dict[str, Any] = {"kind": "npz", "file": str(data.resolve())}
    else:
        file = "data.npz" if home is None else f"{home}/data/data.npz"
        source = old.get("data", {"kind": "npz", "file": file})
    table: dict[str, Any] = {
        "fleet": trust.fleet,
        "device": enrolled.device,
        "identity": f"{directory}/{IDENTITY}",
        "certificate": f"{directory}/{CERTIFICATE}",
        "state": state,
    }
    if "policy" in old:
        table["policy"] = old["policy"]
    broker: dict[str, Any] = {
        "url": enrolled.broker_url,
        "ca_file": f"{directory}/{BROKER_CA}",
        "cert_file": f"{directory}/{BROKER_PAIR}",
        "key_file": f"{directory}/{BROKER_PAIR}",
    }
    if "broker" in old:
        broker["keepalive_s"] = old["broker"]["keepalive_s"]
    owners: dict[str, Any] = {name: old[name] for name in ("cache", "model") if name in old}
    return table | {
        "broker": broker,
        "enrol": {"host": token.host, "port": token.port},
        "trust": {"fleet_ca": trust.fleet_ca.hex(), "coordinator": trust.coordinator.hex()},
        "data": source,
        **owners,
    }


def toml(table: dict[str, Any]) -> str:
    """Tables of text, numbers and lists as TOML. A device has no library that writes it; of such values
    JSON's spelling is TOML's, but for one character."""
    lines, tables = [], []
    for key, value in table.items():
        if isinstance(value, dict):
            tables.append(f"\n[{key}]\n{toml(value)}")
        elif value is not None:
            spelled = msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
            lines.append(f"{key} = {spelled}\n")
    return "".join(lines + tables)


def _put_in_place(
    config_path: Path,
    pending: Path,
    final: Path,
    table: dict[str, Any],
    write: Callable[[Path, bytes], None],
) -> Path | None:
    """Everything is written; let it be so. Returns where the old device.toml is kept."""
    kept = None
    text = toml(table).encode()
    try:
        if config_path.exists():
            kept = config_path.with_name(f"{config_path.name}.old")
            write(kept, config_path.read_bytes())
        pending.rename(final)
    except OSError as error:
        raise _cannot("write", final, error) from error
    try:
        write(config_path, text)
    except StorageError:
        with contextlib.suppress(OSError):
            final.rename(pending)  # the same token and keys may try again
        raise
    with contextlib.suppress(OSError):
        (final / _TLS_KEY).unlink()  # it is in broker.pem
    return kept


def _cannot(verb: str, path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot {verb} {path}: {error.strerror}; free some space, or run this as a user who may "
        "write there, or give --config a file elsewhere"
    )


def expected_ca(text: str) -> str:
    """--expect-ca as hexadecimal digits, however it was grouped. Raises ConfigError."""
    digits = "".join(text.split()).replace(":", "").replace("-", "").lower()
    known = all(c in "0123456789abcdef" for c in digits)
    if not known or not keys.FINGERPRINT_DIGITS <= len(digits) <= 2 * keys.PUBLIC_KEY_BYTES:
        raise ConfigError(
            f"--expect-ca: a fleet CA's fingerprint has {keys.FINGERPRINT_DIGITS} hexadecimal digits, as "
            "`covey init` and `covey ca` show them"
        )
    return digits
