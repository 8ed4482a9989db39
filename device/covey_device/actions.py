"""What a session has its service do, in order."""

from dataclasses import dataclass, field

from covey_device.memory import Memory
from covey_device.unfinished import Unfinished
from covey_shared.messages import Head, Message, RoundCall
from covey_shared.wire import Signed


@dataclass(frozen=True, slots=True)
class Publish:
    """Send a signed message to the coordinator."""

    message: Signed[Message]


@dataclass(frozen=True, slots=True)
class Upload:
    """Send chunks of the masked update: all, or the (first, count) ranges asked for."""

    payload: bytes = field(repr=False)
    ranges: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get the plan and the model of this call, check them, answer with `ready` or `leave`."""

    call: RoundCall


@dataclass(frozen=True, slots=True)
class Train:
    """Train as the head says, answer with `trained` or `training_failed`."""

    round_id: int
    head: Head


@dataclass(frozen=True, slots=True)
class Hurry:
    """The call came again while its blobs are being fetched: who serves them is there now."""


@dataclass(frozen=True, slots=True)
class StopTraining:
    """The round no longer wants this device's update."""

    round_id: int


@dataclass(frozen=True, slots=True)
class Save:
    """Make this durable before any later action of the same list."""

    memory: Memory


@dataclass(frozen=True, slots=True)
class Keep:
    """Make this durable before any later action of the same list, if the disk has room for it: without
    it a restart costs the update, and nothing worse."""

    unfinished: Unfinished


@dataclass(frozen=True, slots=True)
class Forget:
    """What was kept of an upload is of no use any more."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The round is over for this device. contributed: its update is in the sum. call: what it was
    called to."""

    round_id: int
    outcome: str
    contributed: bool
    call: RoundCall | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Pace:
    """From now on, spread the return after a lost connection over this many seconds."""

    reconnect_s: float


@dataclass(frozen=True, slots=True)
class Renew:
    """The coordinator wants this device to renew its certificates. issued_unix: since when."""

    issued_unix: int


Action = (
    Publish
    | Upload
    | Fetch
    | Hurry
    | Train
    | StopTraining
    | Save
    | Keep
    | Forget
    | Ended
    | Pace
    | Renew
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What fetching learned: the sizes that the manifest must agree with."""

    n_params: int
    n_hyperparameters: int
    n_metrics: int
