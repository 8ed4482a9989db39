"""Which shards are too many, and their deletion: only if the owner set a limit in `[data]`.

The oldest go first, by name; the newest one always stays. A file's age is the clock's time less that of
its last change, so a clock that runs ahead makes shards look old: a machine without a clock of its own
is better served by `max_mb` or `max_shards`. A shard from the future is not old.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from covey_device.data.config import ShardsData

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A shard's file. changed_unix: when it was last written to."""

    name: str
    size: int
    changed_unix: float


def is_limited(config: ShardsData) -> bool:
    """Whether the owner set any limit."""
    return any(
        limit is not None for limit in (config.max_age_days, config.max_mb, config.max_shards)
    )


def entry_of(folder: int, name: str) -> Entry | None:
    """None if it is not there, or not a regular file."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return Entry(name, status.st_size, status.st_mtime)


def surplus(shards: Sequence[Entry], config: ShardsData, now_unix: float) -> list[Entry]:
    """What is to go, the oldest first. shards: in their order."""
    gone: list[Entry] = []
    kept = list(shards)
    if config.max_age_days is not None:
        since = now_unix - DAY_S * config.max_age_days
        gone = [entry for entry in kept[:-1] if entry.changed_unix < since]
        kept = [entry for entry in kept[:-1] if entry.changed_unix >= since] + kept[-1:]
    total = sum(entry.size for entry in kept)
    while len(kept) > 1 and (
        (config.max_shards is not None and len(kept) > config.max_shards)
        or (config.max_mb is not None and total > 1_000_000 * config.max_mb)
    ):
        oldest = kept.pop(0)
        total -= oldest.size
        gone.append(oldest)
    return gone


def delete(folder: int, entries: Sequence[Entry]) -> tuple[list[Entry], OSError | None]:
    """Delete files of this directory -> those that are gone by it, and what the first of the others
    failed with."""
    gone, failed = [], None
    for entry in entries:
        try:
            # The name in this directory, and nothing that a link leads to.
            os.unlink(entry.name, dir_fd=folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            failed = failed or error
            continue
        gone.append(entry)
    return gone, failed
