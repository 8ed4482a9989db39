"""The coordinator's database among the made-up disks: SQLite itself, on a file, and what may befall it.

Before a transaction that wrote something is committed, its process may die, which loses all of it, or
find the disk full; after it, die with all of it kept. A power cut takes commits back that were not made
to outlive one: as many of the last as chance has it, and none from before the last durable one. The file
is brought to that when a new process is about to begin, as the journal is by SQLite.
"""

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy import event
from sqlalchemy.engine import Engine

from covey_coordinator.store import opening
from simulation.disk import Disk
from simulation.loop import RUNNING, Process

_FULL = 2  # PRAGMA synchronous: every commit is synced


class Database:
    """A file and its history. states: what it was after the last durable commit and each one since;
    kept for disks alone that a power cut can come to."""

    def __init__(self, path: Path, disk: Disk, *, forgetful: bool) -> None:
        self.path, self.disk, self.forgetful = path, disk, forgetful
        self.states: list[bytes] = [path.read_bytes()] if forgetful else []
        self.commits = 0
        self._forgotten: bytes | None = None

    def power_cut(self) -> None:
        """Draw what is lost."""
        if self.forgetful:
            kept = self.disk.chance.randint(0, len(self.states) - 1)
            self._forgotten = self.states[kept]
            self.states = [self._forgotten]

    def recover(self) -> None:
        """Nobody has it open any more, and somebody is about to."""
        state, self._forgotten = self._forgotten, None
        if state is not None:
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            self.path.write_bytes(state)

    def commit(self, raw: sqlite3.Connection, commit: Callable[[], None], process: Process) -> None:
        """Of a transaction that wrote something."""
        process.effect("disk: commit")
        if self.disk.full:
            raw.execute("ROLLBACK")  # as SQLite does by itself
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            error.sqlite_errorname = "SQLITE_FULL"
            raise error
        commit()
        self.commits += 1
        if self.forgetful:
            (synchronous,) = raw.execute("PRAGMA synchronous").fetchone()
            if synchronous >= _FULL:
                self.states.clear()
            self.states.append(raw.serialize())
        process.effect("disk: committed")


_first: list[Engine] = []
"""Later engines share what this one knows: its dialect, and the statements that it has compiled."""


def _commit(real: Callable[[Any], None], connection: Any) -> None:
    raw, info = connection.driver_connection, connection.info
    database, process = info.get("database"), info.get("process")
    written = info.get("written", 0) != raw.total_changes
    info["written"] = raw.total_changes
    if database is not None and written:
        database.commit(raw, lambda: real(connection), process)
    else:
        real(connection)


@contextlib.contextmanager
def installed(database_of: Callable[[Process], Database | None]) -> Iterator[None]:
    """Have the databases of processes ask. database_of: the one of a process."""
    real = opening.engine_for

    def engine_for(path: Path | None) -> Engine:
        engine, process = real(path), RUNNING.get()
        if not _first:
            engine.dialect.do_commit = partial(_commit, engine.dialect.do_commit)  # type: ignore[method-assign]
            _first.append(engine)
        engine.dialect, engine._compiled_cache = _first[0].dialect, _first[0]._compiled_cache
        database = database_of(process) if process is not None else None
        if database is not None and path == database.path:
            event.listen(
                engine,
                "connect",
                lambda raw, record: record.info.update(database=database, process=process),
            )
        return engine

    with mock.patch.object(opening, "engine_for", engine_for):
        yield
