"""The models that a device keeps for its own applications, as files that never disagree.

A directory::

    current            -> kept/00000012-4f0c9a31b2de     switched by one rename
    current.onnx       -> current/model.onnx             the model, a name that stays
    current.json       -> current/model.json             what it is, and who vouches for it
    previous, previous.onnx, previous.json               the same of the model before
    kept/NAME/         model.onnx, model.json, plan.json

Everything of a model lies in one folder of ``kept``, which is written as a whole, synced, and never changed
after that; then ``current`` is made to name it. So a power cut leaves the old model or the new one. A reader
that resolves ``current`` once has files that belong together, and those of the model before stay for one
model more. Files are for the service's group to read (0640), which is who local applications run as.

What vouches for a model is the coordinator's signature on the call that names the plan, and on the result
that names the model; that ``model.onnx`` is those two put together is this device's own word, signed with
its identity. `verify` checks all of it, offline.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from covey_shared import keys, wire
from covey_shared.errors import (
    ConfigError,
    MalformedError,
    RefusedError,
    RemoteProtocolError,
    StorageError,
)
from covey_shared.keys import SigningKey
from covey_shared.messages import MAX_ENVELOPE_BYTES, DeviceId, Result, RoundCall
from covey_shared.plan import DType, PlanHeader, decode_header, plan_hash
from covey_shared.secagg.cohort import Trust

CURRENT, PREVIOUS, KEPT = "current", "previous", "kept"
MODEL, SIDECAR, PLAN = "model.onnx", "model.json", "plan.json"
LABEL = "model at home"

MAX_SIDECAR_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20
_FILE_MODE, _FOLDER_MODE = 0o640, 0o750

_Hex = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Envelope = Annotated[bytes, Meta(max_length=MAX_ENVELOPE_BYTES)]
_Count = Annotated[int, Meta(ge=0)]


class Port(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An input or output. shape: of one example; the batch comes before it."""

    name: str
    type: DType
    shape: tuple[int, ...]


class Sidecar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``model.json``: which model this is, how to use it, and who vouches for it.

    round: by whose call or result it came. plan, model: SHA-256 of the plan's header and of the parameters
    as one flat vector; onnx, size: of the file. input, output: as onnxruntime wants and gives them.
    written_unix: by this device's clock. before: the folder of the model that was current until then.
    round_call, result: what the coordinator signed, in base64; without a result it is the model that the
    call begins with. signature: of this device's identity over all of the above.
    """

    format: Literal[1] = 1
    fleet: str
    device: str
    run: str
    round: int
    plan_name: str
    plan: _Hex
    model: _Hex
    onnx: _Hex
    size: _Count
    input: Port
    output: Port
    loss: str
    classes: int | None
    written_unix: int
    before: str | None
    round_call: _Envelope
    result: _Envelope | None
    signature: bytes = b""

    @property
    def key(self) -> tuple[int, bool]:
        """Grows from model to model: a round's result comes after its call."""
        return self.round, self.result is not None

    def signed(self, identity: SigningKey) -> "Sidecar":
        """With a signature."""
        unsigned = msgspec.structs.replace(self, signature=b"")
        signature = identity.sign(LABEL, msgspec.json.encode(unsigned))
        return msgspec.structs.replace(self, signature=signature)

    def check(self, identity: bytes) -> None:
        """Raise SignatureError unless this identity signed it."""
        unsigned = msgspec.json.encode(msgspec.structs.replace(self, signature=b""))
        keys.verify(identity, LABEL, unsigned, self.signature, signer="this device")


class Vouched(msgspec.Struct, frozen=True):
    """A model that the coordinator signed. Raises nothing once it is made: `vouched` checks."""

    call: wire.Signed[RoundCall]
    result: wire.Signed[Result] | None = None

    @property
    def model(self) -> bytes:
        """SHA-256 of the flat vector."""
        return self.call.message.model if self.result is None else self.result.message.next_model

    @property
    def key(self) -> tuple[int, bool]:
        """As `Sidecar.key`."""
        return self.call.message.round, self.result is not None


def vouched(call: bytes, result: bytes | None, trust: Trust) -> Vouched:
    """What two envelopes vouch for. Raises RemoteProtocolError unless the fleet's coordinator signed them
    and they are of one round."""
    opened = wire.opened(RoundCall, call, trust.coordinator, signer="the coordinator")
    if opened.message.fleet != trust.fleet:
        raise RefusedError(f"a call of fleet {opened.message.fleet}")
    if result is None:
        return Vouched(opened)
    ended = wire.opened(Result, result, trust.coordinator, signer="the coordinator")
    if not belong(opened.message, ended.message):
        raise RefusedError("a call and a result of two rounds")
    return Vouched(opened, ended)


def belong(call: RoundCall, result: Result) -> bool:
    """Whether they are of one round."""
    return (call.fleet, call.run, call.round) == (result.fleet, result.run, result.round)


