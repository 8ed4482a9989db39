"""What a device keeps on disk: its identity, its certificate, and the facts that outlive a crash.

The identity key is readable by its owner alone; a key that others can read is refused. Memory is
written to a new file, synced and renamed, so that a power cut leaves the old one or the new one.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from covey_device import unfinished
from covey_device.files import sync_names, write_durably
from covey_device.memory import MAX_CONTRIBUTIONS, MAX_VOTES, Memory, Vote
from covey_device.policy import MAX_ROUNDS_PER_DAY, Day
from covey_device.unfinished import Unfinished
from covey_shared import config, keys, wire
from covey_shared.errors import ConfigError, CoveyError, RemoteProtocolError, StorageError
from covey_shared.messages import Certificate, DeviceId
from covey_shared.secagg.cohort import Trust

T = TypeVar("T")

_Count = Annotated[int, Meta(ge=0)]
_Hex = Annotated[str, Meta(pattern=r"^([0-9a-f]{2})*\Z")]


class _DayFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    own_s: _Count = 0
    seen_unix: int | None = None
    joined: Annotated[tuple[_Count, ...], Meta(max_length=MAX_ROUNDS_PER_DAY)] = ()


class _MemoryFile(msgspec.Struct, forbid_unknown_fields=True):
    last_round: _Count
    contributed: dict[str, _Count]
    day: _DayFile = _DayFile()
    signed_unix: _Count = 0


class _VoteFile(msgspec.Struct, forbid_unknown_fields=True, array_like=True):
    h: _Hex
    kind: str
    body: _Hex


def load_identity(path: Path) -> keys.SigningKey:
    """The device's Ed25519 key: 64 hexadecimal digits. Raises ConfigError."""
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        problem = config.unreadable(f"identity key {path}", error)
        raise ConfigError(f"{problem}; `covey-device join` makes one") from error
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
    """The session's memory in two small JSON files. directory: made, mode 0700, if it is not there.

    ``memory.json``: rounds and contributions; ``votes.json``: votes, which change twice a round and
    would otherwise have all contributions written again, on a card that wears.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "memory.json"
        self._votes = directory / "votes.json"
        self._kept: dict[Path, bytes] = {}
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
        # A process that was killed between renaming a file and syncing its name leaves what a power cut
        # can still take back, after this one acted on it.
        sync_names(self._directory)
        kept = _read(self._path, _MemoryFile) or _MemoryFile(0, {})
        votes = _read(self._votes, tuple[_VoteFile, ...]) or ()
        return Memory(
            kept.last_round,
            kept.contributed,
            Day(kept.day.own_s, kept.day.seen_unix, kept.day.joined),
            tuple(Vote(bytes.fromhex(v.h), v.kind, bytes.fromhex(v.body)) for v in votes),
            kept.signed_unix,
        )

    def save(self, memory: Memory) -> None:
        """Durable when this returns. Raises StorageError, and keeps the old file."""
        votes = tuple(_VoteFile(v.h.hex(), v.kind, v.body.hex()) for v in memory.votes[-MAX_VOTES:])
        if votes or self._votes in self._kept:
            self._write(self._votes, msgspec.json.encode(votes))
        recent = dict(list(memory.contributed.items())[-MAX_CONTRIBUTIONS:])
        day = _DayFile(memory.day.own_s, memory.day.seen_unix, memory.day.joined)
        kept = _MemoryFile(memory.last_round, recent, day, memory.signed_unix)
        self._write(self._path, msgspec.json.encode(kept))

    def keep(self, upload: Unfinished) -> None:
        """Have an upload outlive this process; durable when this returns. Raises StorageError."""
        unfinished.keep(self._directory, upload)

    def forget(self) -> None:
        """Drop the upload that is kept, if there is one."""
        unfinished.forget(self._directory)

    def unfinished(self, trust: Trust, identity: bytes, device: DeviceId) -> Unfinished | None:
        """The upload that an earlier process kept. identity: this device's public key."""
        return unfinished.load(self._directory, trust, identity, device)

    def _write(self, path: Path, data: bytes) -> None:
        if self._kept.get(path) == data:
            return
        self._kept.pop(path, None)  # whether it was written is not known if the next line fails
        write_durably(path, data)
        self._kept[path] = data


def _read(path: Path, kind: type[T]) -> T | None:
    """None if there is no such file. Raises StorageError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}; check its owner") from error
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageError(
            f"{path} is damaged ({error}); restore it, or enrol this device anew under another name"
        ) from error
