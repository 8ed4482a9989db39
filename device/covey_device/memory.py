"""What of a device must outlive its process. How it is kept is `keystore`'s business."""

from dataclasses import dataclass, field

from covey_device.policy import Day


@dataclass(frozen=True, slots=True)
class Vote:
    """A vote that this device signed: of which manifest, its label, and the SHA-256 of its body."""

    h: bytes
    kind: str
    body: bytes


MAX_VOTES = 16
"""Votes that are remembered: those of the last eight rounds."""

MAX_CONTRIBUTIONS = 1000
"""Contributions are remembered per model; a device that has seen this many models forgets the one it
contributed to longest ago, whose rounds `last_round` keeps it out of anyway."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The few facts that must outlive a crash.

    last_round: no round up to this one is ever joined (again), so that a restart cannot sign, mask
    or contribute twice. contributed: model hash (hex) -> highest revision an update was sent for.
    day: the last check-ins, for the owner's bound on rounds a day. votes: the last ones signed; they
    stand in the way of a second vote on one manifest even if `last_round` were wrong. signed_unix: the
    latest time in a manifest that the coordinator signed.
    """

    last_round: int = 0
    contributed: dict[str, int] = field(default_factory=dict)
    day: Day = field(default_factory=Day)
    votes: tuple[Vote, ...] = ()
    signed_unix: int = 0

    def with_contribution(self, model: bytes, revision: int) -> dict[str, int]:
        """What was contributed, an update for this revision of a model included as the latest."""
        others = {name: n for name, n in self.contributed.items() if name != model.hex()}
        latest = list(others.items())[-(MAX_CONTRIBUTIONS - 1) :]
        return dict(latest) | {model.hex(): revision}
