"""An ear at the broker: what anyone who can read its traffic learns of one device's update.

It listens like a hostile broker would, keeps the first masked update that it hears whole, and the
simulation, which knows what the device had trained, says how much the two have to do with each other.
"""

from dataclasses import dataclass

import numpy as np

from covey_shared import chunks
from covey_shared.chunks import Assembly, Chunk, MemorySink
from covey_shared.errors import RemoteProtocolError
from covey_shared.fixedpoint import Encoding, to_signed, unpack
from covey_shared.masking import Ring
from covey_shared.messages import DeviceId
from covey_shared.mqtt import MqttTransport
from covey_shared.topics import Topics
from covey_shared.transport import Incoming


@dataclass(frozen=True, slots=True)
class Overheard:
    """One masked update beside its plaintext. correlation: Pearson's, over all coordinates; of two
    independent vectors it is about 0, give or take 1 / sqrt(coordinates)."""

    device: DeviceId
    round: int
    coordinates: int
    correlation: float


class Eavesdropper:
    """transport: not started yet; stopped by `stop`."""

    def __init__(self, transport: MqttTransport, topics: Topics) -> None:
        self._transport = transport
        self._topics = topics
        self._hearing: dict[DeviceId, tuple[Assembly, MemorySink]] = {}
        self._heard: dict[DeviceId, bytes] = {}
        self.overheard: Overheard | None = None

    async def start(self) -> None:
        """Listen to all uploads."""

        async def nothing() -> None:
            pass

        await self._transport.start(self._on_message, nothing, lambda reason: None)
        await self._transport.subscribe(self._topics.upload("+"))

    async def stop(self) -> None:
        """Listen no more."""
        await self._transport.stop()

    def round_over(self) -> None:
        """Forget what was heard in this round."""
        self._hearing.clear()
        self._heard.clear()

    def compare(self, round_id: int, device: DeviceId, encoding: Encoding, plain: Ring) -> None:
        """Hold the update that was heard of this device, if any, against its plaintext. Once is
        enough: later calls do nothing."""
        payload = self._heard.get(device)
        if self.overheard is not None or payload is None:
            return
        try:
            masked = unpack(payload, encoding.n_coordinates, encoding.bits, encoding.lane)
        except RemoteProtocolError:
            return
        pair = (to_signed(masked, encoding.bits), to_signed(plain, encoding.bits))
        self.overheard = Overheard(
            device, round_id, encoding.n_coordinates, float(np.corrcoef(*pair)[0, 1])
        )

    def _on_message(self, incoming: Incoming) -> None:
        device = self._topics.device_of(incoming.topic)
        if self.overheard is not None or device is None or device in self._heard:
            return
        try:
            self._add(device, chunks.decode_frame(incoming.payload))
        except RemoteProtocolError:
            return

    def _add(self, device: DeviceId, chunk: Chunk) -> None:
        if device not in self._hearing:
            sink = MemorySink(chunk.size)
            self._hearing[device] = (Assembly(chunk.digest, chunk.size, sink), sink)
        assembly, sink = self._hearing[device]
        if assembly.add(chunk):
            assembly.verify()
            self._heard[device] = bytes(sink.data)
