"""The fleet CA: a directory with the key that signs devices' identities, here or on another machine.

===========  ==================================================================================
ca.key       its private key, readable by this user alone; absent where only the fleet's is known
ca.pub       its public key, which devices pin
ca.toml      the fleet that it signs for, and the coordinator whose requests it takes
signed.jsonl what it signed, one line each
===========  ==================================================================================

A coordinator that has no `ca.key` exports what it wants signed (`Requests`), someone carries the file to
the CA, looks at the names and fingerprints, signs, and carries the certificates back (`Certificates`).
Neither file is secret: requests are signed by the coordinator, certificates by the CA.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import tomli_w

from covey_coordinator.config import load
from covey_coordinator.files import append_line, storage_error, write_atomic
from covey_shared import keys, wire
from covey_shared.config import Config, HexKey, Name, unreadable
from covey_shared.enrolment import IdentityRequest
from covey_shared.errors import ConfigError, RemoteProtocolError
from covey_shared.messages import Certificate

DAY_S = 86_400
MAX_FILE_BYTES = 32 * 1024 * 1024

T = TypeVar("T", bound=msgspec.Struct)


class Requests(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What `covey ca requests` writes. requests: envelopes of IdentityRequest."""

    covey: Literal["identity requests"] = "identity requests"
    fleet: str
    coordinator: str
    requests: list[bytes]