def sidecar_of(
    source: Vouched,
    header: PlanHeader,
    shape: tuple[int, ...],
    *,
    device: DeviceId,
    onnx: str,
    size: int,
    written_unix: int,
    before: str | None,
) -> Sidecar:
    """A model's description, unsigned. shape: of one prediction. onnx: SHA-256 of the file."""
    call, result = source.call, source.result
    features = header.features
    return Sidecar(
        fleet=call.message.fleet,
        device=device,
        run=call.message.run.hex(),
        round=call.message.round,
        plan_name=header.name,
        plan=call.message.plan.hex(),
        model=source.model.hex(),
        onnx=onnx,
        size=size,
        input=Port(name="features", type=features.dtype, shape=features.shape),
        output=Port(name="predictions", type="float32", shape=shape),
        loss=header.loss,
        classes=header.classes,
        written_unix=written_unix,
        before=before,
        round_call=call.envelope,
        result=None if result is None else result.envelope,
    )


def none_yet(path: Path, *, keep: bool) -> str:
    """Why there is no model in this directory, for its owner. keep: `model.keep`."""
    if not keep:
        return f"no model is kept: `model.keep` is false in device.toml ({path} has none)"
    return (
        f"there is no model in {path} yet: it comes with a round that `covey-device run` hears of"
    )


# -- one model -------------------------------------------------------------------------------------


def read_sidecar(folder: Path) -> Sidecar:
    """A kept model's description; nothing of it is checked. Raises StorageError."""
    path = folder / SIDECAR
    data = _read(path, MAX_SIDECAR_BYTES)
    try:
        return msgspec.json.decode(data, type=Sidecar)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({error})") from error


def read_plan(folder: Path, sidecar: Sidecar) -> PlanHeader:
    """A kept model's plan, checked to be the one that is named. Raises StorageError."""
    path = folder / PLAN
    data = _read(path, MAX_SIDECAR_BYTES)
    try:
        if plan_hash(data).hex() != sidecar.plan:
            raise MalformedError("it is another plan's")
        return decode_header(data)
    except RemoteProtocolError as error:
        raise StorageError(f"{path} is damaged: {error}") from error


def read_model(folder: Path, sidecar: Sidecar) -> bytes:
    """A kept model's file, its hash checked. Raises StorageError."""
    path = folder / MODEL
    data = _read(path, sidecar.size)
    _check_hash(path, hashlib.sha256(data).hexdigest(), sidecar)
    return data


def check_model(folder: Path, sidecar: Sidecar) -> None:
    """Raise StorageError unless a kept model's file is there and whole. Never holds all of it."""
    path, digest, size = folder / MODEL, hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if size != sidecar.size:
        raise StorageError(f"{path} is damaged: it has {size:,} bytes, not {sidecar.size:,}")
    _check_hash(path, digest.hexdigest(), sidecar)


def _check_hash(path: Path, found: str, sidecar: Sidecar) -> None:
    if found != sidecar.onnx:
        raise StorageError(f"{path} is damaged: its hash is not the one in {SIDECAR}")


def verify(folder: Path, trust: Trust, device: DeviceId, identity: bytes) -> Sidecar:
    """Check everything that vouches for a kept model, from the coordinator's signatures to the file's
    bytes. identity: this device's public key.

    Raises StorageError for files that are damaged, RemoteProtocolError for signatures that do not hold.
    """
    sidecar = read_sidecar(folder)
    sidecar.check(identity)
    source = vouched(sidecar.round_call, sidecar.result, trust)
    header = read_plan(folder, sidecar)
    expected = sidecar_of(
        source, header, sidecar.output.shape, device=device, onnx=sidecar.onnx, size=sidecar.size,
        written_unix=sidecar.written_unix, before=sidecar.before,
    )  # fmt: skip
    if msgspec.structs.replace(sidecar, signature=b"") != expected:
        raise RefusedError("it says something else than what the coordinator signed")
    check_model(folder, sidecar)
    return sidecar


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > most:
        raise StorageError(f"{path} is damaged: it has more than {most:,} bytes")
    return data


Describe = Callable[[str, str | None], Sidecar]
"""Makes a signed description of the file with this SHA-256, after the model in that folder."""


# -- the directory ---------------------------------------------------------------------------------


