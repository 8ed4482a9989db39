"""One simulated device: what it is made of, and a life of it, from start to vanishing.

A device has one identity, one data set and one state directory, and any number of lives: after it
vanished, the next life begins like a process after a crash, with what was saved and nothing else.
"""

import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from covey_device.data import DataConfig
from covey_device.data.growing import Growth
from covey_device.keystore import MemoryFile
from covey_device.policy import Policy
from covey_device.service import DeviceService
from covey_device.session import Session
from covey_device.trainer import Trainer, Work, load_trainer
from covey_device.trials import USUAL_BATCH, Allowed, Trials
from covey_fleet.faults import FaultPlan, FaultyTransport, Vanished
from covey_fleet.witness import Witness
from covey_shared.keys import SigningKey
from covey_shared.messages import DeviceId
from covey_shared.mqtt import BrokerUrl, MqttTransport
from covey_shared.plan import PlanHeader
from covey_shared.secagg.cohort import Trust
from covey_shared.topics import OFFLINE, Topics
from covey_shared.transport import Will

BACKOFF_BASE_S = 0.2
BACKOFF_CAP_S = 2.0
"""A broker on the same machine is back soon, and there is no fleet of thousands to hold back."""

# Everything may run in one process, of which this is then the bound; devices in the field set
# theirs in device.toml.
_MAX_RESIDENT_BYTES = 8_000_000_000
_MAX_BATCHES = 100_000
_MAX_TRAINING_S = 600.0
_MAX_TRIAL_S = 60.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of topics and payloads that devices sent and received."""

    up: int = 0
    down: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.up + other.up, self.down + other.down)


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """Everything that a device's lives have in common; travels to its process.

    identity_seed: of its Ed25519 key. directory: its own; `data` names files in it, its memory is
    kept there. witness: where its plaintext goes (see there); None: nowhere, as in the field.
    """

    trust: Trust
    device: DeviceId
    identity_seed: bytes
    certificate: bytes
    broker: BrokerUrl
    username: str | None
    password: str | None
    directory: Path
    data: DataConfig
    faults: FaultPlan
    witness: Path | None

    def __repr__(self) -> str:
        return f"<device {self.device} of fleet {self.trust.fleet}>"  # no secrets


class Life:
    """A running device, until it vanishes or is closed. Made and used on the event loop."""

    def __init__(
        self,
        spec: DeviceSpec,
        vanish: Callable[[Vanished], None],
        *,
        pool: Executor | None = None,
        train_pool: Executor | None = None,
    ) -> None:
        trust, device = spec.trust, spec.device
        topics, identity = Topics(trust.fleet), SigningKey(spec.identity_seed)
        inner = MqttTransport(
            spec.broker,
            client_id(trust.fleet, device),
            username=spec.username,
            password=spec.password,
            will=Will(topics.presence(device), OFFLINE),
            backoff_base_s=BACKOFF_BASE_S,
            backoff_cap_s=BACKOFF_CAP_S,
        )
        self._transport = FaultyTransport(inner, topics, device, spec.faults, vanish)
        memory = MemoryFile(spec.directory / "state")
        session = Session(
            trust,
            identity,
            spec.certificate,
            device,
            Policy(),
            memory.load(),
            os.urandom,
            None if spec.witness is None else Witness(spec.witness).of(device),
        )

        trials = _trials(spec.directory.parent)
        growth = Growth(spec.directory / "state")

        def make_trainer(header: PlanHeader, train_graph: bytes) -> Trainer:
            return load_trainer(
                header, train_graph, spec.data, spec.directory, trials=trials, growth=growth
            )

        self.service = DeviceService(
            session,
            identity,
            trust.fleet,
            self._transport,
            memory,
            make_trainer,
            limits=Work(_MAX_BATCHES, 1, _MAX_TRAINING_S, _MAX_RESIDENT_BYTES),
            rng=os.urandom,
            pool=pool,
            train_pool=train_pool,
        )

    @property
    def traffic(self) -> Traffic:
        """Bytes so far."""
        return Traffic(self._transport.bytes_out, self._transport.bytes_in)

    async def start(self) -> None:
        """Connect, and take part in rounds from now on."""
        await self.service.start()

    async def close(self, *, graceful: bool = True) -> None:
        """End it; graceful=False leaves the announcement to the broker, as a crash would."""
        await self.service.close(graceful=graceful)


def _trials(fleet: Path) -> Trials:
    """Remembered beside the devices' directories: a plan is tried once for all of them."""
    allowed = Allowed(_MAX_RESIDENT_BYTES, _MAX_TRIAL_S, 1)
    return Trials(fleet / "trials", lambda: allowed)


def try_plan(fleet: Path, header: PlanHeader, train_graph: bytes) -> None:
    """Try a plan for all devices below this directory. Raises what a device would decline it with."""
    _trials(fleet).of(header, train_graph).load(USUAL_BATCH)


def client_id(fleet: str, name: str) -> str:
    """Unique at a broker that several fleets share."""
    return f"{fleet}-{name}"
