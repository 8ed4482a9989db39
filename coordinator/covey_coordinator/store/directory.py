"""What the coordinator keeps on disk, every file whole or not there (see `files`).

A fleet's directory::

    covey.toml             the configuration
    ca/ca.key, ca.pub      the fleet CA
    coordinator.key, .pub  the key that devices pin
    rounds                 what devices remember of rounds, mirrored (see `RoundCounter`)
    broker/                the broker's own files, when `covey up` runs it
    devices/NAME/          what is handed to a device, and its identity's public key
    runs/NAME/             one run

and a run's::

    run.toml               what was asked for
    signatures/            of its plan, by model owners, if there are any
    state.json             where it stands
    parameters.bin         the current model, one little-endian float32 vector
    model.onnx             the same, as one file that anything can load
    metrics.jsonl          one line per round
    rounds/00007/model.onnx
    rounds/00007/transcript  what others can check it by (see `transcript`)
    next.bin               a model that state.json may not name yet
    progress.json          the open round, for whoever watches
    spool/                 uploads of the open round

A round's end is several files, and one of them decides: `state.json` names the model by its hash and
holds the round's line of metrics. What it says and other files lack, `RunDirectory.settle` makes up
for; what they hold and it does not name, never happened.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from covey_coordinator.files import (
    append_line,
    last_line,
    storage_error,
    sync_directory,
    write_atomic,
)
from covey_coordinator.store.state import UNREADABLE, Count, Progress, RunState
from covey_shared.errors import ConfigError, StorageError
from covey_shared.layout import Flat

MAX_REMEMBERED_MODELS = 1000
"""As many as devices remember to have contributed to."""


class _Rounds(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    last: Count = 0
    uploads: dict[str, Count] = msgspec.field(default_factory=dict)


class RoundCounter:
    """Round numbers and revisions, over all runs of a fleet: what its devices hold us to.

    A device joins no round up to the last one it joined, and contributes to the same model again
    only under a higher revision. So numbers only ever grow, and the revision of a model whose
    uploads began is used up, however its round ended and whichever run it was of.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def next(self) -> int:
        """A number never given before, made durable before it is used. Raises StorageError."""
        rounds = self._read()
        rounds.last += 1
        self._write(rounds)
        return rounds.last

    def revision(self, model: bytes) -> int:
        """Under which revision this model may be called. model: its hash. Raises StorageError."""
        used = self._read().uploads.get(model.hex())
        return 0 if used is None else used + 1

    def uploads_begin(self, model: bytes, revision: int) -> None:
        """Durable when this returns: from now on devices may contribute. Raises StorageError."""
        rounds = self._read()
        uploads, name = rounds.uploads, model.hex()
        used = max(revision, uploads.pop(name, 0))
        kept = list(uploads.items())[-(MAX_REMEMBERED_MODELS - 1) :]
        rounds.uploads = dict(kept) | {name: used}
        self._write(rounds)

    def _read(self) -> _Rounds:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Rounds)
        except FileNotFoundError:
            return _Rounds()
        except OSError as error:
            raise storage_error("read", self._path, error) from error
        except UNREADABLE as error:
            raise StorageError(
                f'{self._path} is damaged ({error}); write {{"last": N}} into it, N a number no '
                "lower than that of the last round, which `covey-device check` tells on a device"
            ) from error

    def _write(self, rounds: _Rounds) -> None:
        write_atomic(self._path, msgspec.json.encode(rounds))


