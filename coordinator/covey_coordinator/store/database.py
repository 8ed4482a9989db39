"""The coordinator's database: what a fleet's runs are, came to, and are in the middle of.

One SQLite file a fleet. Every method is one transaction: when it returns, what it wrote is on the
disk; when it raises StorageError, nothing of it was done, and it may be called again. Several threads
may use one `Store`, and several processes one file.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.exc import IntegrityError

from covey_coordinator.files import sync_directory
from covey_coordinator.store import opening, schema, takeover
from covey_coordinator.store.state import (
    UNREADABLE,
    Attendance,
    DeviceRound,
    RoundRecord,
    RunRecord,
    RunState,
    Sighting,
    Wish,
)
from covey_coordinator.turnout import Fate, Turnout
from covey_shared.errors import ConfigError, LocalProtocolError, StorageError

T = TypeVar("T")

FILE = "covey.db"
"""Its name in a fleet's directory."""

MAX_REMEMBERED_MODELS = 1000
"""As many as devices remember to have contributed to."""

FEWEST_KEPT, MOST_KEPT = 20, 200
"""Of each device, what became of it in that many rounds is kept, however many models are."""

MOST_LOOKED_AT = 2000
"""Rounds, for what a device did in its last ones."""

_CHECKPOINT_MS = 200
_MEMORY = Path("the database in memory")


@dataclass(frozen=True, slots=True)
class OpenRound:
    """The round that is being played. index: within its run; round: over the whole fleet. spec: its
    `RoundSpec`, encoded. reveal_secret: the key that reveals are sealed to; it goes with the round."""

    run: str
    index: int
    round: int
    spec: bytes = field(repr=False)
    reveal_secret: bytes = field(repr=False)
    opened_unix: float


