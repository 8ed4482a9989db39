"""A fleet in memory: the real machines of both sides, no sockets, a seeded clock and seeded chance.

`Lab` makes identities, `Lab.round` opens a round, `Play.run` passes messages until nothing moves, then
lets time pass. Tests interfere through `Play.intercept`, which sees every message on its way and may
drop, change, repeat or delay it, through `Weather`, which does the same by chance, and by taking
devices away or restarting them.

A broadcast is one `Mail` unless `scatter` is set; then every device gets a copy of its own, which may
be lost or overtaken alone. Uploads travel as `Parcel`s in the same queue.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from covey_coordinator import round as coordinator
from covey_device import session as device
from covey_shared import keys, wire
from covey_shared.errors import RemoteProtocolError
from covey_shared.fixedpoint import to_signed
from covey_shared.messages import Certificate, DeviceId, RoundCall, RunId, WantUpload, Work
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


@dataclass(frozen=True)
class Parcel:
    """A masked update on its way, as if its chunks were one."""

    payload: bytes
    sender: DeviceId


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
        self.kept: dict[DeviceId, device.Unfinished | None] = dict.fromkeys(self.names)
        self.started = dict.fromkeys(self.names, 0)
        self.plain: dict[tuple[DeviceId, int], np.ndarray] = {}
        self.sessions = {name: self.session(name) for name in self.names}
        self.model = hashlib.sha256(b"model 0").digest()

    def certify(
        self,
        name: str,
        key: keys.SigningKey,
        *,
        ca: keys.SigningKey | None = None,
        fleet: str = FLEET,
        issued: int = 0,
        not_after: int = 2**31,
    ) -> bytes:
        certificate = Certificate(fleet, DeviceId(name), key.public, issued, not_after)
        return wire.sign(certificate, ca or self.ca).envelope

    def session(
        self,
        name: DeviceId,
        memory: device.Memory | None = None,
        policy: device.Policy | None = None,
        unfinished: device.Unfinished | None = None,
    ) -> device.Session:
        def witness(round_id: int, ring: np.ndarray) -> None:
            self.plain[name, round_id] = ring

        self.started[name] += 1
        return device.Session(
            self.trust,
            self.identities[name],
            self.certificates[name],
            name,
            policy or self.policy,
            memory or device.Memory(),
            seeded((self.seed, name, self.started[name])),
            witness,
            unfinished=unfinished,
        )

    def restart(self, name: DeviceId) -> device.Session:
        """A device's process dies; a new one starts with what the last one saved."""
        memory = self.saved[name][-1] if self.saved[name] else device.Memory()
        self.sessions[name] = self.session(name, memory, unfinished=self.kept[name])
        return self.sessions[name]

    def call(self, round_id: int = 1, **changes: object) -> RoundCall:
        fields: dict[str, object] = {
            "fleet": FLEET,
            "run": RUN,
            "round": round_id,
            "plan": hashlib.sha256(b"plan").digest(),
            "plan_bytes": 100,
            "model": self.model,
            "model_bytes": 4 * self.n_params,
            "revision": 0,
            "n_min": 3,
            "plan_signatures": (),
            "gather_s": 10.0,
            "chance": 1.0,
            "spread_s": 0.0,
            "reconnect_s": 0.0,
        }
        return RoundCall(**(fields | changes))  # type: ignore[arg-type]

    def spec(
        self, round_id: int = 1, call: RoundCall | None = None, **changes: object
    ) -> coordinator.RoundSpec:
        fields: dict[str, object] = {
            "call": call or self.call(round_id),
            "n_params": self.n_params,
            "work": Work(batches=1, batch_size=1, seconds=10.0, hyper=(0.1,)),
            "goal": self.n,
            "metric_clips": (10.0,),
            "share_s": 10.0,
            "collect_s": 20.0,
            "unmask_s": 10.0,
            "resend_s": 3.0,
            "absent_grace_s": 1.0,
        }
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
        seed = hashlib.sha256(repr((name, round_id, self.seed)).encode()).digest()
        stream = np.random.default_rng(int.from_bytes(seed[:8], "big"))
        delta = stream.normal(0, 0.3, self.n_params).astype(np.float32)
        return delta, int(stream.integers(1, 500)), (float(stream.uniform(0, 5)),)


