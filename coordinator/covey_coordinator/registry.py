"""Which devices are known, present, refused and why. Without I/O.

Presence comes from the broker (retained messages and last wills) and is a hint. What a device did
wrong comes from the rounds; a device that the protocol could name as the liar of an abandoned round
is kept out of the following ones, so that it costs the run one round and not all of them.
"""

from collections import Counter
from dataclasses import dataclass, field

from covey_shared.messages import DeviceId

KEPT_OUT_ROUNDS = 10
"""For how many rounds a device is kept out after it was to blame for an abandoned one."""

MAX_PRESENT = 100_000
"""Anyone whom the broker lets in may say that any name is online."""


@dataclass(slots=True)
class Registry:
    """The coordinator's picture of its fleet. identities: name -> public key, for pinned devices;
    who is not pinned may take part with any certificate of the fleet CA, unless the registry is
    closed. revoked: identity keys that may not, whatever their certificates say."""

    identities: dict[DeviceId, bytes] = field(default_factory=dict)
    revoked: frozenset[bytes] = frozenset()
    closed: bool = False
    _present: set[DeviceId] = field(default_factory=set)
    _gone: set[DeviceId] = field(default_factory=set)
    _doubted: set[DeviceId] = field(default_factory=set)
    _kept_out: dict[DeviceId, tuple[int, str]] = field(default_factory=dict)
    faults: Counter[DeviceId] = field(default_factory=Counter)

    def presence(self, device: DeviceId, online: bool) -> bool:
        """A device came or went. False if that is no news, if it is revoked, or if there are too many
        to remember."""
        self._doubted.discard(device)
        if not online and len(self._gone) < MAX_PRESENT:
            self._gone.add(device)
        if online == (device in self._present) or (online and len(self._present) >= MAX_PRESENT):
            return False
        if online:
            self._gone.discard(device)
        (self._present.add if online else self._present.discard)(device)
        return not self._shut_out(device)

    def doubt(self) -> None:
        """The broker was away, and may have forgotten who was there: all are to be heard of again."""
        self._doubted = set(self._present)

    def settle(self) -> frozenset[DeviceId]:
        """Doubt no longer: who was not heard of since is not there -> who that is."""
        lost, self._doubted = frozenset(self._doubted), set()
        self._present -= lost
        return lost

    @property
    def present(self) -> frozenset[DeviceId]:
        """Devices online as far as the broker knows, without those that are revoked: the broker lets
        none of them say that it has gone, and a round would wait for each."""
        return frozenset(device for device in self._present if not self._shut_out(device))

    @property
    def known(self) -> int:
        """How many of those are present that joined the fleet."""
        return len(self.present & self.identities.keys())

    @property
    def gone(self) -> frozenset[DeviceId]:
        """Devices that the broker says are offline. Of others nothing is known."""
        return frozenset(self._gone)

    def _shut_out(self, device: DeviceId) -> bool:
        return self.identities.get(device) in self.revoked

    def fault(self, device: DeviceId) -> None:
        """A device broke a rule without cost to the round."""
        self.faults[device] += 1

    def blame(self, device: DeviceId, round_id: int, reason: str) -> None:
        """A device cost the fleet a round."""
        self.faults[device] += 1
        self._kept_out[device] = (round_id + KEPT_OUT_ROUNDS, reason)

    def admit(self, device: DeviceId, identity: bytes, round_id: int) -> str | None:
        """Why a device with this identity may not take part in a round; None if it may."""
        if identity in self.revoked:
            return "its identity was revoked"
        until, reason = self._kept_out.get(device, (0, ""))
        if round_id <= until:
            return f"kept out until round {until}: {reason}"
        known = self.identities.get(device)
        if known is None and self.closed:
            return "no device of this name joined the fleet"
        if known is not None and known != identity:
            return "its identity key is not the one that was registered"
        return None
