"""Topic names, QoS and retain flags, as data.

At most 7 levels (AWS IoT's limit); this uses 4::

    covey/FLEET/round               coordinator -> all       the open round's call, retained
    covey/FLEET/all                 coordinator -> all       manifest, roster, view, result ...
    covey/FLEET/to/DEVICE           coordinator -> device    delivery, want upload
    covey/FLEET/from/DEVICE         device -> coordinator    every message of a device
    covey/FLEET/up/DEVICE           device -> coordinator    chunks of its masked update
    covey/FLEET/blob/SHA256         coordinator -> who asks  chunks of a plan or model
    covey/FLEET/presence/DEVICE     device -> coordinator    "online" / "offline" (last will), retained

Everything goes with QoS 1: delivered once or more while a session lasts. Nothing relies on more:
every message may be repeated, and whoever waits for one asks again. Chunks of blobs too: what waits for
many slow readers a broker holds once with QoS 1, and a copy for each of them with QoS 0.

Presence is a hint that saves waiting; it is not signed, and no check hangs on it.
"""

from dataclasses import dataclass

from covey_shared.messages import DeviceId

ROOT = "covey"
QOS = 1
ONLINE = b"online"
OFFLINE = b"offline"


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one fleet."""

    fleet: str

    def _name(self, *levels: str) -> str:
        return "/".join((ROOT, self.fleet, *levels))

    @property
    def round(self) -> str:
        """The open round's call; retained."""
        return self._name("round")

    @property
    def all(self) -> str:
        """What the coordinator tells everybody during a round."""
        return self._name("all")

    def inbox(self, device: str) -> str:
        """What the coordinator tells one device."""
        return self._name("to", device)

    def outbox(self, device: str) -> str:
        """A device's messages; "+" for all devices."""
        return self._name("from", device)

    def upload(self, device: str) -> str:
        """Chunks of a device's masked update; "+" for all devices."""
        return self._name("up", device)

    def blob(self, digest: bytes) -> str:
        """Chunks of one published blob."""
        return self._name("blob", digest.hex())

    def presence(self, device: str) -> str:
        """Online or offline; retained; "+" for all devices."""
        return self._name("presence", device)

    def device_of(self, topic: str) -> DeviceId | None:
        """The device that an outbox, upload or presence topic belongs to."""
        levels = topic.split("/")
        if len(levels) == 4 and levels[:2] == [ROOT, self.fleet]:
            return DeviceId(levels[3])
        return None
