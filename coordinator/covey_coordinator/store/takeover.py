"""What covey kept in files before it had a database: read once, when the database is made.

`rounds` held the counter, `runs/NAME/state.json` where a run stood, and its `metrics.jsonl` the history. They
are renamed once they are in the database. Whoever loses the database and every backup of it writes a
`rounds` file again: without it numbers would begin at 1, and devices join no round they were in.
"""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy import Connection, insert

from covey_coordinator.files import last_line, storage_error
from covey_coordinator.store import schema
from covey_coordinator.store.state import UNREADABLE, Count, RunState
from covey_shared.errors import StorageError

if TYPE_CHECKING:
    from covey_coordinator.store.database import Store

COUNTER = "rounds"
STATE = "state.json"
TAKEN = ".taken"

_HASH = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger("covey.coordinator")


class Counted(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`rounds`. uploads: model -> the highest revision that devices may have contributed to."""

    last: Count = 0
    uploads: dict[str, Count] = msgspec.field(default_factory=dict)


def take_over(connection: Connection, fleet: Path) -> list[Path]:
    """Fill a new database from a fleet's directory -> the files that are to be renamed once that is
    durable. Raises StorageError."""
    counted, taken = Counted(), []
    path = fleet / COUNTER
    if (data := _read(path)) is not None:
        try:
            counted = msgspec.json.decode(data, type=Counted)
        except UNREADABLE as error:
            raise StorageError(
                f'{path} is damaged ({error}); write {{"last": N}} into it, N a number no lower than '
                "that of the last round, which `covey-device check` tells on a device"
            ) from error
        taken.append(path)
    connection.execute(insert(schema.counter).values(id=1, last_round=counted.last))
    for used, (model, revision) in enumerate(counted.uploads.items(), 1):
        connection.execute(
            insert(schema.uploads).values(model=bytes.fromhex(model), revision=revision, used=used)
        )
    for path in sorted((fleet / "runs").glob(f"*/{STATE}"), key=_queued_at):
        data = _read(path)
        try:
            state = msgspec.json.decode(data or b"", type=RunState)
        except UNREADABLE as error:
            log.warning("%s is damaged (%s): its run is not taken over", path, error)
            continue
        taken.append(path)
        _take_run(connection, path.parent, state)
    return taken


def _take_run(connection: Connection, directory: Path, state: RunState) -> None:
    values = {name: getattr(state, name) for name in RunState.__struct_fields__}
    values["last"] = None if state.last is None else msgspec.json.encode(state.last).decode()
    connection.execute(
        insert(schema.runs).values(
            name=directory.name, created_unix=_queued_at(directory / STATE), **values
        )
    )
    lines = [*_lines(directory / "metrics.jsonl"), *([state.last] if state.last else [])]
    by_index = {line["index"]: line for line in lines if isinstance(line.get("index"), int)}
    for index in sorted(by_index):
        if index <= state.rounds_done:
            line = by_index[index]
            connection.execute(
                insert(schema.rounds).values(
                    run=directory.name,
                    index=index,
                    round=line.get("round"),
                    line=msgspec.json.encode(line).decode(),
                )
            )


def catch_up(store: "Store", fleet: Path) -> int:
    """Bring a database that was restored from a backup to what devices remember, as far as the runs'
    metrics tell -> the last number that was given, if there was anything to do.

    The round after the last one on record may have been open when its database was lost. Raises
    StorageError.
    """
    newest, lines = store.last_round(), []
    for path in (fleet / "runs").glob("*/metrics.jsonl"):
        try:
            last = msgspec.json.decode(last_line(path), type=dict[str, Any])
        except OSError as error:
            raise storage_error("read", path, error) from error
        except UNREADABLE:
            continue
        if _number(last) > newest:
            lines += [line for line in _lines(path) if _number(line) > newest]
    if not lines:
        return 0
    used = {}
    for line in sorted(lines, key=_number):
        model, revision = line.get("model"), line.get("revision")
        if isinstance(model, str) and isinstance(revision, int) and _HASH.fullmatch(model):
            used[bytes.fromhex(model)] = revision
    last_number = max(map(_number, lines)) + 1
    store.catch_up(last_number, used)
    return last_number


def _number(line: dict[str, Any]) -> int:
    number = line.get("round")
    return number if isinstance(number, int) else 0


def rename_taken(paths: list[Path]) -> None:
    """Best effort: nothing reads them again while there is a database."""
    for path in paths:
        try:
            path.replace(path.with_name(path.name + TAKEN))
        except OSError as error:
            log.warning("cannot rename %s: %s", path, error.strerror)


def _queued_at(state: Path) -> float:
    try:
        return (state.parent / "run.toml").stat().st_mtime
    except OSError:
        return 0.0


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in (_read(path) or b"").split(b"\n"):
        try:
            found.append(msgspec.json.decode(line, type=dict[str, Any]))
        except UNREADABLE:
            continue  # empty, or cut off by a crash
    return found


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("read", path, error) from error
