"""Keeps the process's resident memory near what it uses, on Linux with glibc.

By default glibc gives every thread an arena of its own and keeps freed memory for later. A device
works in bursts and then idles for hours on a machine with other things to do. One arena, and large
blocks mapped and given back one by one, took 10 MB off the peak of a round with a model of 430,000
parameters, at no measurable cost in time.

What is left over is given back when the device rests: freed memory to the kernel, and pages of libraries,
which are read from their files again when they are next used. At the start that is all of them: most were
touched while modules were imported and onnxruntime registered its operators, and never again. After a
round it is onnxruntime's alone; the interpreter's and numpy's would be back with the next message.
"""

import ctypes
import gc
import re
from collections.abc import Iterable, Iterator

# mallopt's parameters, from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

LARGE_BYTES = 1 << 20
"""Blocks from this size on are mapped. Smaller ones a training step allocates by the hundred, and
mapping each anew was twice as slow."""


def keep_small() -> bool:
    """Set the allocator's options for this process. False where there is no glibc: nothing is lost
    but those megabytes. Call it before threads are started."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, LARGE_BYTES),
        (_M_TRIM_THRESHOLD, LARGE_BYTES),
    )
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


_MADV_DONTNEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ([rwxps-]{4}) [0-9a-f]+ [0-9a-f:]+ ([0-9]+) *(.*)")

ENGINE = "onnxruntime"


def clean_mappings(smaps: Iterable[str], library: str = "") -> Iterator[tuple[int, int]]:
    """Address and length of each mapping whose pages are all as they are in its file.

    smaps: lines of /proc/self/smaps. library: only files with this in their path. Written to at any time, if
    only by the linker before it was made read-only, a mapping has anonymous pages, which exist nowhere else;
    it is left out, and so is one that could be written to now.
    """
    mapping: re.Match[str] | None = None
    for line in smaps:
        if (found := _MAPPING.match(line)) is not None:
            mapping = found if library in found[5] else None
        elif line.startswith("Anonymous:") and mapping is not None:
            start, end = int(mapping[1], 16), int(mapping[2], 16)
            if line.split()[1] == "0" and "w" not in mapping[3] and mapping[4] != "0":
                yield start, end - start


def give_back(library: str = "") -> None:
    """Give the system what this process does not need while it waits, and pages of a library or of all.

    Where that cannot be done, nothing is lost. Takes about 20 ms.
    """
    gc.collect()
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        madvise = libc.madvise
        with open("/proc/self/smaps") as smaps:  # noqa: PTH123
            mappings = list(clean_mappings(smaps, library))
    except (OSError, AttributeError):
        return
    for start, length in mappings:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED)
