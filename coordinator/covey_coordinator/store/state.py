"""What is known of a run, and of its open round, in types that are checked when they are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from covey_coordinator.turnout import Fate, Turnout
from covey_shared.messages import DeviceId

RunStatus = Literal["queued", "running", "paused", "completed", "stopped", "failed", "aborted"]
Wish = Literal["", "pause", "pause now", "abort"]
"""What an operator wants of a run that is being played; empty if nothing. now: and abandon its open
round, as abort does."""

Count = Annotated[int, Meta(ge=0)]
HexDigest = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
HexRunId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class RunState(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Where a run stands. model: SHA-256 of the current parameters, empty before the first completed
    round; model_index: the round they came from. last: the last round's line of metrics.
    transcripts_lost: rounds whose transcript could not be written; transcript_problem: the last reason.
    """

    status: RunStatus = "queued"
    run_id: HexRunId
    rounds_done: Count = 0
    rounds_completed: Count = 0
    rounds_abandoned: Count = 0
    model: HexDigest = ""
    model_index: Count = 0
    last: dict[str, Any] | None = None
    message: str = ""
    transcripts_lost: Count = 0
    transcript_problem: str = ""


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A run as the database has it."""

    name: str
    created_unix: float
    state: RunState
    wish: Wish = ""


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A round that ended. id: grows over all runs. index: its number within the run, which another round
    may have again if this one was rolled back. line: of metrics. rolled_back_unix: when, or None. turnout:
    its devices, counted; None of one that an older covey played, or that was lost."""

    id: int
    run: str
    index: int
    line: dict[str, Any]
    rolled_back_unix: float | None = None
    turnout: Turnout | None = None

    @property
    def key(self) -> str:
        """Its number within the run and over the fleet: no other round's."""
        return f"{self.index:05}-{self.line.get('round', self.id)}"


@dataclass(frozen=True, slots=True)
class Attendance:
    """What became of devices in a round that ends. keep_rounds: what is kept of each device's last rounds
    goes by the number of models that are kept."""

    turnout: Turnout | None = None
    fates: Mapping[DeviceId, Fate] = field(default_factory=dict)
    keep_rounds: int = 20


class DeviceRound(msgspec.Struct, frozen=True, kw_only=True):
    """A round that ended, and what became of a device in it; None if nothing was heard of it. round: its
    number over the fleet; outcome, reason: of the round itself."""

    run: str
    index: int
    round: int
    outcome: str
    reason: str = ""
    rolled_back: bool = False
    turnout: Turnout | None = None
    fate: Fate | None = None


class Sighting(msgspec.Struct, frozen=True):
    """Whether a device was online when it was last heard of, and since when."""

    online: bool
    since_unix: float


class Progress(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A running round, for whoever watches. Not durable."""

    round: int
    index: int
    phase: str
    detail: str
    answered: int
    awaited: int
    present: int