class Play:
    """One round of a lab being played out."""

    def __init__(self, lab: Lab, machine: coordinator.Round) -> None:
        self.lab = lab
        self.machine = machine
        self.now = 0.0
        self.queue: deque[Mail | Parcel] = deque()
        self.uploads: dict[DeviceId, bytes] = {}
        self.expected: dict[DeviceId, coordinator.Expect] = {}
        self.gone: set[DeviceId] = set()
        self.intercept: Intercept = lambda mail: (mail,)
        self.intercept_parcel: Callable[[Parcel], Iterable[Parcel]] = lambda parcel: (parcel,)
        self.scatter = False
        self.pick: Callable[[], int] = lambda: 0
        self.on_train: Callable[[DeviceId], bool] = lambda name: True
        self.completed: coordinator.Completed | None = None
        self.abandoned: coordinator.Abandoned | None = None
        self.faults: list[coordinator.Fault] = []
        self.moves: list[coordinator.Phase] = []
        self.refused: list[tuple[str, Exception]] = []
        self.ended: dict[DeviceId, device.Ended] = {}
        self.actions: dict[DeviceId, list[device.Action]] = {name: [] for name in lab.names}
        # Device -> how many more actions it carries out before its process ends and starts anew.
        self.crash_after: dict[DeviceId, int] = {}
        self.seen: list[Mail] = []
        self.parcels: list[Parcel] = []
        self._asked = 0.0

    # -- playing ----------------------------------------------------------------------------------

    def run(self, *, limit_s: float = 200.0) -> "Play":
        """Play until the round is over and all mail is delivered, or the time limit."""
        self.open()
        while self.now < limit_s:
            self.drain()
            if self.machine.over:
                break
            self.pass_time(0.5)
        self.drain()
        return self

    def open(self) -> None:
        """Call the round; nothing is delivered yet."""
        self.coordinator_did(self.machine.open(self.now))

    def pass_time(self, seconds: float) -> None:
        """The clock goes on; the coordinator may repeat itself or give up waiting."""
        self.now += seconds
        self.coordinator_did(self.machine.tick(self.now, NOW_UNIX))
        if self.now - self._asked >= self.machine.spec.resend_s:
            self._asked = self.now
            self._ask_for_missing()

    def _ask_for_missing(self) -> None:
        """What the service does for uploads that stall."""
        if self.machine.phase is not coordinator.Phase.COLLECT:
            return
        for name, expected in self.expected.items():
            if hashlib.sha256(self.uploads.get(name, b"")).digest() != expected.payload:
                want = WantUpload(expected.h, name, expected.payload, ((0, 1),))  # type: ignore[arg-type]
                envelope = wire.sign(want, self.lab.coordinator_key).envelope
                self.queue.append(Mail(envelope, None, name))

    def drain(self) -> None:
        while self.queue:
            self.step()

    def step(self) -> None:
        """One thing in flight arrives."""
        at = self.pick()
        item = self.queue[at]
        del self.queue[at]
        if isinstance(item, Parcel):
            self.parcels.append(item)
            for parcel in self.intercept_parcel(item):
                self.deliver_parcel(parcel)
        else:
            self.seen.append(item)
            for mail in self.intercept(item):
                self.deliver(mail)

    def deliver_parcel(self, parcel: Parcel) -> None:
        self.uploads[parcel.sender] = parcel.payload
        self.try_upload(parcel.sender)

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
        if not isinstance(error, RemoteProtocolError):
            raise error

    def leave(self, name: DeviceId) -> None:
        """A device vanishes; the broker's last will tells the coordinator."""
        self.gone.add(name)
        self.coordinator_did(self.machine.presence(name, False, self.now, NOW_UNIX))

    def restart(self, name: DeviceId) -> None:
        """A device's process dies and starts again; the broker gives it the retained call."""
        self.lab.restart(name)
        self.gone.discard(name)
        self.coordinator_did(self.machine.presence(name, True, self.now, NOW_UNIX))
        call = wire.sign(self.machine.spec.call, self.lab.coordinator_key)
        self.queue.append(Mail(call.envelope, None, name))

    def coordinator_did(self, actions: list[coordinator.Action]) -> None:
        for action in actions:
            match action:
                case coordinator.Publish(message, to):
                    mail = Mail(message.envelope, None, to)
                    if self.scatter and to is None:
                        self.queue.extend(replace(mail, to=name) for name in self.lab.names)
                    else:
                        self.queue.append(mail)
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
                    self.moves.append(action.phase)

    def try_upload(self, name: DeviceId) -> None:
        expected, payload = self.expected.get(name), self.uploads.get(name)
        if expected is None or payload is None:
            return
        if hashlib.sha256(payload).digest() == expected.payload:
            try:
                actions = self.machine.uploaded(name, payload, self.now, NOW_UNIX)
            except RemoteProtocolError as error:
                self.refused.append(("coordinator", error))
                return
            self.coordinator_did(actions)

    def device_did(self, name: DeviceId, actions: list[device.Action]) -> None:
        session = self.lab.sessions[name]
        for action in actions:
            if name in self.gone or self.lab.sessions[name] is not session:
                return
            if self._crashes(name):
                self.restart(name)
                return
            self.actions[name].append(action)
            match action:
                case device.Publish(message):
                    self.queue.append(Mail(message.envelope, name, None))
                case device.Upload(payload):
                    self.queue.append(Parcel(payload, name))
                case device.Fetch(call):
                    prepared = device.Prepared(self.lab.n_params, 1, 1)
                    self.device_did(name, session.ready(call.round, prepared))
                case device.Train(round_id):
                    if self.on_train(name):
                        self.train(name, round_id)
                case device.Save(memory):
                    self.lab.saved[name].append(memory)
                case device.Keep(unfinished):
                    self.lab.kept[name] = unfinished
                case device.Forget():
                    self.lab.kept[name] = None
                case device.Ended():
                    self.ended[name] = action
                case device.StopTraining():
                    pass

    def _crashes(self, name: DeviceId) -> bool:
        if name not in self.crash_after:
            return False
        self.crash_after[name] -= 1
        if self.crash_after[name] >= 0:
            return False
        del self.crash_after[name]
        return True

    def train(self, name: DeviceId, round_id: int = 0) -> None:
        round_id = round_id or self.machine.spec.call.round
        delta, examples, metrics = self.lab.update(name, round_id)
        self.device_did(name, self.lab.sessions[name].trained(round_id, delta, examples, metrics))

    def fail_training(self, name: DeviceId, reason: str = "the loss is not a number") -> None:
        round_id = self.machine.spec.call.round
        self.device_did(name, self.lab.sessions[name].training_failed(round_id, reason))

    # -- what came of it --------------------------------------------------------------------------

    def mismatches(self) -> int:
        """Coordinates in which the decoded sum differs from the survivors' plaintext sum."""
        assert self.completed is not None, self.abandoned
        encoding = self.completed.encoding
        total = np.zeros(encoding.n_coordinates, np.int64)
        for name in self.completed.survivors:
            total += to_signed(self.lab.plain[name, self.machine.spec.call.round], encoding.bits)
        return int((to_signed(self.completed.ring_sum, encoding.bits) != total).sum())

    def sent(self, kind: type, name: DeviceId | None = None) -> list[Mail]:
        """All messages of a kind that were on their way, of one sender or of all."""
        return [
            mail
            for mail in self.seen
            if isinstance(mail.message, kind) and (name is None or mail.sender == name)
        ]


@dataclass
class Weather:
    """A network that loses, repeats and reorders by chance, from one seed.

    loss, repeat: how likely a message is lost, or comes a second time, per receiver. reorder: whatever
    is in flight arrives in any order.
    """

    seed: int
    loss: float = 0.0
    repeat: float = 0.0
    reorder: bool = True

    def over(self, play: Play) -> Play:
        """Let it rage over a round."""
        chance = random.Random(self.seed)
        copies: list[Mail | Parcel] = []

        def intercept(item: Mail | Parcel) -> Iterable[Mail | Parcel]:
            if chance.random() < self.loss:
                return ()
            if any(copy is item for copy in copies):
                copies[:] = [copy for copy in copies if copy is not item]
            elif chance.random() < self.repeat:
                copies.append(item)
                play.queue.append(item)
            return (item,)

        play.scatter = True
        play.intercept = intercept  # type: ignore[assignment]
        play.intercept_parcel = intercept  # type: ignore[assignment]
        if self.reorder:
            play.pick = lambda: chance.randrange(len(play.queue))
        return play