class Store:
    """A fleet's database. Every method raises StorageError when the disk refuses.

    What devices remember of rounds is mirrored here, over all runs: a device joins no round up to the
    last one that it joined, and contributes to the same model again only under a higher revision. So
    numbers only ever grow, and the revision of a model whose uploads began is used up, however its
    round ended and whichever run it was of.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._name = path or _MEMORY
        self._engine = opening.engine_for(path)
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._durable = True

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open a file, or make it; an older schema is brought to the newest, after a copy was made
        beside it. Raises StorageError for one that is damaged, another program's or a newer covey's."""
        store = cls(path)
        try:
            store._prepare()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def in_memory(cls) -> "Store":
        """One without a file, gone with the object."""
        store = cls(None)
        store._prepare()
        return store

    @property
    def path(self) -> Path | None:
        """The file; None in memory."""
        return self._path

    @property
    def place(self) -> Path:
        """What messages call it."""
        return self._name

    def close(self) -> None:
        """Let go of the file. What was acknowledged is in it either way."""
        with self._lock:
            self._drop()
            self._engine.dispose()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- connections ------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if self._path is not None:
            with opening.translated(self._name):
                fresh = not self._path.exists()
                opening.private_file(self._path)
                if fresh:
                    sync_directory(self._path.parent)
        with self._reading() as connection:
            verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
            if verdict != "ok":
                raise opening.damaged(self._name, str(verdict).replace("\n", " "))
            present = opening.revision_of(connection)
        if present == schema.HEAD:
            return
        taken: list[Path] = []
        with self._writing() as connection:
            if opening.prepare(connection, self._path):
                if self._path is None:
                    connection.execute(insert(schema.counter).values(id=1, last_round=0))
                else:
                    taken = takeover.take_over(connection, self._path.parent)
        takeover.rename_taken(taken)

    def back_up(self, path: Path) -> None:
        """A copy of the whole database, while it is in use. The open round is not in it: its secret
        would outlive it there."""
        if self._path is None:
            raise LocalProtocolError("a database in memory has no copies")
        opening.back_up(self._path, path)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextlib.contextmanager
    def _writing(self, durable: bool = True) -> Iterator[Connection]:
        """Immediate: a transaction that began by reading could not wait for another writer."""
        with self._transaction("BEGIN IMMEDIATE", durable) as connection:
            yield connection

    @contextlib.contextmanager
    def _transaction(self, begin: str, durable: bool | None = None) -> Iterator[Connection]:
        with self._lock, self._dropped_if_broken(), opening.translated(self._name):
            connection = self._connected()
            if durable is not None:
                self._check_place()
                if durable is not self._durable:
                    _raw(connection).execute(
                        f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}"
                    )
                    self._durable = durable
            connection.info["begin"] = begin
            with connection.begin():
                yield connection

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self._engine.connect()
            self._durable = True
            if self._path is not None:
                place = self._path.stat()
                self._inode = place.st_dev, place.st_ino
        return self._connection

    def _check_place(self) -> None:
        """What is written to a file without a name is lost."""
        if self._path is None:
            return
        try:
            place = self._path.stat()
        except FileNotFoundError:
            place = None
        if place is None or (place.st_dev, place.st_ino) != self._inode:
            raise StorageError(
                f"{self._path} was moved or replaced while it was in use; put it back, or start this "
                "command anew"
            )

    @contextlib.contextmanager
    def _dropped_if_broken(self) -> Iterator[None]:
        """After an error of the disk the next call connects anew."""
        try:
            yield
        except StorageError as error:
            if not opening.passing(error):
                self._drop()
            raise

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and self._path is not None:
            with contextlib.suppress(Exception):
                connection.close()

    # -- round numbers and revisions --------------------------------------------------------------

    def next_round(self) -> int:
        """A number never given before, durable before it is used."""
        counter = schema.counter
        with self._writing() as connection:
            number: int = connection.execute(
                update(counter)
                .values(last_round=counter.c.last_round + 1)
                .returning(counter.c.last_round)
            ).scalar_one()
            return number

    def last_round(self) -> int:
        """The last number that was given; 0 before the first."""
        with self._reading() as connection:
            last: int = connection.execute(select(schema.counter.c.last_round)).scalar_one()
            return last

    def catch_up(self, number: int, used: Mapping[bytes, int]) -> None:
        """Give no number up to this one any more. used: model -> a revision that devices may have
        contributed to."""
        counter = schema.counter
        with self._writing() as connection:
            connection.execute(
                update(counter).values(last_round=func.max(counter.c.last_round, number))
            )
            for model, revision in used.items():
                _use_up(connection, model, revision)

    def revision(self, model: bytes) -> int:
        """Under which revision this model may be called. model: its hash."""
        uploads = schema.uploads
        with self._reading() as connection:
            used: int | None = connection.execute(
                select(uploads.c.revision).where(uploads.c.model == model)
            ).scalar_one_or_none()
        return 0 if used is None else used + 1

    def uploads_begin(self, model: bytes, revision: int) -> None:
        """From now on devices may contribute to this model under this revision."""
        uploads = schema.uploads
        with self._writing() as connection:
            _use_up(connection, model, revision)
            newest = select(uploads.c.model).order_by(uploads.c.used.desc())
            connection.execute(
                delete(uploads).where(
                    uploads.c.model.not_in(newest.limit(MAX_REMEMBERED_MODELS).scalar_subquery())
                )
            )

    # -- runs -------------------------------------------------------------------------------------

    def add_run(self, name: str, run_id: bytes, created_unix: float) -> None:
        """Queue a run. Raises ConfigError if there is one of that name."""
        values = _columns(RunState(run_id=run_id.hex()))
        try:
            with self._writing() as connection:
                connection.execute(
                    insert(schema.runs).values(name=name, created_unix=created_unix, **values)
                )
        except StorageError as error:
            if isinstance(error.__cause__, IntegrityError):
                raise ConfigError(f"there is a run {name!r} already; choose another name") from None
            raise

    def has_run(self, name: str) -> bool:
        """Whether there is one of that name."""
        with self._reading() as connection:
            found = connection.execute(select(schema.runs.c.id).where(schema.runs.c.name == name))
            return found.first() is not None

    def run(self, name: str) -> RunState:
        """Where a run stands. Raises ConfigError if there is none of that name."""
        return self.record(name).state

    def runs(self) -> list[tuple[str, RunState]]:
        """All of them, oldest first."""
        return [(record.name, record.state) for record in self.records()]

    def record(self, name: str) -> RunRecord:
        """All that the database has of a run. Raises ConfigError if there is none of that name."""
        with self._reading() as connection:
            return self._record_of(connection, name)

    def records(self) -> list[RunRecord]:
        """Of all runs, oldest first."""
        with self._reading() as connection:
            rows = connection.execute(
                select(schema.runs).order_by(schema.runs.c.created_unix, schema.runs.c.id)
            ).all()
        return [self._record(row) for row in rows]

    def amend(self, name: str, change: Callable[[RunRecord], Wish | None]) -> RunRecord:
        """Read, change and write a run in one transaction -> how it is now.

        change: changes the state in place, and returns the new wish or None for the old one; what it
        raises leaves all as it was. Raises ConfigError if there is none of that name.
        """
        with self._writing() as connection:
            record = self._record_of(connection, name)
            wish = change(record)
            record = record if wish is None else msgspec.structs.replace(record, wish=wish)
            _save(connection, name, record.state, wish=record.wish)
        return record

    def roll_back(
        self, name: str, now_unix: float, change: Callable[[RunRecord, list[RoundRecord]], None]
    ) -> RunRecord:
        """As `amend`; the rounds that count are given as well, and those above the run's new
        `rounds_done` no longer do."""
        rounds = schema.rounds
        with self._writing() as connection:
            record = self._record_of(connection, name)
            change(record, self._history(connection, name, whole=False))
            connection.execute(
                update(rounds)
                .where(
                    rounds.c.run == name,
                    rounds.c.index > record.state.rounds_done,
                    rounds.c.rolled_back_unix.is_(None),
                )
                .values(rolled_back_unix=now_unix)
            )
            _save(connection, name, record.state, wish=record.wish)
        return record

    def _record_of(self, connection: Connection, name: str) -> RunRecord:
        row = connection.execute(
            select(schema.runs).where(schema.runs.c.name == name)
        ).one_or_none()
        if row is None:
            raise _unknown(name)
        return self._record(row)

    def _record(self, row: Row[Any]) -> RunRecord:
        values = {"name": row.name, "created_unix": row.created_unix, "wish": row.wish}
        return self._checked(values | {"state": self._state(row)}, RunRecord, f"run {row.name!r}")

    def save_run(self, name: str, state: RunState) -> None:
        """Raises ConfigError if there is none of that name."""
        with self._writing() as connection:
            _save(connection, name, state)

    def _state(self, row: Row[Any]) -> RunState:
        values = {name: row._mapping[name] for name in RunState.__struct_fields__}
        try:
            if values["last"] is not None:
                values["last"] = msgspec.json.decode(values["last"], type=dict[str, Any])
            return msgspec.convert(values, RunState)
        except UNREADABLE as error:
            raise opening.damaged(self._name, f"run {row.name!r}: {error}") from error

    # -- the open round ---------------------------------------------------------------------------

    def open_round(self, opened: OpenRound) -> None:
        """From now on a restart finds this round. Raises LocalProtocolError if another is open."""
        with self._writing() as connection:
            present = self._opened(connection)
            if present == opened:
                return
            if present is not None:
                raise LocalProtocolError(f"round {present.round} is open still")
            _empty(connection)
            connection.execute(
                insert(schema.open_round).values(
                    id=1, **{name: getattr(opened, name) for name in OpenRound.__slots__}
                )
            )

    def opened(self) -> OpenRound | None:
        """The open round, if there is one."""
        with self._reading() as connection:
            return self._opened(connection)

    def journal(self, entries: Sequence[bytes], *, durable: bool = True) -> None:
        """Append to the open round's journal, all or none. durable: false may wait for the next
        durable write, should the power go; not should the process be killed.

        Raises LocalProtocolError if no round is open.
        """
        if not entries:
            return
        with self._writing(durable) as connection:
            _check_open(connection)
            connection.execute(insert(schema.journal), [{"entry": entry} for entry in entries])

    def entries(self) -> list[bytes]:
        """The open round's journal, in order."""
        with self._reading() as connection:
            journal = schema.journal
            return list(
                connection.execute(select(journal.c.entry).order_by(journal.c.id)).scalars()
            )

    def received(self, device: str, bitmap: bytes) -> None:
        """Which chunks of a device's upload are in the spool. What is lost with the power is sent
        again. Raises LocalProtocolError if no round is open."""
        with self._writing(durable=False) as connection:
            _check_open(connection)
            statement = upsert(schema.chunks).values(device=device, bitmap=bitmap)
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["device"], set_={"bitmap": statement.excluded.bitmap}
                )
            )

    def received_chunks(self) -> dict[str, bytes]:
        """Of the open round: device -> its chunks in the spool."""
        with self._reading() as connection:
            rows = connection.execute(select(schema.chunks).order_by(schema.chunks.c.device))
            found = {row.device: row.bitmap for row in rows}
            return self._checked(found, dict[str, bytes], "the chunks of uploads")

    def finish_round(
        self, name: str, state: RunState, attendance: Attendance | None = None
    ) -> None:
        """A round's end, in one transaction: the run is saved, `state.last` joins its rounds with what
        became of its devices, and the open round is gone, its secret overwritten. What is on record
        already is not added again.

        Raises LocalProtocolError if the open round is another run's, or `state.last` is missing.
        """
        if state.last is None:
            raise LocalProtocolError("a round ends with its line of metrics")
        with self._writing() as connection:
            present = self._opened(connection)
            if present is not None and present.run != name:
                raise LocalProtocolError(f"the open round is one of run {present.run!r}")
            _save(connection, name, state)
            attendance = attendance or Attendance()
            if _append(connection, name, state.last, attendance.turnout):
                _attend(connection, state.last, attendance)
            _empty(connection)
        self._clear_log()

    def forget_round(self) -> None:
        """Drop the open round as if it had never been called; its number stays used."""
        with self._writing() as connection:
            _empty(connection)
        self._clear_log()

    def _opened(self, connection: Connection) -> OpenRound | None:
        row = connection.execute(select(schema.open_round)).one_or_none()
        if row is None:
            return None
        values = {name: row._mapping[name] for name in OpenRound.__slots__}
        return self._checked(values, OpenRound, "the open round")

    def _checked(self, value: object, kind: type[T], what: str) -> T:
        """SQLite keeps what it is given, whatever the column's type."""
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise opening.damaged(self._name, f"{what}: {error}") from error

    def _clear_log(self) -> None:
        """Move the write-ahead log into the database and cut it: what was deleted is still in it.

        Best effort: a reader may hold it back, and the next round's end tries again.
        """
        with contextlib.suppress(StorageError), self._lock, opening.translated(self._name):
            if self._path is None:
                return
            raw = _raw(self._connected())
            raw.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_MS}")
            try:
                raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                raw.execute(f"PRAGMA busy_timeout = {int(1000 * opening.BUSY_S)}")

    # -- the history ------------------------------------------------------------------------------

    def rounds(self, name: str) -> list[dict[str, Any]]:
        """A run's lines of metrics, oldest first; without the rounds that were rolled back."""
        with self._reading() as connection:
            return [record.line for record in self._history(connection, name, whole=False)]

    def history(self, name: str, *, after: int = 0) -> list[RoundRecord]:
        """All rounds of a run, those that were rolled back as well, oldest first. after: an id; only
        what was added since."""
        with self._reading() as connection:
            return self._history(connection, name, whole=True, after=after)

    def _history(
        self, connection: Connection, name: str, *, whole: bool, after: int = 0
    ) -> list[RoundRecord]:
        rounds = schema.rounds
        wanted = select(rounds).where(rounds.c.run == name, rounds.c.id > after)
        if not whole:
            wanted = wanted.where(rounds.c.rolled_back_unix.is_(None))
        found = connection.execute(wanted.order_by(rounds.c.id)).all()
        return [self._round(row) for row in found]

    def _round(self, row: Row[Any]) -> RoundRecord:
        values = {name: row._mapping[name] for name in RoundRecord.__struct_fields__}
        try:
            values["line"] = msgspec.json.decode(row.line, type=dict[str, Any])
            values["turnout"] = _turnout(row.turnout)
            return msgspec.convert(values, RoundRecord)
        except UNREADABLE as error:
            raise opening.damaged(self._name, f"a round's line: {error}") from error

    # -- devices ----------------------------------------------------------------------------------

    def device_rounds(self, device: str, limit: int) -> list[DeviceRound]:
        """The last rounds that ended, over all runs and newest first, with what became of a device; back
        to the `limit`-th that something is known of, and over MOST_LOOKED_AT rounds at most."""
        rounds, fates = schema.rounds, schema.fates
        with self._reading() as connection:
            own = connection.execute(
                select(fates)
                .where(fates.c.device == device)
                .order_by(fates.c.round.desc())
                .limit(limit)
            ).all()
            wanted = select(
                rounds.c.run,
                rounds.c.index,
                rounds.c.round,
                func.json_extract(rounds.c.line, "$.outcome").label("outcome"),
                func.json_extract(rounds.c.line, "$.reason").label("reason"),
                rounds.c.rolled_back_unix,
                rounds.c.turnout,
            ).where(rounds.c.round.is_not(None))
            if len(own) == limit:
                wanted = wanted.where(rounds.c.round >= own[-1].round)
            rows = connection.execute(
                wanted.order_by(rounds.c.round.desc()).limit(MOST_LOOKED_AT)
            ).all()
        became = {row.round: row for row in own}
        return [self._device_round(row, became.get(row.round)) for row in rows]

    def _device_round(self, row: Any, own: Row[Any] | None) -> DeviceRound:
        try:
            values = {
                "run": row.run,
                "index": row.index,
                "round": row.round,
                "outcome": row.outcome,
                "reason": row.reason or "",
                "rolled_back": row.rolled_back_unix is not None,
                "turnout": _turnout(row.turnout),
                "fate": None if own is None else Fate(own.what, own.phase, own.words),
            }
            return msgspec.convert(msgspec.to_builtins(values), DeviceRound)
        except UNREADABLE as error:
            raise opening.damaged(self._name, f"round {row.round}: {error}") from error

    def sightings(self) -> dict[str, Sighting]:
        """Device -> whether it was online when it was last heard of."""
        with self._reading() as connection:
            rows = connection.execute(select(schema.sightings)).all()
        found = {
            row.device: {"online": bool(row.online), "since_unix": row.since_unix} for row in rows
        }
        return self._checked(found, dict[str, Sighting], "when devices were seen")

    def saw(self, sightings: Mapping[str, Sighting]) -> None:
        """Devices came and went. The last of it may be lost with the power."""
        if not sightings:
            return
        statement = upsert(schema.sightings)
        statement = statement.on_conflict_do_update(
            index_elements=["device"],
            set_={
                "online": statement.excluded.online,
                "since_unix": statement.excluded.since_unix,
            },
        )
        with self._writing(durable=False) as connection:
            connection.execute(
                statement,
                [
                    {"device": device, "online": int(seen.online), "since_unix": seen.since_unix}
                    for device, seen in sightings.items()
                ],
            )


