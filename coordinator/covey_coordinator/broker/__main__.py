"""The child's side of a broker's start: tie it to the parent's life, then become the broker.

``python -m covey_coordinator.broker PARENT_PID CONNECTIONS embedded CONFIGURATION`` runs the embedded
broker, ``... PARENT_PID CONNECTIONS PROGRAM ARGUMENT...`` becomes that program.

This is done here, and not by a hook between fork and exec, because such a hook may deadlock in a
process with threads. The kernel's tie is to the parent's *thread* that forked.
"""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

_FILES_BESIDES = 64
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel send SIGTERM when the parent ends; exit if it has already.

    Elsewhere than on Linux the broker outlives a parent that is killed.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # it may have ended before the call above, and then nobody would tell us
    if os.getppid() != parent_pid:
        sys.exit("the parent process ended before the broker started")


def bound_open_files(connections: int) -> None:
    """As many as mosquitto may have connections, and some: its own limit can be got round (in 2.0 a
    client that connects again counts as one less), and the usual limit of 1024 is below it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _FILES_BESIDES
    if most != resource.RLIM_INFINITY:
        wanted = min(wanted, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def main(arguments: list[str]) -> None:
    """Become the broker that the arguments name."""
    die_with_parent(int(arguments[0]))
    if arguments[2] == "embedded":
        from covey_coordinator.broker import embedded

        embedded.main(Path(arguments[3]))
    else:
        bound_open_files(int(arguments[1]))
        os.execv(arguments[2], arguments[2:])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1:])