class RunDirectory:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name

    @classmethod
    def create(
        cls,
        path: Path,
        run_toml: bytes,
        run_id: bytes,
        signatures: Mapping[str, bytes] | None = None,
    ) -> "RunDirectory":
        """Queue a run. signatures: its plan's, by file name.

        Raises StorageError, ConfigError if there is one of that name.
        """
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(
                f"there is a run {path.name!r} already; choose another name"
            ) from None
        except OSError as error:
            raise storage_error("make", path, error) from error
        run = cls(path)
        try:
            write_atomic(path / "run.toml", run_toml)
            if signatures:
                run.signatures.mkdir()
                for name, envelope in signatures.items():
                    write_atomic(run.signatures / name, envelope)
            run.save_state(RunState(run_id=run_id.hex()))  # last: what has a state is complete
        except StorageError:
            shutil.rmtree(path, ignore_errors=True)  # or its name would be taken
            raise
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise storage_error("make", path, error) from error
        return run

    @property
    def signatures(self) -> Path:
        """What model owners had signed of its plan when it was queued."""
        return self.path / "signatures"

    @property
    def spool(self) -> Path:
        """Where uploads of the open round wait."""
        return self.path / "spool"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, one line a round."""
        return self.path / "metrics.jsonl"

    def state(self) -> RunState:
        """Where it stands. Raises StorageError."""
        path = self.path / "state.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=RunState)
        except OSError as error:
            raise storage_error("read", path, error) from error
        except UNREADABLE as error:
            raise StorageError(
                f"{path} is damaged ({error}); restore it, or remove the run and queue it anew"
            ) from error

    def save_state(self, state: RunState) -> None:
        """Durable when this returns. Raises StorageError."""
        write_atomic(self.path / "state.json", msgspec.json.encode(state))

    def parameters(self, state: RunState, n_params: int) -> Flat | None:
        """The current model; None before the first completed round. Raises StorageError."""
        if not state.model:
            return None
        for name in ("parameters.bin", "next.bin"):
            with contextlib.suppress(FileNotFoundError):
                data = self._read(name)
                if hashlib.sha256(data).hexdigest() == state.model and len(data) == 4 * n_params:
                    return np.frombuffer(data, "<f4").astype(np.float32)
        raise StorageError(
            f"{self.path / 'parameters.bin'} is not the model that state.json names; restore both, "
            "or queue the run anew"
        )

    def stage_model(self, index: int, parameters: Flat, model: bytes) -> None:
        """A completed round's model, before `save_state` names it. Raises StorageError."""
        directory = self.path / "rounds" / f"{index:05}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            sync_directory(directory.parent)
        except OSError as error:
            raise storage_error("make", directory, error) from error
        write_atomic(directory / "model.onnx", model)
        write_atomic(self.path / "next.bin", parameters.astype("<f4").tobytes())

    def settle(self, state: RunState) -> None:
        """Bring the other files to what the saved state says. Raises StorageError, and can be
        called again."""
        fresh = self.path / "next.bin"
        try:
            if fresh.exists() and hashlib.sha256(self._read("next.bin")).hexdigest() == state.model:
                self._release(self.path / "rounds" / f"{state.model_index:05}" / "model.onnx")
                fresh.replace(self.path / "parameters.bin")
            fresh.unlink(missing_ok=True)
            sync_directory(self.path)
        except OSError as error:
            raise storage_error("write", self.path / "parameters.bin", error) from error
        if state.last is not None and self._last_index() != state.rounds_done:
            append_line(self.metrics, msgspec.json.encode(state.last))

    def _release(self, model: Path) -> None:
        """model.onnx is another name of the round's file, where the file system has such a thing."""
        name = self.path / ".model.onnx.new"
        name.unlink(missing_ok=True)
        try:
            os.link(model, name)
        except OSError:
            write_atomic(self.path / "model.onnx", model.read_bytes())
        else:
            name.replace(self.path / "model.onnx")

    def _last_index(self) -> int | None:
        try:
            line = msgspec.json.decode(last_line(self.metrics), type=dict[str, Any])
        except UNREADABLE:
            return None
        index = line.get("index")
        return index if isinstance(index, int) else None

    def _read(self, name: str) -> bytes:
        path = self.path / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error("read", path, error) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines so far. Raises StorageError."""
        try:
            lines = self.metrics.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error("read", self.metrics, error) from error
        kept = []
        for line in lines:
            with contextlib.suppress(*UNREADABLE):  # empty, or cut off by a crash
                kept.append(msgspec.json.decode(line, type=dict[str, Any]))
        return kept

    def show(self, progress: Progress) -> None:
        """Tell watchers where the open round stands; best effort."""
        write_atomic(self.path / "progress.json", msgspec.json.encode(progress), durable=False)

    def progress(self) -> Progress | None:
        """What `show` wrote last, if anything."""
        try:
            return msgspec.json.decode((self.path / "progress.json").read_bytes(), type=Progress)
        except (OSError, *UNREADABLE):
            return None
