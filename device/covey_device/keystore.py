"""What a device keeps on disk: its identity, its certificate, and the facts that outlive a crash.

The identity key is readable by its owner alone; a key that others can read is refused. Memory is
written to a new file, synced and renamed, so that a power cut leaves the old one or the new one.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from covey_device.session import Memory
from covey_shared import config, keys, wire
from covey_shared.errors import ConfigError, CoveyError, RemoteProtocolError, StorageError
from covey_shared.messages import Certificate


class _MemoryFile(msgspec.Struct, forbid_unknown_fields=True):
    last_round: Annotated[int, Meta(ge=0)]
    contributed: dict[str, Annotated[int, Meta(ge=0)]]


# Contributions are remembered per model hash; a device that has seen this many models forgets the
# oldest, whose rounds `last_round` keeps it out of anyway.
MAX_CONTRIBUTIONS = 1000


def load_identity(path: Path) -> keys.SigningKey:
    """The device's Ed25519 key: 64 hexadecimal digits. Raises ConfigError."""
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        problem = config.unreadable(f"identity key {path}", error)
        raise ConfigError(f"{problem}; `covey device add` makes one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise config.unreadable(f"identity key {path}", error) from error
    if mode & 0o077:
        raise ConfigError(
            f"identity key {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}"
        )
    try:
        return keys.SigningKey(bytes.fromhex(text))
    except (ValueError, CoveyError) as error:
        raise ConfigError(f"identity key {path} is not 64 hexadecimal digits") from error


def load_certificate(path: Path, ca: bytes, fleet: str, device: str, identity: bytes) -> bytes:
    """The envelope the fleet CA signed, checked to be ours. Raises ConfigError."""
    try:
        envelope = path.read_bytes()
        certificate = wire.opened(Certificate, envelope, ca, signer="the fleet CA").message
    except OSError as error:
        raise config.unreadable(f"certificate {path}", error) from error
    except RemoteProtocolError as error:
        raise ConfigError(f"certificate {path}: {error}; is [trust].fleet_ca right?") from error
    if (certificate.fleet, certificate.device) != (fleet, device):
        raise ConfigError(
            f"certificate {path} is for {certificate.device} in fleet {certificate.fleet}, "
            f"this is {device} in fleet {fleet}; use its own"
        )
    if certificate.identity != identity:
        raise ConfigError(
            f"certificate {path} is for another identity key; use the two that belong together"
        )
    return envelope


def certificate_end(envelope: bytes) -> int:
    """Until when a certificate lasts, in seconds since 1970."""
    return wire.decode_as(Certificate, envelope).message.not_after_unix


class MemoryFile:
    """The session's memory in one small JSON file. directory: made, mode 0700, if it is not there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "memory.json"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot make the state directory {directory}: {error.strerror}; check its owner, or "
                "set `state` to another"
            ) from error

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep it to this process: two with one identity would undo each other's memory.

        Raises ConfigError if another has it, StorageError.
        """
        path = self._directory / "lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}; check its owner") from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"another covey-device runs with {self._directory}; stop it first"
                ) from None
            yield
        finally:
            os.close(fd)

    def load(self) -> Memory:
        """What was saved last; nothing yet for a new device. Raises StorageError for a damaged file,
        rather than starting over: forgetting could mean contributing twice."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return Memory()
        except OSError as error:
            raise StorageError(
                f"cannot read {self._path}: {error.strerror}; check its owner"
            ) from error
        try:
            kept = msgspec.json.decode(data, type=_MemoryFile)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise StorageError(
                f"{self._path} is damaged ({error}); restore it, or enrol this device anew under "
                "another name"
            ) from error
        return Memory(kept.last_round, kept.contributed)

    def save(self, memory: Memory) -> None:
        """Durable when this returns. Raises StorageError, and keeps the old file."""
        recent = dict(list(memory.contributed.items())[-MAX_CONTRIBUTIONS:])
        data = msgspec.json.encode(_MemoryFile(memory.last_round, recent))
        fresh = self._path.with_suffix(".new")
        try:
            fresh.unlink(missing_ok=True)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            fresh.replace(self._path)
            handle = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise StorageError(
                f"cannot write {self._path}: {error.strerror}; free some space, or check its owner"
            ) from error