class ModelDirectory:
    """The models of one device. reserve_bytes: what is left free on the disk. Any thread may call it; what
    changes something waits for other processes that do."""

    def __init__(self, path: Path, *, reserve_bytes: int) -> None:
        self.path = path
        self._reserve = reserve_bytes

    def folder(self, link: str = CURRENT) -> Path | None:
        """Where the current model's files are, or the previous one's; they stay there. None: no such."""
        try:
            name = (self.path / link).readlink()
        except OSError:
            return None
        folder = self.path / name
        return folder if folder.is_dir() else None

    def sidecar(self, link: str = CURRENT) -> Sidecar | None:
        """Of the current model, or the previous one; None if there is none that can be read."""
        folder = self.folder(link)
        if folder is not None:
            with contextlib.suppress(StorageError):
                return read_sidecar(folder)
        return None

    def settle(self) -> None:
        """After a power cut: the model before the current one is the previous one. Raises StorageError."""
        with self._failing("tidied"):
            if not self.path.is_dir():
                return
            with self._locked():
                sidecar = self.sidecar()
                before = sidecar.before if sidecar is not None else None
                # After a rollback it is no longer there.
                if before and (self.path / KEPT / before).is_dir():
                    self._point(PREVIOUS, before)
                self._tidy()

    def put(self, model: int, size: int, plan: bytes, name: str, describe: Describe) -> Path:
        """Keep a model, and make it the current one; returns its folder. Durable when this returns.

        model: a descriptor, read from its start. plan: the header's bytes. name: of the folder, if it is
        not taken. describe: makes the signed description. Raises StorageError, and keeps what was.
        """
        with self._failing("written"):
            self._make(self.path.parent, self.path)
            with self._locked():
                self._make(self.path, self.path / KEPT)
                if shutil.disk_usage(self.path).free < size + len(plan) + self._reserve:
                    raise StorageError(
                        f"too little space for a model of {size / 1e6:.1f} MB in {self.path}: "
                        f"{self._reserve / 1e6:.0f} MB are left free for what matters more"
                    )
                return self._put(model, size, plan, name, describe)

    def _put(self, model: int, size: int, plan: bytes, name: str, describe: Describe) -> Path:
        kept, before = self.path / KEPT, self.folder()
        while (folder := kept / name) in (before, self.folder(PREVIOUS)):
            name = f"{name}-again"
        fresh = kept / ".new"
        for left_over in (fresh, folder):  # of a power cut
            shutil.rmtree(left_over, ignore_errors=True)
        fresh.mkdir()
        try:
            fresh.chmod(_FOLDER_MODE)
            digest = _copy(model, size, fresh / MODEL)
            _write(fresh / PLAN, plan)
            sidecar = describe(digest, None if before is None else before.name)
            _write(fresh / SIDECAR, msgspec.json.format(msgspec.json.encode(sidecar), indent=1))
            _sync(fresh)
            fresh.rename(folder)
        except OSError:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        _sync(kept)
        for link in (CURRENT, PREVIOUS):
            for suffix, file in ((".onnx", MODEL), (".json", SIDECAR)):
                self._link(f"{link}{suffix}", f"{link}/{file}")
        self._point(CURRENT, name)
        if before is not None:
            self._point(PREVIOUS, before.name)
        self._tidy()
        return folder

    def rollback(self) -> Sidecar:
        """Change the current and the previous model's places. Raises StorageError, ConfigError if there is
        no previous one."""
        with self._failing("written"):
            current, previous = self.folder(), self.folder(PREVIOUS)
            if previous is None or previous == current:
                raise ConfigError(f"{self.path} has no previous model to go back to")
            with self._locked():
                sidecar = read_sidecar(previous)
                self._point(CURRENT, previous.name)
                if current is not None:
                    self._point(PREVIOUS, current.name)
                return sidecar

    def note(self, name: str, data: bytes | None) -> None:
        """Have a few bytes outlive this process; None: remove them. Raises StorageError."""
        path, fresh = self.path / name, self.path / f".{name}.new"
        with self._failing("written"):
            if data is None:
                path.unlink(missing_ok=True)
                return
            self._make(self.path.parent, self.path)
            fresh.unlink(missing_ok=True)
            _write(fresh, data)
            fresh.replace(path)
            _sync(self.path)

    def noted(self, name: str) -> bytes | None:
        """What was noted, if it can be read."""
        try:
            return (self.path / name).read_bytes()
        except OSError:
            return None

    # -- parts ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be {what}: {error.strerror}; free some space, or check its owner"
            ) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    @staticmethod
    def _make(parent: Path, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            folder.chmod(_FOLDER_MODE)
            _sync(parent)

    def _point(self, link: str, name: str) -> None:
        """One rename, on the disk when this returns."""
        self._link(link, f"{KEPT}/{name}")
        _sync(self.path)

    def _link(self, name: str, target: str) -> None:
        path, fresh = self.path / name, self.path / f".{name}.new"
        with contextlib.suppress(OSError):
            if str(path.readlink()) == target:
                return
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(path)

    def _tidy(self) -> None:
        """Remove what neither name leads to."""
        wanted = {self.folder(), self.folder(PREVIOUS)}
        kept = self.path / KEPT
        for folder in kept.iterdir() if kept.is_dir() else ():
            if folder not in wanted:
                shutil.rmtree(folder, ignore_errors=True)


def _copy(source: int, size: int, path: Path) -> str:
    """The SHA-256 of what was copied, which is on the disk when this returns."""
    digest = hashlib.sha256()
    with _writing(path) as fd:
        at = 0
        while at < size:
            block = os.pread(source, min(_BLOCK_BYTES, size - at), at)
            if not block:
                raise StorageError(f"a model ended after {at:,} of {size:,} bytes")
            digest.update(block)
            _put(fd, block)
            at += len(block)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    with _writing(path) as fd:
        _put(fd, data)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    try:
        os.fchmod(fd, _FILE_MODE)  # whatever the umask
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)


def _put(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
