"""What was decided and why, the last fifty times, for the owner.

A small file in the state directory, so that `covey-device explain` knows when the service does not run. It
is for reading, and nothing hangs on it: it is not synced, and one that is damaged is begun anew. What must
not be lost or changed stands in the audit log.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from covey_shared.messages import for_display

FILE = "decisions.json"
MAX_DECISIONS = 50
MAX_LINE_CHARS = 400
MAX_FILE_BYTES = 1 << 18
WRITE_S = 10.0
"""At most so often is the file written, for a card that wears: a coordinator may call a round a second."""


@dataclass(frozen=True, slots=True)
class Decision:
    """at_unix: when. what: "declined", "paused", "resumed", "ended early", "gave no update", "took part"
    or "was not in the sum". round: which it was about. times: in a row, the last at_unix."""

    at_unix: float
    what: str
    why: str
    round: int | None = None
    times: int = 1


class Decisions:
    """For several threads. directory: of the device's state; None: memory alone."""

    def __init__(
        self,
        directory: Path | None,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = None if directory is None else directory / FILE
        self._clock, self._monotonic = clock, monotonic
        self._lock = threading.Lock()
        self._all = [] if directory is None else load(directory)
        self._written_s: float | None = None
        self._dirty = False

    def all(self) -> list[Decision]:
        """The oldest first."""
        with self._lock:
            return list(self._all)

    def add(self, what: str, why: str, round_id: int | None = None) -> None:
        """Note one. One that only repeats the last one about another round is counted with it."""
        why = for_display(why.encode("utf-8", "replace").decode())[:MAX_LINE_CHARS]
        with self._lock:
            last = self._all[-1] if self._all else None
            times = 1
            if last is not None and (last.what, last.why) == (what, why) and what == "declined":
                times = last.times + 1
                self._all.pop()
            self._all = [*self._all, Decision(self._clock(), what, why, round_id, times)]
            self._all = self._all[-MAX_DECISIONS:]
            self._dirty = True
            now = self._monotonic()
            if self._written_s is None or now - self._written_s >= WRITE_S:
                self._write()

    def flush(self) -> None:
        """Write what was held back."""
        with self._lock:
            if self._dirty:
                self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._written_s, self._dirty = self._monotonic(), False
        fresh = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):  # a full disk has louder voices
            fresh.unlink(missing_ok=True)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:  # noqa: PTH123
                file.write(msgspec.json.encode(self._all))
            fresh.replace(self._path)


def load(directory: Path) -> list[Decision]:
    """Those that were kept; none if the file cannot be used."""
    try:
        with (directory / FILE).open("rb") as file:
            data = file.read(MAX_FILE_BYTES)
        found = msgspec.json.decode(data, type=list[Decision])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
    return found[-MAX_DECISIONS:]