def _raw(connection: Connection) -> Any:
    """The sqlite3 connection itself: for what is no SQL statement of a transaction."""
    return connection.connection.driver_connection


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"there is no run {name!r} in this fleet; covey runs shows them")


def _columns(state: RunState) -> dict[str, Any]:
    values = {name: getattr(state, name) for name in RunState.__struct_fields__}
    last = values["last"]
    return values | {"last": None if last is None else msgspec.json.encode(last).decode()}


def _save(connection: Connection, name: str, state: RunState, **more: Any) -> None:
    runs = schema.runs
    changed = connection.execute(
        update(runs).where(runs.c.name == name).values(**_columns(state), **more)
    )
    if changed.rowcount == 0:
        raise _unknown(name)


def _append(
    connection: Connection, run: str, line: dict[str, Any], turnout: Turnout | None
) -> bool:
    """Whether it was not there."""
    rounds, text, number = schema.rounds, msgspec.json.encode(line).decode(), line.get("round")
    if number is not None:
        known = select(rounds.c.id).where(rounds.c.run == run, rounds.c.round == number)
        if connection.execute(known).first() is not None:
            return False
    counted = None if turnout is None else msgspec.json.encode(turnout).decode()
    values = {"index": line["index"], "round": number, "line": text, "turnout": counted}
    connection.execute(insert(rounds).values(run=run, **values))
    return True


