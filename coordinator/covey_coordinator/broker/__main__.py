"""The child's side of a broker's start: tie it to the parent's life, then become the broker.

``python -m covey_coordinator.broker PARENT_PID embedded CONFIGURATION`` runs the embedded broker,
``python -m covey_coordinator.broker PARENT_PID PROGRAM ARGUMENT...`` becomes that program.

This is done here, and not by a hook between fork and exec, because such a hook may deadlock in a
process with threads. The kernel's tie is to the parent's *thread* that forked.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

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


def main(arguments: list[str]) -> None:
    """Become the broker that the arguments name."""
    die_with_parent(int(arguments[0]))
    if arguments[1] == "embedded":
        from covey_coordinator.broker import embedded

        embedded.main(Path(arguments[2]))
    else:
        os.execv(arguments[1], arguments[1:])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1:])
