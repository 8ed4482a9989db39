"""Telling systemd how a service does: `sd_notify`, some lines on a datagram socket.

Both sides' services use it. It blocks nobody for long, and nothing of it can fail: a service that nobody
supervises, or whose supervisor does not listen, goes on as if it had spoken. What decides whether a
service is alive is the service's own business; here it is only said.

Source: sd_notify(3) and systemd.exec(5), NOTIFY_SOCKET and WATCHDOG_USEC.
"""

import socket
from collections.abc import Mapping

SEND_S = 1.0
"""Until then a supervisor whose queue is full has to take a message; systemd's is hardly ever."""

MAX_STATUS = 400
"""Characters of a status. It is shown in one line, and a datagram has an end."""


class Notifier:
    """What a service says to its supervisor. address: a path, or @NAME in the abstract namespace; None:
    there is nobody. watchdog_s: within so many seconds it wants to hear `alive`, again and again; None:
    it does not.
    """

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        self._address = address if address and address[0] in "/@" else None
        self.watchdog_s = watchdog_s if self._address else None
        self._status = ""

    @classmethod
    def of(cls, environment: Mapping[str, str], pid: int) -> "Notifier":
        """As a service's environment says. pid: of this process; a watchdog may be meant for another's."""
        meant = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        watchdog_us = environment.get("WATCHDOG_USEC", "") if meant else ""
        # Digits alone, and few enough for a time: whoever set it may have set anything.
        timed = watchdog_us.isascii() and watchdog_us.isdigit() and len(watchdog_us) < 16
        watchdog_s = int(watchdog_us) / 1e6 if timed else 0.0
        return cls(environment.get("NOTIFY_SOCKET"), watchdog_s or None)

    @property
    def listens(self) -> bool:
        """Whether there is a supervisor at all."""
        return self._address is not None

    def ready(self) -> None:
        """The service serves, for the first time or again after `reloading`."""
        self._send("READY=1")

    def reloading(self, monotonic_us: int) -> None:
        """The service reads its configuration anew; `ready` ends that. monotonic_us: of CLOCK_MONOTONIC."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={monotonic_us}")

    def stopping(self) -> None:
        """The service is about to end."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """The watchdog may be reset."""
        self._send("WATCHDOG=1")

    def status(self, line: str) -> None:
        """What the service does and why, in one line. Said again only when it has changed."""
        # Each line of a datagram is an assignment of its own: no text may bring one along.
        line = " ".join("".join(c if c.isprintable() else " " for c in line).split())[:MAX_STATUS]
        if line != self._status and self._send(f"STATUS={line}"):
            self._status = line

    def _send(self, assignments: str) -> bool:
        if self._address is None:
            return False
        name = self._address
        address = f"\0{name[1:]}" if name[0] == "@" else name
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(SEND_S)
                sender.sendto(assignments.encode("utf-8", "replace"), address)
        except (OSError, ValueError):  # the latter: a path with a NUL
            return False
        return True
