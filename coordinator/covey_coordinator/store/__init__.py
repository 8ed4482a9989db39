"""What the coordinator keeps: its database (`Store`) and a run's files (`RunDirectory`)."""

from covey_coordinator.store.database import FILE, OpenRound, Store
from covey_coordinator.store.directory import RunDirectory
from covey_coordinator.store.state import (
    Attendance,
    DeviceRound,
    HexDigest,
    HexRunId,
    Progress,
    RoundRecord,
    RunRecord,
    RunState,
    RunStatus,
    Sighting,
    Wish,
)

__all__ = [
    "FILE",
    "Attendance",
    "DeviceRound",
    "HexDigest",
    "HexRunId",
    "OpenRound",
    "Progress",
    "RoundRecord",
    "RunDirectory",
    "RunRecord",
    "RunState",
    "RunStatus",
    "Sighting",
    "Store",
    "Wish",
]