def _turnout(text: str | None) -> Turnout | None:
    """Raises UNREADABLE."""
    return None if text is None else msgspec.json.decode(text, type=Turnout)


def _attend(connection: Connection, line: dict[str, Any], attendance: Attendance) -> None:
    """What became of devices in a round that was not on record, and the end of what is too long ago."""
    fates, number = schema.fates, line.get("round")
    if number is None or not attendance.fates:
        return
    connection.execute(
        insert(fates),
        [
            {"device": device, "round": number}
            | {"what": fate.what, "phase": fate.phase, "words": fate.words}
            for device, fate in attendance.fates.items()
        ],
    )
    older = fates.alias()
    last = (
        select(older.c.round)
        .where(older.c.device == bindparam("name"))
        .order_by(older.c.round.desc())
        .offset(min(max(attendance.keep_rounds, FEWEST_KEPT), MOST_KEPT))
        .limit(1)
        .scalar_subquery()
    )
    connection.execute(
        delete(fates).where(fates.c.device == bindparam("name"), fates.c.round <= last),
        [{"name": device} for device in attendance.fates],
    )


def _use_up(connection: Connection, model: bytes, revision: int) -> None:
    uploads = schema.uploads
    newest = connection.execute(select(func.max(uploads.c.used))).scalar_one() or 0
    statement = upsert(uploads).values(model=model, revision=revision, used=newest + 1)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["model"],
            set_={
                "revision": func.max(uploads.c.revision, statement.excluded.revision),
                "used": statement.excluded.used,
            },
        )
    )


def _check_open(connection: Connection) -> None:
    if connection.execute(select(schema.open_round.c.id)).first() is None:
        raise LocalProtocolError("no round is open")


def _empty(connection: Connection) -> None:
    for table in (schema.open_round, schema.journal, schema.chunks):
        connection.execute(delete(table))
