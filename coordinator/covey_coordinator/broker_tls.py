"""A networked fleet's `tls/`: the broker authority, what it issued to this machine, and its revocations.

========================  =========================================================================
ca.key, ca.crt            the broker authority (`pki`); every device pins the certificate
server.key, server.crt    of broker and enrolment port; made anew when it is due or the hosts changed
coordinator.key, .crt     the coordinator's own certificate as a client of the broker
crl.pem                   certificates that were revoked; made from `revoked.json`, see `devices`
========================  =========================================================================
"""

import contextlib
import socket
import ssl
from collections.abc import Collection, Iterable
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from covey_coordinator import pki
from covey_coordinator.config import normal_host
from covey_coordinator.files import storage_error, write_atomic
from covey_shared.config import unreadable
from covey_shared.errors import ConfigError

COORDINATOR = "coordinator"
_HERE = ("localhost", "127.0.0.1", "::1")


def hosts_of(addresses: Iterable[str], hostname: str | None = None) -> frozenset[str]:
    """What the server's certificate is for: the fleet's addresses and this machine's names."""
    hosts = {normal_host(address) for address in (*addresses, *_HERE)}
    with contextlib.suppress(ConfigError):  # a machine may call itself anything
        hosts.add(normal_host(hostname or socket.gethostname()))
    return frozenset(hosts)


class TlsDirectory:
    """Reads and writes `tls/`. Errors name the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, fleet: str, hosts: Collection[str], *, days: int, now_unix: int) -> None:
        """Make everything. Raises StorageError."""
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error("make", self.path, error) from error
        authority = pki.make_authority(fleet, now_unix)
        pki.save_authority(self.path, authority)
        self.write_revocations((), now_unix)
        self.refresh(hosts, days=days, now_unix=now_unix)

    @property
    def authority(self) -> pki.Authority:
        """With its private key. Raises ConfigError."""
        return pki.load_authority(self.path)

    @property
    def authority_der(self) -> bytes:
        """Its certificate, as devices pin it. Raises ConfigError."""
        certificate = pki.load_certificate(self.path / "ca.crt")
        return certificate.public_bytes(serialization.Encoding.DER)

    def refresh(self, hosts: Collection[str], *, days: int, now_unix: int) -> list[str]:
        """Make anew what is due, damaged or for other hosts -> why, a sentence for each.

        Raises ConfigError, StorageError.
        """
        done = []
        if why := self._wrong("server", now_unix, frozenset(hosts)):
            pair = pki.server_certificate(self.authority, hosts, days=days, now_unix=now_unix)
            self._save("server", pair)
            done.append(f"the broker's certificate is made anew: {why}")
        if why := self._wrong(COORDINATOR, now_unix, None):
            pair = pki.client_pair(self.authority, COORDINATOR, days=days, now_unix=now_unix)
            self._save(COORDINATOR, pair)
            done.append(f"the coordinator's certificate is made anew: {why}")
        return done

    def write_revocations(self, serials: Collection[int], now_unix: int) -> None:
        """crl.pem, unless it says so already: a broker reads each new one again. serials: of revoked
        certificates. Raises ConfigError, StorageError."""
        authority, path = self.authority, self.path / "crl.pem"
        with contextlib.suppress(OSError):
            if pki.listed(authority, path.read_bytes()) == frozenset(serials):
                return
        write_atomic(path, pki.revocation_list(authority, serials, now_unix))

    def read(self, name: str) -> bytes:
        """One of the files. Raises ConfigError."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise unreadable(self.path / name, error) from error

    def client_context(self) -> ssl.SSLContext:
        """The coordinator's connections to the broker: that authority and no other. Raises ConfigError."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT, COORDINATOR)

    def server_context(self) -> ssl.SSLContext:
        """For the enrolment port. A client need not have a certificate; one that it shows must be this
        authority's. Whether it is revoked is not for the handshake, which would end without a word: the
        desk knows, and says so. Raises ConfigError."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER, "server")
        context.verify_mode = ssl.CERT_OPTIONAL
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.num_tickets = 0  # nobody comes back: a resumed session would not be checked anew
        return context

    def _context(self, protocol: ssl._SSLMethod, own: str) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        certificate, key, authority = (
            self.path / name for name in (f"{own}.crt", f"{own}.key", "ca.crt")
        )
        for path in (certificate, key, authority):
            self.read(path.name)  # OpenSSL would not say which one it is that is missing
        try:
            context.load_verify_locations(authority)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"{authority} is damaged; restore it") from error
        try:
            # an encrypted key would be asked about on the terminal
            context.load_cert_chain(certificate, key, password=lambda: "")
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"{certificate} or its .key is damaged; restore it") from error
        return context

    def _save(self, name: str, pair: pki.Pair) -> None:
        # Should the power go between the two, they do not fit, and `refresh` starts over.
        write_atomic(self.path / f"{name}.key", pair.key, mode=0o600)
        write_atomic(self.path / f"{name}.crt", pair.certificate)

    def _wrong(self, name: str, now_unix: int, hosts: frozenset[str] | None) -> str | None:
        """Why a certificate is to be made anew; None if it is not."""
        try:
            certificate = pki.load_certificate(self.path / f"{name}.crt")
            key = serialization.load_pem_private_key(self.read(f"{name}.key"), password=None)
        except (ConfigError, ValueError, TypeError):
            return "there is none that can be read"
        leaf = pki.read_leaf(certificate)
        if key.public_key() != certificate.public_key():
            return "it does not belong to its key"
        if not pki.issued_by(self.authority, certificate):
            return "another authority signed it"
        if hosts is not None and leaf.hosts != hosts:
            return f"the fleet's hosts are now {', '.join(sorted(hosts))}"
        if leaf.due(now_unix):
            return "two thirds of its life are over"
        return None
