"""What the coordinator keeps: its database (`Store`) and a run's files (`RunDirectory`)."""

from covey_coordinator.store.database import FILE, OpenRound, Store
from covey_coordinator.store.directory import RunDirectory
from covey_coordinator.store.state import HexDigest, HexRunId, Progress, RunState, RunStatus

__all__ = [
    "FILE",
    "HexDigest",
    "HexRunId",
    "OpenRound",
    "Progress",
    "RunDirectory",
    "RunState",
    "RunStatus",
    "Store",
]
