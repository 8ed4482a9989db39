"""Opening the database: a file for this user alone, the newest schema, and errors people can use."""

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool, StaticPool

from covey_coordinator.files import storage_error, sync_directory
from covey_coordinator.store.schema import HEAD, OF_THE_OPEN_ROUND, REVISIONS, metadata, version
from covey_shared.errors import StorageError

BUSY_S = 5.0
"""How long another process may hold the database before that is an error."""

_SCRIPTS = Path(__file__).parent.parent / "migrations"
_RESTORE = (
    "stop covey and put a backup of it in its place, without a -wal and a -shm file beside it "
    "(docs/state.md says how)"
)


# -- errors ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Whatever the database raises, as a StorageError that names the file and what to do."""
    try:
        yield
    except DBAPIError as error:
        raise _refusal(path, error.orig) from error
    except sqlite3.Error as error:
        raise _refusal(path, error) from error
    except OSError as error:
        raise storage_error("use", path, error) from error
    except UnicodeDecodeError as error:
        raise damaged(path, error) from error
    except SQLAlchemyError as error:
        raise StorageError(f"cannot use {path}: {error}; {_RESTORE}") from error


def damaged(path: Path, what: object) -> StorageError:
    """The error for a database whose content makes no sense."""
    return StorageError(f"{path} is damaged ({what}); {_RESTORE}")


def _refusal(path: Path, error: BaseException | None) -> StorageError:
    """By SQLite's own codes: the low byte says what kind of trouble it is."""
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_FULL:
            return StorageError(f"cannot write {path}: the disk is full; free some space")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_CANTOPEN:
            return StorageError(
                f"cannot use {path}: {error}; check its owner, its directory's, and that the disk "
                "is not mounted read-only"
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StorageError(
                f"{path} was held by another process for {BUSY_S:g} s; try again, or end what holds it"
            )
        case sqlite3.SQLITE_NOTADB:
            return StorageError(f"{path} is not a database, or damaged; {_RESTORE}")
        case sqlite3.SQLITE_CORRUPT:
            return damaged(path, error)
        case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_NOMEM:
            return StorageError(f"cannot use {path}: {error}; free some space, and check the disk")
    return damaged(path, error)  # no such table, no such column: not as we left it


def passing(error: StorageError) -> bool:
    """Whether the connection is still good: the disk was full, somebody else held the file, or a
    constraint refused a row."""
    cause = error.__cause__
    code = getattr(getattr(cause, "orig", cause), "sqlite_errorcode", 0) & 0xFF
    return code in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_CONSTRAINT,
    )


# -- connections -----------------------------------------------------------------------------------


def engine_for(path: Path | None) -> Engine:
    """One connection to a file, or to a database in memory. Every transaction begins as
    `connection.info["begin"]` says; parameters, which may be secrets, are in no error."""
    engine = create_engine(
        "sqlite://" if path is None else f"sqlite:///{path}",
        poolclass=StaticPool if path is None else NullPool,
        connect_args={"check_same_thread": False, "timeout": BUSY_S},
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # transactions begin and end where we say
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA synchronous = FULL")
        if path is not None:
            _use_wal(connection, path)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.info.get("begin", "BEGIN"))

    return engine


def _use_wal(connection: sqlite3.Connection, path: Path) -> None:
    """Who opens a new database at the same moment makes this fail at once, busy timeout or not."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
            continue
        if mode != "wal":
            raise StorageError(
                f"cannot use {path}: its file system has no shared memory for SQLite; keep the fleet's "
                "directory on a local disk"
            )
        return


# -- the file --------------------------------------------------------------------------------------


def private_file(path: Path) -> None:
    """Make the file, or make it this user's alone; SQLite gives -wal and -shm the same mode."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        pass
    else:
        os.fchmod(fd, 0o600)
        os.close(fd)
        return
    # By name: a file opened and closed here would cost this process SQLite's locks on it.
    for name in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_IMODE(name.stat().st_mode) & 0o077:
                name.chmod(0o600)


def prepare(connection: Connection, path: Path | None) -> bool:
    """Bring the schema to the newest -> whether there was none, inside a transaction that is open for
    writing. An older one is copied first. Raises StorageError for a database of something else, or of
    a newer covey."""
    present = revision_of(connection)
    if present == HEAD:
        return False
    if present is None:
        if names := inspect(connection).get_table_names():
            raise StorageError(
                f"{path} is a database, but not of covey: it has the table {names[0]!r}; move it away"
            )
        metadata.create_all(connection)
        connection.execute(insert(version).values(version_num=HEAD))
        return True
    if present not in REVISIONS:
        raise StorageError(
            f"{path} was written by a newer covey (its schema is {present}, this one knows up to "
            f"{HEAD}): upgrade covey"
        )
    if path is not None:
        back_up(path, path.with_name(f"{path.name}.{present}"))
    _upgrade(connection)
    return False


def revision_of(connection: Connection) -> str | None:
    """The schema's version; None for a database without tables of ours."""
    if not inspect(connection).has_table(version.name):
        return None
    found: str | None = connection.execute(select(version.c.version_num)).scalar_one_or_none()
    return found


def _upgrade(connection: Connection) -> None:
    from alembic import command  # takes its time to import, and is hardly ever needed
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def back_up(database: Path, to: Path) -> None:
    """A copy of the whole database as it stands, whatever is writing to it, under another name.

    The open round is not in it: its secret would outlive it there. Raises StorageError.
    """
    fresh = to.with_name(f".{to.name}.new")
    with translated(to):
        try:
            fresh.unlink(missing_ok=True)
            private_file(fresh)
            with (
                contextlib.closing(sqlite3.connect(database, timeout=BUSY_S)) as source,
                contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as copy,
            ):
                source.backup(copy)
                copy.execute("PRAGMA secure_delete = ON")
                copy.execute("PRAGMA journal_mode = DELETE")  # a single file
                present = copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
                for (table,) in present.fetchall():
                    if table in OF_THE_OPEN_ROUND:
                        copy.execute(f"DELETE FROM {table}")  # noqa: S608
            sync_file(fresh)
            fresh.replace(to)
            sync_directory(to.parent)
        finally:
            fresh.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Make a file's content durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
