"""What a round is made of: its phases and their order, what settles it beforehand, what comes out of it.

`round` is the machine over these.
"""

import enum
import math
from dataclasses import dataclass, field

import msgspec

from covey_shared.errors import ConfigError
from covey_shared.fixedpoint import Encoding
from covey_shared.masking import Ring
from covey_shared.messages import MAX_COHORT, DeviceId, Message, RoundCall, Work
from covey_shared.wire import Signed


class Phase(enum.Enum):
    """Where a round stands."""

    GATHER = "gather"  # the call is out; check-ins come
    SHARE = "share"  # the manifest is out; boxes of shares come
    ROSTER = "roster"  # boxes are delivered; votes for the roster come
    COLLECT = "collect"  # the roster is out; masked updates come
    VIEW = "view"  # the view is proposed; votes for it come
    UNMASK = "unmask"  # the view stands; shares come
    DONE = "done"
    ABANDONED = "abandoned"


class Event(enum.Enum):
    """How a phase ends."""

    ENOUGH = "enough"
    TOO_FEW = "too few"


_P = Phase
TRANSITIONS: dict[Phase, dict[Event, Phase]] = {
    _P.GATHER: {Event.ENOUGH: _P.SHARE, Event.TOO_FEW: _P.ABANDONED},
    _P.SHARE: {Event.ENOUGH: _P.ROSTER, Event.TOO_FEW: _P.ABANDONED},
    _P.ROSTER: {Event.ENOUGH: _P.COLLECT, Event.TOO_FEW: _P.ABANDONED},
    _P.COLLECT: {Event.ENOUGH: _P.VIEW, Event.TOO_FEW: _P.ABANDONED},
    _P.VIEW: {Event.ENOUGH: _P.UNMASK, Event.TOO_FEW: _P.ABANDONED},
    _P.UNMASK: {Event.ENOUGH: _P.DONE, Event.TOO_FEW: _P.ABANDONED},
    _P.DONE: {},
    _P.ABANDONED: {},
}


@dataclass(frozen=True, slots=True)
class RoundSpec:
    """Everything about a round that is settled before it opens.

    goal: updates that are enough. over_selection: how many more devices are chosen, as a fraction,
    so that the goal is met without the slowest. n_min: fewest devices in a sum. Durations in
    seconds: of each phase, between repeats, and how long an absent device is waited for.
    """

    call: RoundCall
    n_params: int
    work: Work
    goal: int
    over_selection: float = 0.0
    value_bits: int = 16
    clip: float = 1.0
    metric_clips: tuple[float, ...] = ()
    w_max: int = 1000
    share_s: float = 30.0
    collect_s: float = 600.0
    unmask_s: float = 30.0
    resend_s: float = 5.0
    absent_grace_s: float = 3.0

    @property
    def cohort_limit(self) -> int:
        """Most devices that are chosen."""
        return min(
            MAX_COHORT, max(self.call.n_min, math.ceil(self.goal * (1 + self.over_selection)))
        )


def encode_spec(spec: RoundSpec) -> bytes:
    """For the store: a round goes on with what it was opened with, whatever its run's files say."""
    return msgspec.msgpack.encode(spec)


def decode_spec(data: bytes) -> RoundSpec:
    """Raises ConfigError for one that another version of covey wrote, or a damaged one."""
    try:
        return msgspec.msgpack.decode(data, type=RoundSpec)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the open round's settings cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class Publish:
    """Send to all devices, or to one; retain: the broker keeps it (the call)."""

    message: Signed[Message]
    to: DeviceId | None = None
    retain: bool = False


@dataclass(frozen=True, slots=True)
class Expect:
    """Accept chunks of this device's upload; hand the whole to `Round.uploaded`."""

    device: DeviceId
    h: bytes
    payload: bytes
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Fault:
    """A device broke a rule, as far as the protocol can tell; for the log and the registry."""

    device: DeviceId
    reason: str


@dataclass(frozen=True, slots=True)
class Moved:
    """The round entered a phase; for the progress view and the log. resumed: another process did, and
    this one goes on there."""

    phase: Phase
    detail: str
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class Completed:
    """The exact sum of the survivors' encoded updates. Answer with `Round.publish_result`."""

    ring_sum: Ring = field(repr=False)
    encoding: Encoding
    survivors: tuple[DeviceId, ...]
    dropped: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The round ended without a sum. after_uploads: some device may have sent its update."""

    reason: str
    after_uploads: bool
    blamed: tuple[DeviceId, ...] = ()


Action = Publish | Expect | Fault | Moved | Completed | Abandoned
