"""Bounds that the kernel keeps: how much a process may allocate, open, write and compute.

Linux alone has all of them. Where one is missing, the others still hold.
"""

import contextlib
import ctypes
import os
import resource
import signal
import threading
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

SLACK_BYTES = 64 << 20
"""What allocators may keep aside beyond what is in use."""

_lock = threading.Lock()
_inside = 0
_before = resource.RLIM_INFINITY


def allowance(resident_bytes: int) -> int:
    """How much more may be allocated, for so much more that may be resident.

    Twice as much and a constant: onnxruntime's arena grows by doubling, and touches half of it. Measured on
    convolutions of 512 examples: 270 MB allocated, 159 MB of them resident.
    """
    return 2 * max(resident_bytes, 0) + SLACK_BYTES


def _pages() -> tuple[int, int, int]:
    """Of this process, in bytes: all that is mapped, what is resident, data. OSError without /proc."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        numbers = [int(number) * resource.getpagesize() for number in file.read().split()]
    return numbers[0], numbers[1], numbers[5]


@contextlib.contextmanager
def bounded_data(resident_bytes: int) -> Iterator[None]:
    """Within, the whole process can allocate only for so many more resident bytes; beyond that an
    allocation fails, as MemoryError or an error of onnxruntime's, where it would have had the system end
    the process.

    The soft limit alone is set, and set back at the end. Several threads may be inside at once: the largest
    of their bounds holds for all, until the last one leaves.
    """
    global _inside, _before
    try:
        now = _pages()[2]
    except OSError:
        yield
        return
    with _lock:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if _inside == 0:
            _before = soft
        bound = now + allowance(resident_bytes)
        if _inside and soft != resource.RLIM_INFINITY:
            bound = max(bound, soft)
        ceilings = [limit for limit in (_before, hard) if limit != resource.RLIM_INFINITY]
        bound = min([bound, *ceilings])
        # Beyond what the kernel can count there is nothing to bound.
        resource.setrlimit(resource.RLIMIT_DATA, (_before if bound >= 1 << 62 else bound, hard))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                resource.setrlimit(
                    resource.RLIMIT_DATA, (_before, resource.getrlimit(resource.RLIMIT_DATA)[1])
                )


def bound_data(most_bytes: int) -> int:
    """The whole process can never have more data than this, until another bound is set. Returns the bound
    that holds: a hard limit may be lower.

    The soft limit alone is set, so that the next bound may be higher.
    """
    global _before
    with _lock:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        bound = most_bytes if hard == resource.RLIM_INFINITY else min(most_bytes, hard)
        if _inside:
            _before = bound  # a tighter one holds now, and this one after it
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    return bound


def confine(resident_bytes: int, seconds: float, *, files: int = 0, file_bytes: int = 0) -> None:
    """For a process that is to do one thing and end: no new files or sockets, no privileges, no core, and
    only so much memory and computing time more. Only root could undo it. files, file_bytes: descriptors
    below this number it may open all the same, and files of this size write."""
    with contextlib.suppress(OSError, AttributeError):
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb") as file:  # noqa: PTH123
        file.write(b"1000")  # should memory run out all the same, this process goes first
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CPU: int(seconds) + 1,
    }
    with contextlib.suppress(OSError):
        mapped, _, data = _pages()
        limits[resource.RLIMIT_AS] = mapped + allowance(resident_bytes)
        limits[resource.RLIMIT_DATA] = data + allowance(resident_bytes)
    limits[resource.RLIMIT_NOFILE] = files  # the last one: from here on nothing else can be opened
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (lower, lower))


def minimal_environment(path: str) -> dict[str, str]:
    """What a child needs and no more: nothing that a service was told in its own. path: for imports."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return kept | {
        "PYTHONPATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
        # Each thread that a library keeps ready maps memory, which is bounded here.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }
