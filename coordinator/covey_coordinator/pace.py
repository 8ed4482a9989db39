"""How fast a fleet may come at a coordinator: what each call tells its devices of it. Without I/O.

Hundreds of devices that hear one message answer it at one moment, and come back to a broker that was
restarted at one moment: a small machine then does nothing but handshakes until the devices' patience is
over, and they begin anew. So each waits for a random part of a window that the coordinator chooses, and
of a fleet far larger than a cohort only some answer at all. This is the pace steering of Bonawitz et al.
2019, *Towards Federated Learning at Scale* (section 2.3, arXiv:1902.01046). A small fleet is not slowed
down: its devices are wanted at the same time.

Nothing but time hangs on it. The cohort is drawn among those who checked in, and as every device draws by
itself whether it does, all are as likely as before to be in it.
"""

import math
from dataclasses import dataclass

from covey_shared.messages import MAX_PACE_S

SMALL = 30
"""So many at once are no crowd, on any machine."""

LEAST_CALLED = 60
"""Of fewer, chance would too often call a handful."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the coordinator's machine and network bear.

    devices_per_s: how many may connect or check in within a second. On one core of a desktop a check-in
    is verified in 1 ms, a handshake with certificates on both sides done in 2 ms; a Raspberry Pi takes
    ten times as long. mb_per_s: megabytes a second from the broker to all devices together.
    """

    devices_per_s: float = 50.0
    mb_per_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Pace:
    """What a call says: see `messages.RoundCall`."""

    chance: float = 1.0
    spread_s: float = 0.0
    reconnect_s: float = 0.0


class Pacer:
    """Steers the calls of one run. Presence, which it reckons with, is what anybody on the broker says:
    so it learns from how many do come."""

    def __init__(self, capacity: Capacity | None = None) -> None:
        self._capacity = capacity or Capacity()
        self._share = 1.0  # of those who are present, as far as is known, who would answer a call
        self._chance = 1.0
        self._expected = 0.0  # that many answers to the last call

    def steer(
        self,
        present: int,
        limit: int,
        fetch_bytes: int,
        gather_s: float,
        *,
        known: int | None = None,
    ) -> Pace:
        """For the next call. present: devices online; known: those of them that joined the fleet, as
        names that somebody made up must not keep others from being called. limit: most that are chosen.
        fetch_bytes: what each has to fetch before it checks in. gather_s: for how long that counts."""
        capacity = self._capacity
        wanted, known = _called(limit), present if known is None else known
        chance = 1.0
        if known > 2 * wanted:
            chance = min(1.0, wanted / (known * self._share))
        answering = present * chance
        self._chance, self._expected = chance, answering
        crowd = max(0.0, answering - SMALL)
        fetch_s = fetch_bytes / (capacity.mb_per_s * 1e6)
        # The last to begin needs time for its fetch too: two thirds of the gathering are left for that.
        spread_s = min(gather_s / 3, crowd * max(1 / capacity.devices_per_s, fetch_s))
        reconnect_s = max(0, present - SMALL) / capacity.devices_per_s
        most = float(MAX_PACE_S)  # the wire tells whole numbers from others
        return Pace(chance, min(most, spread_s), min(most, reconnect_s))

    def learn(self, cohort: int, limit: int) -> None:
        """What came of the last call: a cohort of so many, 0 for none, where `limit` were wanted."""
        if cohort >= limit:
            self._share = min(1.0, 2 * self._share)
        elif self._chance < 1.0:
            self._share *= min(1.0, (cohort + 1) / (self._expected + 1))


def _called(limit: int) -> int:
    """How many should answer, so that `limit` of them do but for once in a great many rounds.

    Twice as many, for a choice among them, and four standard deviations of that.
    """
    return max(LEAST_CALLED, math.ceil(2 * limit + 4 * math.sqrt(2 * limit)))
