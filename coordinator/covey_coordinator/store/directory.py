"""A run's files. Where it stands is in the database; here is what is too large for it, or for others.

A fleet's directory::

    covey.toml             the configuration
    covey.db               the database (see `Store`), with -wal and -shm beside it while it is in use
    ca/ca.key, ca.pub      the fleet CA
    coordinator.key, .pub  the key that devices pin
    broker/                the broker's own files, when `covey up` runs it
    devices/NAME/          what is handed to a device, and its identity's public key
    runs/NAME/             one run

and a run's::

    run.toml               what was asked for
    signatures/            of its plan, by model owners, if there are any
    parameters.bin         the current model, one little-endian float32 vector
    model.onnx             the same, as one file that anything can load
    metrics.jsonl          one line per round
    rounds/00007/          what the round gave: parameters.bin, model.onnx
    rounds/00007/transcript  what others can check it by (see `transcript`)
    rolled-back/00007-41/  the same of a round that was taken back, number 41 of the fleet's
    progress.json          the open round, for whoever watches
    spool/                 uploads of the open round

A round's end is several files and one transaction, and the transaction decides. Its model is on the disk
before; what the database says and other files lack, `RunDirectory.settle` makes up for afterwards; what
they hold and it does not name, never happened.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
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
from covey_coordinator.store.database import Store
from covey_coordinator.store.state import (
    UNREADABLE,
    Attendance,
    Progress,
    RoundRecord,
    RunRecord,
    RunState,
    RunStatus,
    Wish,
)
from covey_shared.errors import ConfigError, StorageError
from covey_shared.layout import Flat

PARAMETERS = "parameters.bin"
MODEL = "model.onnx"
_OF_A_NEW_RUN = {"run.toml", "signatures", ".run.toml.new"}


class RunDirectory:
    """One run: its files, and its state in the fleet's database. Its name is the directory's."""

    def __init__(self, path: Path, store: Store) -> None:
        self.path = path
        self.name = path.name
        self.store = store

    @classmethod
    def create(
        cls,
        path: Path,
        run_toml: bytes,
        run_id: bytes,
        store: Store,
        signatures: Mapping[str, bytes] | None = None,
        *,
        created_unix: float = 0.0,
    ) -> "RunDirectory":
        """Queue a run. signatures: its plan's, by file name.

        Raises StorageError, ConfigError if there is one of that name.
        """
        taken = ConfigError(f"there is a run {path.name!r} already; choose another name")
        with _held(path.parent):
            if store.has_run(path.name):
                raise taken
            _clear_left_over(path)
            run = cls(path, store)
            try:
                path.mkdir()
                write_atomic(path / "run.toml", run_toml)
                if signatures:
                    run.signatures.mkdir()
                    for name, envelope in signatures.items():
                        write_atomic(run.signatures / name, envelope)
                sync_directory(path.parent)
                # Last: what is in the database is complete.
                store.add_run(path.name, run_id, created_unix)
            except StorageError:
                shutil.rmtree(path, ignore_errors=True)
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

    def round(self, index: int) -> Path:
        """Where a round's own files are. index: its number within the run."""
        return self.path / "rounds" / f"{index:05}"

    # -- its state --------------------------------------------------------------------------------

    def state(self) -> RunState:
        """Where it stands. Raises StorageError, ConfigError if the database does not know it."""
        return self.store.run(self.name)

    def save_state(self, state: RunState) -> None:
        """Durable when this returns. Raises StorageError."""
        self.store.save_run(self.name, state)

    def take_up(self) -> RunState:
        """Its state, running from now on. Raises StorageError, ConfigError if an operator stopped it."""

        def change(record: RunRecord) -> None:
            if record.state.status in ("paused", "aborted"):
                raise ConfigError(f"run {self.name} is {record.state.status}")
            record.state.status, record.state.message = "running", ""

        return self.store.amend(self.name, change).state

    def end(self, *, rounds_left: bool) -> RunState:
        """Its state, no longer running: completed, or as an operator wished. Raises StorageError."""

        def change(record: RunRecord) -> Wish:
            wished: dict[Wish, RunStatus] = {"": "stopped", "abort": "aborted"}
            ended = wished.get(record.wish, "paused") if rounds_left else "completed"
            record.state.status = ended
            return ""

        return self.store.amend(self.name, change).state

    def finish_round(self, state: RunState, attendance: Attendance | None = None) -> None:
        """The end of a round whose model is staged. Raises StorageError."""
        self.store.finish_round(self.name, state, attendance)

    # -- models -----------------------------------------------------------------------------------

    def parameters(self, state: RunState, n_params: int) -> Flat | None:
        """The current model; None before the first completed round. Raises StorageError."""
        if not state.model:
            return None
        for path in (self.round(state.model_index) / PARAMETERS, self.path / PARAMETERS):
            data = _content(path)
            if data is not None and _is(data, state.model) and len(data) == 4 * n_params:
                return np.frombuffer(data, "<f4").astype(np.float32)
        raise StorageError(
            f"{self.path / PARAMETERS} is not the model that {self.store.place} names; restore both, "
            "or queue the run anew"
        )

    def stage_model(self, index: int, parameters: Flat, model: bytes) -> None:
        """A completed round's model, before `finish_round` names it. Raises StorageError."""
        directory = self.round(index)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            sync_directory(directory.parent)
        except OSError as error:
            raise storage_error("make", directory, error) from error
        write_atomic(directory / MODEL, model)
        write_atomic(directory / PARAMETERS, parameters.astype("<f4").tobytes())

    def staged(self) -> dict[int, Path]:
        """Rounds whose model is here: index -> its parameters. Raises StorageError."""
        try:
            found = list((self.path / "rounds").glob(f"*/{PARAMETERS}"))
        except OSError as error:
            raise storage_error("read", self.path / "rounds", error) from error
        return {int(path.parent.name): path for path in found if path.parent.name.isdecimal()}

    def drop_models(self, indices: Iterable[int]) -> None:
        """Remove rounds' models; their transcripts stay. Raises StorageError."""
        for index in indices:
            directory = self.round(index)
            try:
                for name in (MODEL, PARAMETERS):
                    (directory / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    directory.rmdir()  # if there is nothing else in it
            except OSError as error:
                raise storage_error("remove", directory, error) from error

    # -- after a round ----------------------------------------------------------------------------

    def settle(self, state: RunState, *, whole: bool = False) -> None:
        """Bring the other files to what the database says. whole: look at every line of metrics, not
        at the last one. Raises StorageError, and can be called again."""
        if whole:
            self._put_aside(state)
        self._settle_model(state)
        lines = _lines(self.store.rounds(self.name)) if whole else None
        if lines is None:
            last = b"" if state.last is None else msgspec.json.encode(state.last)
            present = self._last_line()
            if present == last:
                return
            if last and _index(present) == state.rounds_done - 1:
                append_line(self.metrics, last)
                return
            lines = _lines(self.store.rounds(self.name))
        if (_content(self.metrics) or b"") != lines:
            write_atomic(self.metrics, lines)

    def _put_aside(self, state: RunState) -> None:
        """Files of rounds that were rolled back, before others take their numbers. Done once, which the
        place where they go shows: it is made even if there was nothing left to put there."""
        for record in self.store.history(self.name):
            aside = self.aside(record)
            if record.rolled_back_unix is None or aside.exists():
                continue
            try:
                aside.parent.mkdir(exist_ok=True)
                if record.index > state.rounds_done and self.round(record.index).exists():
                    self.round(record.index).rename(aside)
                else:
                    aside.mkdir()
                sync_directory(aside.parent)
            except OSError as error:
                raise storage_error("write", aside, error) from error

    def aside(self, record: RoundRecord) -> Path:
        """Where the files of a round are that was rolled back."""
        return self.path / "rolled-back" / record.key

    def _settle_model(self, state: RunState) -> None:
        """parameters.bin and model.onnx are other names of the round's files, where the file system
        has such a thing."""
        if not state.model:
            try:
                for name in (MODEL, PARAMETERS):
                    (self.path / name).unlink(missing_ok=True)
            except OSError as error:
                raise storage_error("remove", self.path / MODEL, error) from error
            return
        staged = self.round(state.model_index)
        try:
            for name in (MODEL, PARAMETERS):
                self._release(staged / name, self.path / name)
            sync_directory(self.path)
        except FileNotFoundError:
            # A backup without its rounds, or somebody made room: what is here may be right as it is.
            if _is(_content(self.path / PARAMETERS) or b"", state.model):
                return
            raise StorageError(
                f"{staged} lacks the model that {self.store.place} names; restore both, or queue the "
                "run anew"
            ) from None
        except OSError as error:
            raise storage_error("write", self.path / PARAMETERS, error) from error

    def _release(self, staged: Path, to: Path) -> None:
        """Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            if to.samefile(staged):
                return
        fresh = to.with_name(f".{to.name}.new")
        fresh.unlink(missing_ok=True)
        try:
            os.link(staged, fresh)
        except FileNotFoundError:
            raise
        except OSError:
            data = staged.read_bytes()
            if _content(to) != data:
                write_atomic(to, data)
        else:
            fresh.replace(to)

    def _last_line(self) -> bytes:
        try:
            return last_line(self.metrics)
        except OSError as error:
            raise storage_error("read", self.metrics, error) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl. Raises StorageError."""
        kept = []
        for line in (_content(self.metrics) or b"").split(b"\n"):
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


@contextlib.contextmanager
def _held(runs: Path) -> Iterator[None]:
    """The directory of all runs, made if it is not there, with no other process queueing one."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        fd = os.open(runs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise storage_error("make", runs, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _clear_left_over(path: Path) -> None:
    """Remove what a `covey run` left that died before it had queued its run, and nothing else."""
    try:
        names = {entry.name for entry in path.iterdir()}
        if names <= _OF_A_NEW_RUN:
            shutil.rmtree(path)
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error("read", path, error) from error
    raise ConfigError(
        f"{path} holds files of a run that the database does not know; choose another name, or move "
        "it away"
    )


def _content(path: Path) -> bytes | None:
    """Of a file; None if there is none. Raises StorageError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("read", path, error) from error


def _is(data: bytes, digest: str) -> bool:
    return hashlib.sha256(data).hexdigest() == digest


def _lines(rounds: list[dict[str, Any]]) -> bytes:
    return b"".join(msgspec.json.encode(line) + b"\n" for line in rounds)


def _index(line: bytes) -> int | None:
    try:
        index = msgspec.json.decode(line, type=dict[str, Any]).get("index")
    except UNREADABLE:
        return 0 if not line else None
    return index if isinstance(index, int) else None
