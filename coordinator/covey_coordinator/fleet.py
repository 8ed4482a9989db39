"""A fleet's directory: its authority, its keys, its devices. What `covey init` and `covey device` do.

Two authorities, kept apart: the *fleet CA* signs devices' identities, the *coordinator's key* signs
rounds. Whoever holds both can invent devices and sum one real one among them, so the CA's key wants
to live on another machine once a fleet is in earnest; rounds do not need it.
"""

import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import tomli_w

from covey_coordinator.config import BrokerConfig, FleetConfig, check_fleet, load_fleet
from covey_coordinator.files import storage_error, sync_directory, write_atomic
from covey_shared import keys, wire
from covey_shared.config import unreadable
from covey_shared.errors import ConfigError, RemoteProtocolError
from covey_shared.messages import Certificate, DeviceId
from covey_shared.mqtt import parse_broker_url
from covey_shared.secagg.cohort import Trust

COORDINATOR_USER = "coordinator"
DEVICE_USER = "device"
DAY_S = 86_400
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """A device that this directory knows. identity: its Ed25519 public key."""

    name: DeviceId
    identity: bytes
    not_after_unix: int


class FleetDirectory:
    """Reads and writes one fleet's directory. Every error names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # -- making -----------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, fleet: str, broker: BrokerConfig) -> "FleetDirectory":
        """Make a fleet: two key pairs, two passwords for the broker, covey.toml.

        Raises ConfigError if there is one already, or the name is unusable; StorageError.
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
        config = FleetConfig(fleet=fleet, broker=broker)
        check_fleet(config, file="the command line")
        try:
            for directory in (path, path / "devices", path / "runs"):
                directory.mkdir(parents=True, exist_ok=True)
            for private in (path / "ca", path / "broker"):
                private.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error("make", path, error) from error
        self = cls(path)
        for name in ("ca/ca", "coordinator"):
            key = keys.SigningKey(os.urandom(32))
            write_secret(path / f"{name}.key", key.seed.hex())
            write_atomic(path / f"{name}.pub", key.public.hex().encode() + b"\n")
        for user in (COORDINATOR_USER, DEVICE_USER):
            write_secret(self.password_file(user), secrets.token_urlsafe(24))
        table = {k: v for k, v in msgspec.to_builtins(config).items() if v is not None}
        table["broker"] = {k: v for k, v in table["broker"].items() if v is not None}
        write_atomic(path / "covey.toml", tomli_w.dumps(table).encode())
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
        """The fleet CA's private key; only `device add` needs it."""
        return self._private("ca/ca.key")

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
        return config.broker.url or f"mqtt://127.0.0.1:{config.broker.port}"

    def _broker_authority(self, config: FleetConfig) -> bytes | None:
        """What devices need to know the broker by. Raises ConfigError."""
        if config.broker.ca_file is None:
            return None
        path = self.path / config.broker.ca_file
        try:
            return path.read_bytes()
        except OSError as error:
            raise unreadable(f"broker.ca_file {path}", error) from error

    def devices(self) -> list[DeviceEntry]:
        """All devices with a valid certificate here, by name."""
        trust, found = self.trust, []
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
            found.append(
                DeviceEntry(certificate.device, certificate.identity, certificate.not_after_unix)
            )
        return found

    def _public(self, name: str) -> keys.PublicKey:
        return keys.PublicKey(_from_hex(self.path / name))

    def _private(self, name: str) -> keys.SigningKey:
        path = self.path / name
        seed = _from_hex(path)
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise ConfigError(
                f"{path} can be read by others (mode {mode:04o}); run: chmod 600 {path}"
            )
        return keys.SigningKey(seed)


def check_name(name: str, what: str) -> None:
    """Names are topic levels and file names. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} name {name!r}: 1 to 32 lower-case letters, digits and inner hyphens"
        )


def read_line(path: Path) -> str:
    """The first line of a small file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def write_secret(path: Path, text: str) -> None:
    """One line, readable by this user alone."""
    write_atomic(path, text.encode() + b"\n", mode=0o600)


def _from_hex(path: Path) -> bytes:
    text = read_line(path)
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 32:
        raise ConfigError(f"{path} is not a key of 64 hexadecimal digits; restore it")
    return value
