"""Who asks this device to wait: a file of its owner's, and programs on the same machine.

Programs come over the local socket (`port`); what they say is a wish to wait for some seconds, or for as
long as they stay connected. Not even a program that asks without end can do more than keep the device out.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from covey_shared.messages import for_display

MAX_WAITS = 32
MAX_WHY_CHARS = 100
MAX_WAIT_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Wait:
    """until_s: of a clock that only advances; None: until it is taken back. why: fit for display."""

    why: str
    until_s: float | None


class Waits:
    """All wishes there are. For one thread."""

    def __init__(self) -> None:
        self._waits: dict[int, Wait] = {}
        self._next = 0

    def add(self, why: str, until_s: float | None, now_s: float) -> int | None:
        """-> a number to take it back by; None if there are too many."""
        self._expire(now_s)
        if len(self._waits) >= MAX_WAITS:
            return None
        self._next += 1
        shown = for_display(why[:MAX_WHY_CHARS]).strip() or "no reason given"
        self._waits[self._next] = Wait(shown, until_s)
        return self._next

    def remove(self, number: int) -> None:
        """Take one back, if it is still there."""
        self._waits.pop(number, None)

    def any(self) -> bool:
        """Whether there may be one."""
        return bool(self._waits)

    def lines(self, now_s: float) -> tuple[str, ...]:
        """One for each wish that stands."""
        self._expire(now_s)
        return tuple(
            f"a local program asks to wait: {wait.why} ("
            + (
                "while it is connected"
                if wait.until_s is None
                else f"{max(1.0, wait.until_s - now_s):.0f} s more"
            )
            + ", host.programs = true)"
            for wait in tuple(self._waits.values())
        )

    def _expire(self, now_s: float) -> None:
        over = [
            number
            for number, wait in tuple(self._waits.items())
            if wait.until_s is not None and wait.until_s <= now_s
        ]
        for number in over:
            self._waits.pop(number, None)


def file_line(path: Path | None) -> str | None:
    """The line for a veto file that is there."""
    if path is None:
        return None
    try:
        os.stat(path, follow_symlinks=False)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return f"{path} is there; paused until it is removed (host.veto_file)"
