"""A fleet's directory: its authority, its keys, its devices. What `covey init` and `covey device` do.

Two authorities, kept apart: the *fleet CA* signs devices' identities, the *coordinator's key* signs
rounds. Whoever holds both can invent devices and sum one real one among them, so the CA's key wants
to live on another machine once a fleet is in earnest; rounds do not need it.

A *local* fleet is for one machine: its broker is on loopback, and `covey device add` makes devices'
keys. A *networked* one has an address: devices make their keys themselves and join with a token.
"""

import contextlib
import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import tomli_w

from covey_coordinator.broker_tls import COORDINATOR, TlsDirectory, hosts_of
from covey_coordinator.config import (
    BrokerConfig,
    EnrolConfig,
    FleetConfig,
    check_fleet,
    load_fleet,
    normal_host,
)
from covey_coordinator.devices import (
    DeviceBook,
    DeviceRecord,
    Revoked,
    revoked_identities,
    revoked_serials,
)
from covey_coordinator.files import storage_error, sync_directory, write_atomic
from covey_coordinator.fleet_ca import (
    AuthorityDirectory,
    Certificates,
    Requests,
    read_line,
    read_private,
    read_public,
)
from covey_coordinator.tokens import TokenBook, TokenRecord
from covey_shared import enrolment, keys, wire
from covey_shared.config import unreadable
from covey_shared.errors import ConfigError, RemoteProtocolError
from covey_shared.messages import Certificate, DeviceId
from covey_shared.mqtt import parse_broker_url
from covey_shared.secagg.cohort import Trust

COORDINATOR_USER = COORDINATOR
DEVICE_USER = "device"
DAY_S = 86_400
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


Status = Literal["active", "pending", "revoked", "ended"]


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """A device that this directory knows. identity: its Ed25519 public key. not_after_unix: of its
    identity certificate, 0 while there is none. revoked: since when, 0 if it is not."""

    name: DeviceId
    identity: bytes
    not_after_unix: int
    issued_unix: int = 0
    revoked_unix: int = 0

    def status(self, now_unix: float) -> Status:
        """pending: the fleet CA has yet to sign its certificate."""
        if self.revoked_unix:
            return "revoked"
        if not self.not_after_unix:
            return "pending"
        return "active" if now_unix < self.not_after_unix else "ended"


