"""What a fleet knows of its devices: who was enrolled, with which certificates, and who is revoked.

For each device of a networked fleet `devices/NAME/` holds `record.json` and, once the fleet CA signed
it, `certificate`. `revoked.json` is the one place that says what does not count any more; the list that
TLS libraries read is made from it.

Commands and a running `covey up` change these files at the same time: whoever changes them holds
`changing`, and each file is whole or not there whenever the power goes.
"""

import contextlib
import fcntl
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from covey_coordinator.files import read_json, storage_error, write_atomic
from covey_shared.config import unreadable
from covey_shared.errors import LocalProtocolError
from covey_shared.messages import DeviceId

MAX_REFUSALS = 20
"""Of each device, the latest are kept."""

MEND = "restore it"


class Grant(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A TLS client certificate that was issued. serial: hexadecimal."""

    serial: str
    not_after_unix: int


class Refusal(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Somebody who came in this device's name and was sent away. peer: their address."""

    unix: int
    peer: str
    reason: str


class DeviceRecord(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A device that was enrolled. identity: its Ed25519 public key, hexadecimal. token: hash of the one
    it joined with. grants: its TLS
    certificates that have not ended; tls_certificate: the latest, DER. requested_unix: since when the
    fleet CA's signature is awaited, 0 if it is not. wanted_unix: when the operator asked for a renewal."""

    device: DeviceId
    identity: str
    enrolled_unix: int
    renewed_unix: int = 0
    token: str = ""
    token_uses: int = 1
    grants: list[Grant] = msgspec.field(default_factory=list)
    tls_certificate: bytes = b""
    requested_unix: int = 0
    wanted_unix: int = 0
    refusals: list[Refusal] = msgspec.field(default_factory=list)

    @property
    def key(self) -> bytes:
        """The identity, 32 bytes."""
        return bytes.fromhex(self.identity)

    def granted(self, serial: int, not_after_unix: int, now_unix: int) -> None:
        """Note a new TLS certificate, and forget those that ended."""
        self.grants = [g for g in self.grants if g.not_after_unix > now_unix]
        self.grants.append(Grant(f"{serial:x}", not_after_unix))


class Revoked(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An identity that does not count any more, and the TLS certificates that went with it. identity:
    empty if only those certificates are revoked, and the device goes on with new ones."""

    device: DeviceId
    identity: str
    unix: int
    grants: list[Grant]


class _Revocations(msgspec.Struct, forbid_unknown_fields=True):
    revoked: list[Revoked]


class DeviceBook:
    """Reads and writes the records of one fleet's directory. Every error names the file."""

    def __init__(self, fleet: Path) -> None:
        self._fleet = fleet
        self._holding = threading.local()

    # -- changing -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else changes anything meanwhile, in this process or another. Raises StorageError.

        Not within itself: that would wait for ever, and is a LocalProtocolError instead.
        """
        if getattr(self._holding, "here", False):
            raise LocalProtocolError("the book of devices is held already")
        path = self._fleet / ".changing"
        try:
            lock = path.open("w")
        except OSError as error:
            raise storage_error("write", path, error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._holding.here = True
            try:
                yield
            finally:
                self._holding.here = False

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """`held`, and a running coordinator notices afterwards. Raises StorageError."""
        with self.held():
            try:
                yield
            finally:  # a part may have been changed before it went wrong
                write_atomic(self._stamp, b"%d\n" % time.time_ns(), durable=False)

    @property
    def _stamp(self) -> Path:
        return self._fleet / ".changed"

    def generation(self) -> object:
        """Differs from an earlier one if something was changed since. Revocations count also if
        whoever wrote them was killed before anything else."""
        found: list[tuple[int, int] | None] = []
        for path in (self._stamp, self._fleet / "revoked.json"):
            try:
                status = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((status.st_ino, status.st_mtime_ns))
        return found

    # -- devices ------------------------------------------------------------------------------------

    def directory(self, name: str) -> Path:
        """Where a device's files are."""
        return self._fleet / "devices" / name

    def record(self, name: str) -> DeviceRecord | None:
        """What is known of a device; None if nothing. Raises ConfigError."""
        return read_json(self.directory(name) / "record.json", DeviceRecord, mend=MEND)

    def records(self) -> list[DeviceRecord]:
        """All devices that were enrolled, by name. Raises ConfigError."""
        paths = sorted((self._fleet / "devices").glob("*/record.json"))
        found = (read_json(path, DeviceRecord, mend=MEND) for path in paths)
        return [record for record in found if record is not None]

    def save(self, record: DeviceRecord) -> None:
        """Keep a record. Raises StorageError."""
        directory = self.directory(record.device)
        record.refusals = record.refusals[-MAX_REFUSALS:]
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error("make", directory, error) from error
        write_atomic(directory / "record.json", msgspec.json.encode(record) + b"\n", mode=0o600)

    def certificate(self, name: str) -> bytes | None:
        """A device's identity certificate, as an envelope; None if there is none."""
        path = self.directory(name) / "certificate"
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(path, error) from error

    def install(self, name: str, envelope: bytes) -> None:
        """Keep an identity certificate. Raises StorageError."""
        write_atomic(self.directory(name) / "certificate", envelope)

    # -- revocations --------------------------------------------------------------------------------

    def revoked(self) -> list[Revoked]:
        """Everything that was revoked. Raises ConfigError: forgetting it would let it in again."""
        found = read_json(self._fleet / "revoked.json", _Revocations, mend=MEND)
        return [] if found is None else found.revoked

    def revoke(self, entry: Revoked) -> None:
        """Add one, durably. Raises ConfigError, StorageError."""
        entries = [*self.revoked(), entry]
        write_atomic(
            self._fleet / "revoked.json",
            msgspec.json.format(msgspec.json.encode(_Revocations(entries))) + b"\n",
            mode=0o600,
        )


def revoked_identities(entries: Iterable[Revoked]) -> dict[bytes, Revoked]:
    """Identity -> its revocation."""
    return {bytes.fromhex(entry.identity): entry for entry in entries if entry.identity}


def revoked_serials(entries: Iterable[Revoked], now_unix: int) -> set[int]:
    """Serial numbers of revoked TLS certificates that have not ended anyway."""
    return {
        int(grant.serial, 16)
        for entry in entries
        for grant in entry.grants
        if grant.not_after_unix > now_unix
    }
