"""A fleet as in `memory_fleet`, over a real broker: the real services, real MQTT, made-up training.

`LiveFleet` connects its clients to a URL, which may be the broker's or a hostile one's in front of it.
The coordinator may be left out, for a hostile one to take its place. Every encoded update is known.
"""

import asyncio
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from covey_coordinator.round import Completed
from covey_shared import keys
from covey_shared.fixedpoint import to_signed
from covey_shared.messages import DeviceId
from covey_shared.mqtt import MqttTransport
from covey_shared.transport import Will
from memory_fleet import Fleet, Seat, config, short

USER, PASSWORD = "covey", "correct horse battery staple"

# Long enough for two noisy cores; what ends a phase in these tests are answers, or a device's absence.
PATIENT = short(gather_s=30.0, share_s=30.0, collect_s=30.0, unmask_s=30.0)


def patient(rounds: int = 1, n: int = 4, **changes: Any) -> Any:
    """A run's configuration that waits for answers rather than for deadlines."""
    return config(rounds, n, **({"deadlines": PATIENT} | changes))


def connection(url: str, client_id: str, will: Will | None = None) -> MqttTransport:
    """A client that does not wait long between attempts."""
    return MqttTransport(
        url,
        client_id,
        username=USER,
        password=PASSWORD,
        will=will,
        backoff_base_s=0.05,
        backoff_cap_s=0.2,
    )


class RealNetwork:
    """Stands where `memory_transport.Network` does. url: of the coordinator, and of the devices."""

    def __init__(self, url: str, devices_url: str | None = None) -> None:
        self.url, self.devices_url = url, devices_url or url
        self.log: list[str] = []

    def client(self, name: str, will: Will | None = None) -> MqttTransport:
        url = self.url if name.startswith("coordinator") else self.devices_url
        self.log.append(name)
        return connection(url, name, will)


class LiveFleet(Fleet):
    """name: of the fleet, its own on a shared broker. url: where the coordinator connects.

    devices_url: where the devices do, if elsewhere. coordinator: whether the real one runs. secrets: all
    16-byte secrets that the devices have drawn, for controls: whoever has them unmasks everything.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        url: str,
        n: int = 4,
        *,
        devices_url: str | None = None,
        coordinator: bool = True,
    ) -> None:
        super().__init__(directory, n, network=RealNetwork(url, devices_url), name=name)  # type: ignore[arg-type]
        self.url, self.with_coordinator = url, coordinator
        self.secrets: list[bytes] = []

    async def __aenter__(self) -> "LiveFleet":
        if self.with_coordinator:
            await self.coordinator.start()
        for i in range(self.n):
            await self.add(f"pi-{i}")
        if self.with_coordinator:
            await self.until(lambda: len(self.coordinator.registry.present) >= self.n)
        else:
            await self.until(lambda: all(seat.transport.connected for seat in self.seats))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.gather(*(seat.service.close() for seat in self.seats))
        if self.with_coordinator:
            await self.coordinator.close()

    async def boot(self, seat: Seat, **more: Any) -> None:
        """As ever, and every secret that the device draws is written down."""
        await super().boot(seat, **more)

        def noted(n: int) -> bytes:
            drawn = os.urandom(n)
            if n == keys.SEED_BYTES:
                self.secrets.append(drawn)
            return drawn

        seat.service._session._rng = noted

    @property
    def names(self) -> list[DeviceId]:
        """The honest devices."""
        return sorted(seat.name for seat in self.seats)

    def seat(self, name: str) -> Seat:
        return next(seat for seat in self.seats if seat.name == name)

    async def crash(self, name: str) -> None:
        """The plug is pulled and put back: a new process with the old one's directory."""
        seat = self.seat(name)
        await seat.service.close(graceful=False)
        await self.boot(seat)
        await self.until(lambda: seat.transport.connected)

    def sum_of(self, round_id: int, names: Any, bits: int) -> np.ndarray:
        """What these devices' updates come to, signed, as the ring has it."""
        rings = [self.plain[round_id, name].astype(np.int64) for name in names]
        return to_signed(np.sum(rings, axis=0), bits)

    def _on_sum(self, round_id: int, completed: Completed) -> None:
        """Integer by integer, those of attackers included, as what they put under their mask."""
        self.sums[round_id] = completed
        bits = completed.encoding.bits
        expected = self.sum_of(round_id, completed.survivors, bits)
        assert (expected == to_signed(completed.ring_sum, bits)).all(), "the sum is wrong"

    def honest_sum_is_right(self, round_id: int) -> bool:
        """Take what attackers added off the sum: what is left is the sum of the honest survivors."""
        completed = self.sums[round_id]
        bits = completed.encoding.bits
        honest = [name for name in completed.survivors if name in self.names]
        others = [name for name in completed.survivors if name not in self.names]
        rest = to_signed(completed.ring_sum, bits)
        if others:
            rest = rest - self.sum_of(round_id, others, bits)
        exact = sum(to_signed(self.plain[round_id, name], bits) for name in honest)
        return len(honest) >= 3 and bool((to_signed(rest, bits) == exact).all())
