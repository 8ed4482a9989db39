"""What the coordinator keeps on disk, every file whole or not there.

A fleet's directory::

    covey.toml             the configuration
    ca/ca.key, ca.pub      the fleet CA
    coordinator.key, .pub  the key that devices pin
    rounds                 the highest round number ever called
    broker/                the broker's own files, when `covey up` runs it
    devices/NAME/          what is handed to a device, and its identity's public key
    runs/NAME/             one run

and a run's::

    run.toml               what was asked for
    state.json             where it stands
    parameters.bin         the current model, one little-endian float32 vector
    model.onnx             the same, as one file that anything can load
    metrics.jsonl          one line per round
    rounds/00007/model.onnx
    spool/                 uploads of the open round
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from covey_shared.errors import ConfigError, StorageError
from covey_shared.layout import Flat

RunStatus = Literal["queued", "running", "completed", "stopped", "failed"]


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644, durable: bool = True) -> None:
    """Write a new file beside `path`, sync it and rename it over. Raises StorageError."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            if durable:
                os.fsync(fd)
        fresh.replace(path)
        if durable:
            _sync_directory(path.parent)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error.strerror}; free some space, or check its owner"
        ) from error


def append_line(path: Path, line: bytes) -> None:
    """Append one line durably. A line that was cut off by a crash before is completed first."""
    try:
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            try:
                file.write(line + b"\n")
                file.flush()
            except OSError:
                file.truncate(size)  # half a line would be worse than none
                raise
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            f"cannot append to {path}: {error.strerror}; free some space, or check its owner"
        ) from error


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunState(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Where a run stands. revision: abandoned rounds on the current model since its uploads began."""

    status: RunStatus = "queued"
    run_id: str
    rounds_done: Annotated[int, Meta(ge=0)] = 0
    rounds_completed: Annotated[int, Meta(ge=0)] = 0
    rounds_abandoned: Annotated[int, Meta(ge=0)] = 0
    revision: Annotated[int, Meta(ge=0)] = 0
    message: str = ""


class Progress(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A running round, for whoever watches. Not durable."""

    round: int
    index: int
    phase: str
    detail: str
    answered: int
    awaited: int
    present: int


class RoundCounter:
    """Round numbers only ever grow, over all runs of a fleet: devices refuse to go back."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def next(self) -> int:
        """A number never given before, made durable before it is used. Raises StorageError."""
        try:
            last = int(self._path.read_text(encoding="ascii")) if self._path.exists() else 0
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{self._path} is unreadable ({error}); write into it a number above the last round"
            ) from error
        write_atomic(self._path, b"%d\n" % (last + 1))
        return last + 1


class RunDirectory:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name

    @classmethod
    def create(cls, path: Path, run_toml: bytes, run_id: bytes) -> "RunDirectory":
        """Queue a run. Raises StorageError, ConfigError if there is one of that name."""
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(
                f"there is a run {path.name!r} already; choose another name"
            ) from None
        except OSError as error:
            raise StorageError(f"cannot make {path}: {error.strerror}") from error
        run = cls(path)
        write_atomic(path / "run.toml", run_toml)
        run.save_state(RunState(run_id=run_id.hex()))  # last: what has a state is complete
        return run

    @property
    def spool(self) -> Path:
        """Where uploads of the open round wait."""
        return self.path / "spool"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, one line a round."""
        return self.path / "metrics.jsonl"

    def state(self) -> RunState:
        """Raises StorageError."""
        path = self.path / "state.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=RunState)
        except (OSError, msgspec.MsgspecError) as error:
            raise StorageError(f"cannot read {path}: {error}") from error

    def save_state(self, state: RunState) -> None:
        """Durable when this returns. Raises StorageError."""
        write_atomic(self.path / "state.json", msgspec.json.encode(state))

    def parameters(self, n_params: int) -> Flat | None:
        """The current model; None before the first completed round. Raises StorageError."""
        path = self.path / "parameters.bin"
        if not path.exists():
            return None
        try:
            flat = np.fromfile(path, dtype="<f4").astype(np.float32)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        if flat.shape != (n_params,):
            raise StorageError(f"{path} has {flat.size} values, the plan {n_params}")
        return flat

    def save_model(self, index: int, parameters: Flat, model: bytes) -> None:
        """A completed round's model: its own copy, and the current one. Raises StorageError."""
        directory = self.path / "rounds" / f"{index:05}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {directory}: {error.strerror}") from error
        write_atomic(directory / "model.onnx", model)
        write_atomic(self.path / "model.onnx", model)
        write_atomic(self.path / "parameters.bin", parameters.astype("<f4").tobytes())

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append a round's line. Raises StorageError."""
        append_line(self.metrics, msgspec.json.encode(line))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines so far."""
        try:
            lines = self.metrics.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        kept = []
        for line in lines:
            try:
                kept.append(msgspec.json.decode(line, type=dict[str, Any]))
            except msgspec.MsgspecError:
                continue  # empty, or cut off by a crash
        return kept

    def show(self, progress: Progress) -> None:
        """Tell watchers where the open round stands; best effort."""
        write_atomic(self.path / "progress.json", msgspec.json.encode(progress), durable=False)

    def progress(self) -> Progress | None:
        """What `show` wrote last, if anything."""
        try:
            return msgspec.json.decode((self.path / "progress.json").read_bytes(), type=Progress)
        except (OSError, msgspec.MsgspecError):
            return None