class Certificates(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What `covey ca sign` writes. certificates: envelopes of Certificate."""

    covey: Literal["identity certificates"] = "identity certificates"
    fleet: str
    certificates: list[bytes]


class CaConfig(Config, frozen=True):
    """ca.toml. coordinator: the public key whose requests are taken; remembered at the first."""

    fleet: Name
    coordinator: HexKey | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """One identity to be signed. before: the identity that this CA signed last under that name."""

    request: IdentityRequest
    before: bytes | None

    @property
    def what(self) -> str:
        """For the operator's eyes."""
        if self.before is None:
            return "new"
        if self.before == self.request.identity:
            return "renewal"
        return f"REPLACES {keys.in_groups(self.before)}"


class _Line(msgspec.Struct):
    device: str
    identity: str
    issued_unix: int
    not_after_unix: int


def certify(
    key: keys.SigningKey, request: IdentityRequest, now_unix: int
) -> wire.Signed[Certificate]:
    """The certificate that a request asks for. The request is believed."""
    return wire.sign(
        Certificate(
            fleet=request.fleet,
            device=request.device,
            identity=request.identity,
            issued_unix=now_unix,
            not_after_unix=now_unix + request.days * DAY_S,
        ),
        key,
    )


class AuthorityDirectory:
    """Reads and writes a fleet CA's directory. Every error names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, fleet: str, *, coordinator: bytes | None = None) -> keys.PublicKey:
        """Make a key pair. Raises ConfigError if there is one, StorageError."""
        if (self.path / "ca.key").exists() or (self.path / "ca.pub").exists():
            # A new key would make strangers of all devices.
            raise ConfigError(f"{self.path} holds a fleet CA already; choose another directory")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error("make", self.path, error) from error
        key = keys.SigningKey(os.urandom(32))
        write_atomic(self.path / "ca.key", key.seed.hex().encode() + b"\n", mode=0o600)
        self.adopt(key.public)
        self._save(CaConfig(fleet=fleet, coordinator=coordinator.hex() if coordinator else None))
        return key.public

    def adopt(self, public: bytes) -> None:
        """Know the public key of a CA elsewhere. Raises StorageError."""
        write_atomic(self.path / "ca.pub", public.hex().encode() + b"\n")

    @property
    def config(self) -> CaConfig:
        """ca.toml. Raises ConfigError."""
        return load(self.path / "ca.toml", CaConfig, hint="`covey ca init` makes a fleet CA")

    def _save(self, config: CaConfig) -> None:
        table = {k: v for k, v in msgspec.to_builtins(config).items() if v is not None}
        write_atomic(self.path / "ca.toml", tomli_w.dumps(table).encode())

    @property
    def key(self) -> keys.SigningKey:
        """The private key. Raises ConfigError."""
        return read_private(self.path / "ca.key")

    def review(self, requests: Requests, coordinator: bytes | None) -> list[Wanted]:
        """Check requests, each once -> what they want, by name. Nothing is signed.

        coordinator: what the operator says its public key is; None to take the remembered one.
        Raises ConfigError if they are another fleet's or another coordinator's, or damaged.
        """
        config = self.config
        if requests.fleet != config.fleet:
            raise ConfigError(
                f"these requests are of fleet {requests.fleet}; {self.path} signs for fleet "
                f"{config.fleet}"
            )
        pinned = self._pinned(config, coordinator)
        wanted: dict[str, Wanted] = {}
        signed = self._signed()
        for envelope in requests.requests:
            try:
                request = wire.opened(
                    IdentityRequest, envelope, pinned, signer="the coordinator that is pinned here"
                ).message
            except RemoteProtocolError as error:
                raise ConfigError(f"a request is refused: {error}; nothing was signed") from error
            if request.fleet != config.fleet:
                raise ConfigError(
                    f"a request is for a device of fleet {request.fleet}, not {config.fleet}; "
                    "nothing was signed"
                )
            if request.device in wanted:
                raise ConfigError(
                    f"there are two requests for device {request.device}; nothing was signed"
                )
            wanted[request.device] = Wanted(request, signed.get(request.device))
        return [wanted[name] for name in sorted(wanted)]

    def sign(
        self, wanted: Iterable[Wanted], coordinator: bytes | None, now_unix: int
    ) -> Certificates:
        """Sign what was reviewed, and remember it and the coordinator. Raises ConfigError,
        StorageError."""
        config, key = self.config, self.key
        if config.coordinator is None:
            config = CaConfig(
                fleet=config.fleet, coordinator=self._pinned(config, coordinator).hex()
            )
            self._save(config)
        envelopes = []
        for entry in wanted:
            signed = certify(key, entry.request, now_unix)
            made = signed.message
            line = _Line(made.device, made.identity.hex(), made.issued_unix, made.not_after_unix)
            # Noted first: what leaves this machine is in the list.
            append_line(self.path / "signed.jsonl", msgspec.json.encode(line))
            envelopes.append(signed.envelope)
        return Certificates(fleet=config.fleet, certificates=envelopes)

    @staticmethod
    def _pinned(config: CaConfig, coordinator: bytes | None) -> bytes:
        if config.coordinator is None:
            if coordinator is None:
                raise ConfigError(
                    "this CA does not know the fleet's coordinator yet: give --coordinator KEY, as "
                    "`covey status` shows it there"
                )
            return coordinator
        pinned = bytes.fromhex(config.coordinator)
        if coordinator is not None and coordinator != pinned:
            raise ConfigError(
                f"this CA knows another coordinator, {keys.in_groups(pinned)}; if the fleet has a new "
                "one, correct `coordinator` in ca.toml"
            )
        return pinned

    def _signed(self) -> dict[str, bytes]:
        """Device -> the identity that was signed last."""
        path = self.path / "signed.jsonl"
        try:
            lines = path.read_bytes().splitlines() if path.exists() else []
            entries = [msgspec.json.decode(line, type=_Line) for line in lines]
            return {entry.device: bytes.fromhex(entry.identity) for entry in entries}
        except OSError as error:
            raise unreadable(path, error) from error
        except (msgspec.MsgspecError, ValueError) as error:
            raise ConfigError(f"{path} is damaged ({error}); correct or remove it") from error


def read_file(path: Path, kind: type[T]) -> T:
    """A file of requests or certificates, from who knows where. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is too large; it has at most {MAX_FILE_BYTES} bytes")
    wanted = "covey ca requests" if kind is Requests else "covey ca sign"
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not what `{wanted}` writes: {error}") from error


def write_file(path: Path, content: Requests | Certificates) -> None:
    """Neither is secret. Raises StorageError."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(content)) + b"\n")


def read_public(path: Path) -> keys.PublicKey:
    """A public key's file. Raises ConfigError."""
    return keys.PublicKey(_from_hex(path))


def parse_public(text: str, what: str) -> keys.PublicKey:
    """A public key that somebody typed. what: for the error. Raises ConfigError."""
    try:
        value = bytes.fromhex(text.strip())
    except ValueError:
        value = b""
    if len(value) != 32:
        raise ConfigError(f"{what} is not a key of 64 hexadecimal digits")
    return keys.PublicKey(value)


def read_private(path: Path) -> keys.SigningKey:
    """A private key's file, which nobody else may be able to read. Raises ConfigError."""
    seed = _from_hex(path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode:04o}); run: chmod 600 {path}")
    return keys.SigningKey(seed)


def read_line(path: Path) -> str:
    """The first line of a small file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def _from_hex(path: Path) -> bytes:
    text = read_line(path)
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 32:
        raise ConfigError(f"{path} is not a key of 64 hexadecimal digits; restore it")
    return value
