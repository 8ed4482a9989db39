"""status.json: what a running `covey up` says of itself, for the other commands."""

import os
from pathlib import Path

import msgspec
import psutil

from covey_coordinator.files import write_atomic

FILE = "status.json"


class Status(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """pid, started_unix: of the process that wrote it. broker: its kind and where it is."""

    pid: int
    started_unix: float
    broker: str
    connected: bool
    present: list[str]
    faults: dict[str, int]


def write_status(
    fleet: Path, broker: str, connected: bool, present: list[str], faults: dict[str, int]
) -> None:
    """Say it, in this process's name. Raises StorageError."""
    status = Status(
        pid=os.getpid(),
        started_unix=psutil.Process().create_time(),
        broker=broker,
        connected=connected,
        present=present,
        faults=faults,
    )
    write_atomic(fleet / FILE, msgspec.json.encode(status), durable=False)


def read_status(fleet: Path) -> Status | None:
    """What was said last, if who said it still runs: a number may be another process's by now."""
    try:
        status = msgspec.json.decode((fleet / FILE).read_bytes(), type=Status)
        started = psutil.Process(status.pid).create_time()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, psutil.Error, ValueError):
        return None
    return status if abs(started - status.started_unix) < 1 else None