class FleetDirectory:
    """Reads and writes one fleet's directory. Every error names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.book = DeviceBook(path)
        self.tokens = TokenBook(path / "tokens")
        self.tls = TlsDirectory(path / "tls")

    # -- making -----------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: Path,
        fleet: str,
        broker: BrokerConfig,
        *,
        addresses: tuple[str, ...] = (),
        enrol: EnrolConfig | None = None,
        ca: Path | None = None,
        now_unix: int | None = None,
    ) -> "FleetDirectory":
        """Make a fleet: two key pairs, covey.toml, and either passwords for a broker on this machine
        or, for a fleet with addresses, the broker authority.

        ca: the public key of a fleet CA elsewhere, instead of one of its own. Raises ConfigError if
        there is a fleet already, or the name is unusable; StorageError.
        """
        check_name(fleet, "fleet")
        if (path / "covey.toml").exists():
            raise ConfigError(f"{path} holds a fleet already; choose another directory")
        if (path / "ca" / "ca.key").exists() or (path / "coordinator.key").exists():
            # New keys would make strangers of all its devices.
            raise ConfigError(
                f"{path} holds the keys of a fleet without its covey.toml; restore that file, or "
                "choose another directory"
            )
        address = addresses[0] if len(addresses) == 1 else addresses or None
        config = FleetConfig(
            fleet=fleet, address=address, broker=broker, enrol=enrol or EnrolConfig()
        )
        check_fleet(config, file="the command line")
        ca_public = None if ca is None else read_public(ca)
        if ca_public is not None and not config.networked:
            raise ConfigError(
                "a fleet CA elsewhere signs devices that join over the network: give --address too"
            )
        try:
            for directory in (path, path / "devices", path / "runs"):
                directory.mkdir(parents=True, exist_ok=True)
            for private in (path / "ca", path / "broker"):
                private.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error("make", path, error) from error
        self = cls(path)
        key = keys.SigningKey(os.urandom(32))
        write_secret(path / "coordinator.key", key.seed.hex())
        write_atomic(path / "coordinator.pub", key.public.hex().encode() + b"\n")
        authority = AuthorityDirectory(path / "ca")
        if ca_public is None:
            authority.create(fleet, coordinator=key.public)
        else:
            authority.adopt(ca_public)
        if config.networked:
            self.tls.create(
                fleet,
                hosts_of(addresses),
                days=config.enrol.days,
                now_unix=int(time.time()) if now_unix is None else now_unix,
            )
        else:
            for user in (COORDINATOR_USER, DEVICE_USER):
                write_secret(self.password_file(user), secrets.token_urlsafe(24))
        write_atomic(path / "covey.toml", tomli_w.dumps(_table(config)).encode())
        return self

    def add_device(
        self, name: str, *, days: int, data: Path | None, broker_url: str | None = None
    ) -> Path:
        """Make a device's identity, certificate and device.toml, all to be copied to it.

        days: the certificate's life. data: its .npz file, if it is on this machine. Returns the
        directory. Raises ConfigError for a bad or taken name, StorageError.
        """
        check_name(name, "device")
        config, trust = load_fleet(self.path), self.trust
        if config.networked:
            raise ConfigError(
                "devices of this fleet make their own keys and join over the network: "
                f"covey device token --name {name}"
            )
        url = broker_url or self.broker_url(config)
        parse_broker_url(url)
        directory = self.path / "devices" / name
        if directory.exists():
            raise ConfigError(
                f"there is a device {name!r} already: {directory}; choose another name, or remove it"
            )
        ca_key = self.ca_key()
        if config.broker.kind == "external":
            # A broker for a fleet tells devices apart, and confines each to its own topics.
            user, password = name, secrets.token_urlsafe(24)
        else:
            user, password = DEVICE_USER, self.password(DEVICE_USER)
        authority = self._broker_authority(config)
        identity = keys.SigningKey(os.urandom(32))
        now_unix = int(time.time())
        certificate = Certificate(
            fleet=config.fleet,
            device=DeviceId(name),
            identity=identity.public,
            issued_unix=now_unix,
            not_after_unix=now_unix + days * DAY_S,
        )
        table = {
            "fleet": config.fleet,
            "device": name,
            "identity": "identity.key",
            "certificate": "certificate",
            "state": "state",
            "broker": {
                "url": url,
                "username": user,
                "password_file": "broker.password",
            }
            | ({} if authority is None else {"ca_file": "broker.ca"}),
            "trust": {"fleet_ca": trust.ca.hex(), "coordinator": trust.coordinator.hex()},
            "data": {"kind": "npz", "file": str(data.resolve()) if data else "data.npz"},
        }
        # Made beside its place and then renamed: a device is there whole or not at all.
        fresh = directory.with_name(f".{name}.new")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(mode=0o700, parents=True)
            write_secret(fresh / "identity.key", identity.seed.hex())
            write_atomic(fresh / "certificate", wire.sign(certificate, ca_key).envelope)
            write_secret(fresh / "broker.password", password)
            if authority is not None:
                write_atomic(fresh / "broker.ca", authority)
            write_atomic(fresh / "device.toml", tomli_w.dumps(table).encode())
            fresh.rename(directory)
            sync_directory(directory.parent)
        except OSError as error:
            raise storage_error("make", directory, error) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return directory

    def make_token(
        self, name: str, *, hours: float | None, again: bool, now_unix: int
    ) -> tuple[enrolment.Token, int]:
        """A token for a device -> it and when it ends. hours: its life; None for the configured one.

        Raises ConfigError if the fleet is local, or the name is bad or taken; StorageError.
        """
        check_name(name, "device")
        config = load_fleet(self.path)
        if not config.networked:
            raise ConfigError(
                "tokens are for fleets with an address (covey init --address HOST); in this one: "
                f"covey device add {name}"
            )
        secret = os.urandom(keys.SEED_BYTES)
        expires = now_unix + int((config.enrol.token_hours if hours is None else hours) * 3600)
        pinned = enrolment.fingerprint(wire.body_of(self.trust_message(config)))
        with self.book.changing():
            record = self.book.record(name)
            if record is not None and not again:
                what = "was revoked" if name in self.revoked_names() else "is there already"
                raise ConfigError(
                    f"device {name} {what}; choose another name, or give --again to have this one "
                    "replaced"
                )
            self.tokens.add(
                secret,
                TokenRecord(
                    device=DeviceId(name), made_unix=now_unix, expires_unix=expires, again=again
                ),
            )
        host = normal_host(config.addresses[0])
        return enrolment.Token(host, config.enrol.port, pinned, secret), expires

    def revoke(self, name: str, now_unix: int) -> bool:
        """Shut a device out, durably -> False if it was already. Raises ConfigError, StorageError."""
        networked = load_fleet(self.path).networked
        with self.book.changing():
            entry, record = self.device(name), self.book.record(name)
            news = not entry.revoked_unix
            if news:
                grants = [] if record is None else record.grants
                identity = entry.identity.hex()
                self.book.revoke(
                    Revoked(device=entry.name, identity=identity, unix=now_unix, grants=grants)
                )
            self.tokens.withdraw(name)
            if networked:
                self.write_revocations(now_unix)
        return news

    def write_revocations(self, now_unix: int) -> None:
        """Make the list that TLS libraries read from `revoked.json`. Raises ConfigError, StorageError."""
        self.tls.write_revocations(revoked_serials(self.book.revoked(), now_unix), now_unix)

    def want_renewal(self, name: str, now_unix: int) -> None:
        """Have a device asked for a renewal. Raises ConfigError, StorageError."""
        with self.book.changing():
            entry, record = self.device(name), self.book.record(name)
            if record is None:
                raise ConfigError(
                    f"device {name} has its certificate from `covey device add`; it cannot renew it: "
                    "add it anew under another name"
                )
            if entry.revoked_unix:
                raise ConfigError(
                    f"device {name} is revoked; covey device token --again lets it in"
                )
            record.wanted_unix = now_unix
            self.book.save(record)

    # -- a fleet CA elsewhere ---------------------------------------------------------------------

    def identity_requests(self) -> tuple[Requests, list[str]]:
        """What is to be signed by a fleet CA elsewhere, and the devices' names. Raises ConfigError."""
        config, key, names, envelopes = load_fleet(self.path), self.coordinator_key(), [], []
        revoked = self.revoked_identities()
        for record in self.book.records():
            if not record.requested_unix or record.key in revoked:
                continue
            request = enrolment.IdentityRequest(
                fleet=config.fleet,
                device=record.device,
                identity=record.key,
                days=config.enrol.days,
            )
            names.append(str(record.device))
            envelopes.append(wire.sign(request, key).envelope)
        return Requests(fleet=config.fleet, coordinator=key.public.hex(), requests=envelopes), names

    def import_certificates(self, file: Certificates) -> tuple[list[str], list[str]]:
        """Keep what the fleet CA signed -> the devices that have theirs now, and why others have not.

        Raises ConfigError for another fleet's, StorageError.
        """
        trust, taken, refused = self.trust, [], []
        if file.fleet != trust.fleet:
            raise ConfigError(f"these certificates are of fleet {file.fleet}, not {trust.fleet}")
        with self.book.changing():
            revoked = self.revoked_identities()
            for envelope in file.certificates:
                try:
                    made = wire.opened(
                        Certificate, envelope, trust.ca, signer="this fleet's CA"
                    ).message
                except RemoteProtocolError as error:
                    refused.append(str(error))
                    continue
                record = self.book.record(made.device)
                if why := self._unfit(made, record, revoked):
                    refused.append(f"device {made.device}: {why}")
                elif record is not None:
                    self.book.install(made.device, envelope)
                    record.requested_unix = 0
                    self.book.save(record)
                    taken.append(str(made.device))
        return taken, refused

    def _unfit(
        self, made: Certificate, record: DeviceRecord | None, revoked: frozenset[bytes]
    ) -> str | None:
        """Why a certificate of the CA's is not taken in."""
        if made.fleet != self.trust.fleet:
            return f"it is for fleet {made.fleet}"
        if record is None:
            return "there is no such device here"
        if made.identity in revoked:
            return "its identity was revoked"
        if made.identity != record.key:
            return "it is for another identity than the registered one"
        held = self.book.certificate(made.device)
        if held is not None:
            with contextlib.suppress(RemoteProtocolError):
                old = wire.opened(Certificate, held, self.trust.ca, signer="the fleet CA").message
                if old.identity == made.identity and old.issued_unix > made.issued_unix:
                    return "there is a newer one"
        return None

    # -- reading ----------------------------------------------------------------------------------

    @property
    def trust(self) -> Trust:
        """The public keys that devices pin."""
        return Trust(
            load_fleet(self.path).fleet,
            self._public("ca/ca.pub"),
            self._public("coordinator.pub"),
        )

    def ca_key(self) -> keys.SigningKey:
        """The fleet CA's private key: only to sign devices' certificates."""
        return self._private("ca/ca.key")

    @property
    def ca_here(self) -> bool:
        """Whether the fleet CA's private key is on this machine."""
        return (self.path / "ca" / "ca.key").exists()

    def coordinator_key(self) -> keys.SigningKey:
        """The key that signs rounds."""
        return self._private("coordinator.key")

    def password_file(self, user: str) -> Path:
        """Where a broker user's password is kept."""
        return self.path / "broker" / f"{user}.password"

    def password(self, user: str) -> str:
        """A broker user's password. Raises ConfigError."""
        return read_line(self.password_file(user))

    @staticmethod
    def broker_url(config: FleetConfig) -> str:
        """Where clients on this machine find the broker."""
        scheme = "mqtts" if config.networked else "mqtt"
        return config.broker.url or f"{scheme}://127.0.0.1:{config.broker_port}"

    @staticmethod
    def device_broker_url(config: FleetConfig) -> str:
        """Where devices of a networked fleet find the broker."""
        if config.broker.url is not None:
            return config.broker.url
        host = normal_host(config.addresses[0])
        shown = f"[{host}]" if ":" in host else host
        return f"mqtts://{shown}:{config.broker_port}"

    def trust_message(self, config: FleetConfig) -> enrolment.FleetTrust:
        """What devices of a networked fleet pin; a token commits to it. Raises ConfigError."""
        trust = self.trust
        return enrolment.FleetTrust(
            fleet=config.fleet,
            fleet_ca=trust.ca,
            coordinator=trust.coordinator,
            tls_ca=self.tls.authority_der,
        )

    def refresh_tls(self, config: FleetConfig, now_unix: int) -> list[str]:
        """Bring `tls/` up to date -> what was done, for the operator. Raises ConfigError, StorageError.

        The list of revoked certificates, too: it is made from `revoked.json`, and the power may have
        gone between the two.
        """
        done = self.tls.refresh(
            hosts_of(config.addresses), days=config.enrol.days, now_unix=now_unix
        )
        with self.book.held():
            self.write_revocations(now_unix)
        return done

    def revoked_names(self) -> tuple[str, ...]:
        """Devices that the broker is to silence: those whose present identity is revoked."""
        revoked = revoked_identities(self.book.revoked())
        return tuple(r.device for r in self.book.records() if r.key in revoked)

    def revoked_identities(self) -> frozenset[bytes]:
        """Identity keys that no round takes any more, under whatever name."""
        return frozenset(revoked_identities(self.book.revoked()))

    def _broker_authority(self, config: FleetConfig) -> bytes | None:
        """What devices need to know the broker by. Raises ConfigError."""
        if config.broker.ca_file is None:
            return None
        path = self.path / config.broker.ca_file
        try:
            return path.read_bytes()
        except OSError as error:
            raise unreadable(f"broker.ca_file {path}", error) from error

    def device(self, name: str) -> DeviceEntry:
        """One of them. Raises ConfigError if there is none of that name."""
        for entry in self.devices():
            if entry.name == name:
                return entry
        raise ConfigError(
            f"there is no device {name!r} in this fleet; covey device list shows them"
        )

    def devices(self) -> list[DeviceEntry]:
        """All devices that are known here, by name: those with a certificate, and those that wait for
        one. Raises ConfigError."""
        trust, found = self.trust, {}
        revoked = revoked_identities(self.book.revoked())
        for record in self.book.records():
            found[record.device] = DeviceEntry(record.device, record.key, 0)
        for path in sorted((self.path / "devices").glob("*/certificate")):
            if path.parent.name.startswith("."):
                continue  # one that is being added at this moment
            try:
                certificate = wire.opened(
                    Certificate, path.read_bytes(), trust.ca, signer="the fleet CA"
                ).message
            except OSError as error:
                raise ConfigError(
                    f"{path} cannot be read: {error.strerror}; check its owner"
                ) from error
            except RemoteProtocolError as error:
                raise ConfigError(
                    f"{path}: {error}; restore it, or remove {path.parent} and add the device anew"
                ) from error
            known = found.get(certificate.device)
            if known is not None and known.identity != certificate.identity:
                continue  # of an identity that this name had before
            found[certificate.device] = DeviceEntry(
                certificate.device,
                certificate.identity,
                certificate.not_after_unix,
                certificate.issued_unix,
            )
        return [
            replace(entry, revoked_unix=revoked[entry.identity].unix)
            if entry.identity in revoked
            else entry
            for _, entry in sorted(found.items())
        ]

    def _public(self, name: str) -> keys.PublicKey:
        return read_public(self.path / name)

    def _private(self, name: str) -> keys.SigningKey:
        return read_private(self.path / name)


def _table(config: FleetConfig) -> dict[str, Any]:
    """covey.toml's content: what is set, without the tables that a local fleet does not have."""
    table = {k: v for k, v in msgspec.to_builtins(config).items() if v is not None}
    table["broker"] = {k: v for k, v in table["broker"].items() if v is not None}
    if not config.networked:
        del table["enrol"]
    return table


def check_name(name: str, what: str) -> None:
    """Names are topic levels and file names. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} name {name!r}: 1 to 32 lower-case letters, digits and inner hyphens"
        )
    if what == "device" and name == COORDINATOR:
        raise ConfigError(f"device name {name!r}: that is the coordinator's own; choose another")


def write_secret(path: Path, text: str) -> None:
    """One line, readable by this user alone."""
    write_atomic(path, text.encode() + b"\n", mode=0o600)
