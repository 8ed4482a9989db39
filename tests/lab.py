"""A fleet in memory: the real machines of both sides, no sockets, a seeded clock and seeded chance.

`Lab` makes identities, `Lab.round` opens a round, `Play.run` passes messages until nothing moves, then
lets time pass. Tests interfere through `Play.intercept`, which sees every message on its way and may
drop, change, repeat or delay it, and by taking devices away.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from covey_coordinator import round as coordinator
from covey_device import session as device
from covey_shared import keys, wire
from covey_shared.fixedpoint import to_signed
from covey_shared.messages import Certificate, DeviceId, RoundCall, RunId, Work
from covey_shared.secagg.cohort import Trust

FLEET = "lab"
NOW_UNIX = 1_900_000_000
N_PARAMS = 40
RUN = RunId(b"run-" + bytes(12))


def seeded(seed: object) -> Callable[[int], bytes]:
    """A reproducible stream of bytes in the place of the operating system's."""
    state = hashlib.shake_256(repr(seed).encode())
    position = 0

    def rng(n: int) -> bytes:
        nonlocal position
        position += n
        return state.digest(position)[-n:] if n else b""

    return rng


@dataclass(frozen=True)
class Mail:
    """One message on its way. to is None for a broadcast; sender is None for the coordinator."""

    envelope: bytes
    sender: DeviceId | None
    to: DeviceId | None

    @property
    def message(self) -> object:
        return wire.decode(self.envelope).message

    @property
    def kind(self) -> str:
        return type(self.message).__name__


Intercept = Callable[[Mail], Iterable[Mail]]


@dataclass
class Lab:
    """n devices with identities under one CA."""

    n: int
    seed: object = 7
    n_params: int = N_PARAMS
    policy: device.Policy = field(default_factory=device.Policy)

    def __post_init__(self) -> None:
        self.rng = seeded(("lab", self.seed))
        self.ca = keys.SigningKey(self.rng(32))
        self.coordinator_key = keys.SigningKey(self.rng(32))
        self.trust = Trust(FLEET, self.ca.public, self.coordinator_key.public)
        self.names = sorted(DeviceId(f"pi-{i:03}") for i in range(self.n))
        self.identities = {name: keys.SigningKey(self.rng(32)) for name in self.names}
        self.certificates = {name: self.certify(name, key) for name, key in self.identities.items()}
        self.saved: dict[DeviceId, list[device.Memory]] = {name: [] for name in self.names}
        self.plain: dict[tuple[DeviceId, int], np.ndarray] = {}
        self.sessions = {name: self.session(name) for name in self.names}
        self.model = hashlib.sha256(b"model 0").digest()

    def certify(
        self,
        name: str,
        key: keys.SigningKey,
        *,
        ca: keys.SigningKey | None = None,
        not_after: int = 2**31,
    ) -> bytes:
        certificate = Certificate(FLEET, DeviceId(name), key.public, not_after)
        return wire.sign(certificate, ca or self.ca).envelope

    def session(self, name: DeviceId, memory: device.Memory | None = None) -> device.Session:
        def witness(round_id: int, ring: np.ndarray) -> None:
            self.plain[name, round_id] = ring

        return device.Session(
            self.trust,
            self.identities[name],
            self.certificates[name],
            name,
            self.policy,
            memory or device.Memory(),
            seeded((self.seed, name, len(self.saved[name]))),
            witness,
        )

    def call(self, round_id: int = 1, **changes: object) -> RoundCall:
        fields: dict[str, object] = dict(
            fleet=FLEET,
            run=RUN,
            round=round_id,
            plan=hashlib.sha256(b"plan").digest(),
            plan_bytes=100,
            model=self.model,
            model_bytes=4 * self.n_params,
            revision=0,
            n_min=3,
            gather_s=10.0,
        )
        return RoundCall(**(fields | changes))  # type: ignore[arg-type]

    def spec(
        self, round_id: int = 1, call: RoundCall | None = None, **changes: object
    ) -> coordinator.RoundSpec:
        fields: dict[str, object] = dict(
            call=call or self.call(round_id),
            n_params=self.n_params,
            work=Work(batches=1, batch_size=1, seconds=10.0, hyper=(0.1,)),
            goal=self.n,
            metric_clips=(10.0,),
            share_s=10.0,
            collect_s=20.0,
            unmask_s=10.0,
            resend_s=3.0,
            absent_grace_s=1.0,
        )
        return coordinator.RoundSpec(**(fields | changes))  # type: ignore[arg-type]

    def round(self, spec: coordinator.RoundSpec | None = None, **changes: object) -> "Play":
        spec = spec or self.spec(**changes)
        machine = coordinator.Round(
            spec,
            self.trust,
            self.coordinator_key,
            rng=seeded((self.seed, "round", spec.call.round)),
            present=frozenset(self.names),
        )
        return Play(self, machine)

    def update(self, name: DeviceId, round_id: int) -> tuple[np.ndarray, int, tuple[float, ...]]:
        """A device's made-up training result: delta, examples, metrics."""
        stream = np.random.default_rng(abs(hash((name, round_id, repr(self.seed)))) % 2**32)
        delta = stream.normal(0, 0.3, self.n_params).astype(np.float32)
        return delta, int(stream.integers(1, 500)), (float(stream.uniform(0, 5)),)


class Play:
    """One round of a lab being played out."""

    def __init__(self, lab: Lab, machine: coordinator.Round) -> None:
        self.lab = lab
        self.machine = machine
        self.now = 0.0
        self.queue: deque[Mail] = deque()
        self.uploads: dict[DeviceId, bytes] = {}
        self.expected: dict[DeviceId, coordinator.Expect] = {}
        self.gone: set[DeviceId] = set()
        self.intercept: Intercept = lambda mail: (mail,)
        self.on_train: Callable[[DeviceId], bool] = lambda name: True
        self.completed: coordinator.Completed | None = None
        self.abandoned: coordinator.Abandoned | None = None
        self.faults: list[coordinator.Fault] = []
        self.refused: list[tuple[str, Exception]] = []
        self.ended: dict[DeviceId, device.Ended] = {}
        self.seen: list[Mail] = []

    # -- playing ----------------------------------------------------------------------------------

    def run(self, *, limit_s: float = 200.0) -> "Play":
        """Play until the round is over and all mail is delivered, or the time limit."""
        self.coordinator_did(self.machine.open(self.now))
        while self.now < limit_s:
            self.drain()
            if self.machine.over:
                break
            self.now += 0.5
            self.coordinator_did(self.machine.tick(self.now, NOW_UNIX))
        self.drain()
        return self

    def drain(self) -> None:
        while self.queue:
            mail = self.queue.popleft()
            self.seen.append(mail)
            for passed in self.intercept(mail):
                self.deliver(passed)

    def deliver(self, mail: Mail) -> None:
        if mail.sender is None:
            for name in [mail.to] if mail.to else list(self.lab.names):
                if name in self.gone or name not in self.lab.sessions:
                    continue
                try:
                    actions = self.lab.sessions[name].receive(mail.envelope)
                except Exception as error:
                    self.refused.append((name, error))
                    self._only_remote(error)
                    continue
                self.device_did(name, actions)
        else:
            try:
                actions = self.machine.receive(mail.envelope, mail.sender, self.now, NOW_UNIX)
            except Exception as error:
                self.refused.append(("coordinator", error))
                self._only_remote(error)
                return
            self.coordinator_did(actions)

    @staticmethod
    def _only_remote(error: Exception) -> None:
        """The one sentence every byte from the network must obey."""
        from covey_shared.errors import RemoteProtocolError

        if not isinstance(error, RemoteProtocolError):
            raise error

    def leave(self, name: DeviceId) -> None:
        """A device vanishes; the broker's last will tells the coordinator."""
        self.gone.add(name)
        self.coordinator_did(self.machine.presence(name, False, self.now, NOW_UNIX))

    def coordinator_did(self, actions: list[coordinator.Action]) -> None:
        for action in actions:
            match action:
                case coordinator.Publish(message, to):
                    self.queue.append(Mail(message.envelope, None, to))
                case coordinator.Expect():
                    self.expected[action.device] = action
                    self.try_upload(action.device)
                case coordinator.Completed():
                    assert self.completed is None
                    assert self.abandoned is None
                    self.completed = action
                    next_model = hashlib.sha256(action.ring_sum.tobytes()).digest()
                    self.coordinator_did(self.machine.publish_result(next_model, action.ring_sum))
                case coordinator.Abandoned():
                    assert self.completed is None
                    assert self.abandoned is None
                    self.abandoned = action
                case coordinator.Fault():
                    self.faults.append(action)
                case coordinator.Moved():
                    pass

    def try_upload(self, name: DeviceId) -> None:
        expected, payload = self.expected.get(name), self.uploads.get(name)
        if expected is None or payload is None:
            return
        if hashlib.sha256(payload).digest() == expected.payload:
            self.coordinator_did(self.machine.uploaded(name, payload, self.now, NOW_UNIX))

    def device_did(self, name: DeviceId, actions: list[device.Action]) -> None:
        session = self.lab.sessions[name]
        for action in actions:
            if name in self.gone:
                return
            match action:
                case device.Publish(message):
                    self.queue.append(Mail(message.envelope, name, None))
                case device.Upload(payload):
                    self.uploads[name] = payload
                    self.try_upload(name)
                case device.Fetch(call):
                    prepared = device.Prepared(self.lab.n_params, 1, 1)
                    self.device_did(name, session.ready(call.round, prepared))
                case device.Train(round_id):
                    if self.on_train(name):
                        self.train(name, round_id)
                case device.Save(memory):
                    self.lab.saved[name].append(memory)
                case device.Ended():
                    self.ended[name] = action
                case device.StopTraining():
                    pass

    def train(self, name: DeviceId, round_id: int) -> None:
        delta, examples, metrics = self.lab.update(name, round_id)
        self.device_did(name, self.lab.sessions[name].trained(round_id, delta, examples, metrics))

    # -- what came of it --------------------------------------------------------------------------

    def mismatches(self) -> int:
        """Coordinates in which the decoded sum differs from the survivors' plaintext sum."""
        assert self.completed is not None
        encoding = self.completed.encoding
        total = np.zeros(encoding.n_coordinates, np.int64)
        for name in self.completed.survivors:
            total += to_signed(self.lab.plain[name, self.machine.spec.call.round], encoding.bits)
        return int((to_signed(self.completed.ring_sum, encoding.bits) != total).sum())
