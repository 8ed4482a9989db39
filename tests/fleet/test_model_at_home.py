"""`covey up` and real devices from their directories: the last model of a run arrives, and goes on being
served when the run is over, another begins, or the coordinator is a new process."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

import covey_device.assembly
from brokers import Brokers
from covey_coordinator import daemon
from covey_coordinator.blobs import BlobServer, Ranges
from covey_coordinator.config import BrokerConfig
from covey_coordinator.daemon import Daemon
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.queueing import queue_run
from covey_coordinator.store import FILE, RunDirectory, Store
from covey_device.assembly import assemble, load_device
from covey_device.home import keeper as home
from covey_device.home.files import ModelDirectory, verify
from covey_device.service import DeviceService
from covey_shared import wire
from covey_shared.errors import CoveyError
from covey_shared.messages import Decline, DeviceId, WantBlob
from covey_shared.topics import Topics
from homes import Settled, hasten_home, stepwise, without_children
from live_fleet import LiveFleet, patient
from memory_fleet import PLAN, go, hasten
from memory_transport import Delivery, MemoryTransport, Network

NAMES = ("pi-1", "pi-2", "pi-3")
TOPICS = Topics("farm")


only_mosquitto = pytest.mark.parametrize(
    "broker_kind", ["mosquitto"], indirect=True, scope="session"
)


class Bench:
    """A fleet's directory with three devices, and the network between them."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hasten(monkeypatch)
        for module, name, value in (
            (daemon, "POLL_S", 0.02), (home, "SETTLE_S", 0.05), (home, "RETRY_S", 0.2),
            (home, "MAX_RETRY_S", 0.2), (covey_device.assembly, "RESERVE_BYTES", 0),
            (daemon, "MqttTransport", self._transport),
            (covey_device.assembly, "MqttTransport", self._transport),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, value)
        self.network, self.path = Network(), path
        self.said: list[str] = []
        broker = BrokerConfig(kind="external", url="mqtt://nowhere")
        self.fleet = FleetDirectory.create(path / "fleet", "farm", broker)
        self.homes: dict[str, Path] = {}
        rng = np.random.default_rng(0)
        for name in NAMES:
            data = path / f"{name}.npz"
            features = rng.random((64, 1, 8, 8)).astype(np.float32)
            np.savez(data, features=features, labels=rng.integers(0, 10, 64))
            self.homes[name] = self.fleet.add_device(name, days=1, data=data)
            # The limit is the whole process's, and other tests' torch may be in this one.
            (self.homes[name] / "policy.toml").write_text("[limits]\nmax_memory_mb = 10000\n")

    def _transport(self, url: object, client_id: str, **settings: Any) -> MemoryTransport:
        return self.network.client(client_id, settings.get("will"))

    def queue(self, name: str, **settings: Any) -> RunDirectory:
        table = {
            "plan": str(PLAN), "rounds": 1, "work": {"batches": 1}, "cohort": {"goal": 3},
            "deadlines": {"gather_s": 10.0, "collect_s": 20.0, "absent_grace_s": 0.3, "resend_s": 0.3},
        }  # fmt: skip
        file = self.path / f"{name}.toml"
        file.write_text(tomli_w.dumps(table | settings))
        return queue_run(self.fleet.path, file, name, {})

    async def device(self, name: str) -> DeviceService:
        service = assemble(load_device(self.homes[name] / "device.toml"))
        await service.start()
        return service

    async def up(self, until: Callable[[], bool], *, timeout_s: float = 40.0) -> None:
        """`covey up`, stopped as soon as `until` is true."""
        stop = asyncio.Event()
        serving = asyncio.create_task(Daemon(self.fleet, self.said.append).serve(stop))
        try:
            async with asyncio.timeout(timeout_s):
                while not until() and not serving.done():
                    await asyncio.sleep(0.01)
        finally:
            stop.set()
            async with asyncio.timeout(10):
                await serving

    def heard(self, text: str) -> bool:
        return any(text in line for line in self.said)

    def has(self, name: str, run: RunDirectory) -> bool:
        sidecar = ModelDirectory(self.homes[name] / "model", reserve_bytes=0).sidecar()
        return sidecar is not None and sidecar.model == run.state().model

    def check(self, name: str, run: RunDirectory) -> None:
        parts = load_device(self.homes[name] / "device.toml")
        folder = ModelDirectory(self.homes[name] / "model", reserve_bytes=0).folder()
        assert folder is not None
        verify(folder, parts.trust, DeviceId(name), parts.identity.public)
        file = self.homes[name] / "model" / "current.onnx"
        assert file.read_bytes() == (run.path / "model.onnx").read_bytes()


@pytest.fixture
def childless(monkeypatch: pytest.MonkeyPatch) -> None:
    without_children(monkeypatch)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_the_last_model_arrives_though_the_coordinator_was_restarted(bench: Bench):
    """No device gets the model while the run's process lives: a new one has nothing to play, and serves."""

    async def scenario() -> None:
        run = bench.queue("a")

        def nothing_new(delivery: Delivery) -> Iterable[Delivery]:
            last = run.state().model
            late = last and delivery.topic == TOPICS.blob(bytes.fromhex(last))
            return () if late else (delivery,)

        bench.network.tamper = nothing_new
        devices = [await bench.device(name) for name in NAMES]
        await bench.up(lambda: bench.heard("run a completed"))
        assert not any((bench.homes[name] / "model" / "current.onnx").exists() for name in NAMES)
        # And one of the devices is a new process as well.
        await devices[0].close()
        devices[0] = await bench.device(NAMES[0])
        bench.network.tamper = lambda delivery: (delivery,)
        await bench.up(lambda: all(bench.has(name, run) for name in NAMES))
        for name in NAMES:
            bench.check(name, run)
        for device in devices:
            await device.close()

    go(scenario())


@pytest.mark.usefixtures("childless")
def test_a_run_after_another_leaves_the_first_ones_last_model_on_offer(bench: Bench):
    """Devices ask for it when the next run's first round has been called, and get it before that is over."""

    async def scenario() -> None:
        first, second = bench.queue("a"), bench.queue("b")
        asked: list[bytes] = []
        had: set[str] = set()

        def begun() -> bool:
            return bench.heard("run b: 1 rounds to go")

        def tamper(delivery: Delivery) -> Iterable[Delivery]:
            last, payload = first.state().model, delivery.incoming.payload
            if not last or delivery.topic.split("/")[2] != "from":
                return (delivery,)
            if payload[1:2] != bytes((WantBlob.CODE,)):
                return () if begun() and len(had) < len(NAMES) else (delivery,)
            wanted = wire.decode_as(WantBlob, payload).message.blob.hex() == last
            if wanted and begun():
                asked.append(payload)
            return () if wanted and not begun() else (delivery,)

        def done() -> bool:
            had.update(name for name in NAMES if bench.has(name, first))
            return bench.heard("run b completed") and all(bench.has(name, second) for name in NAMES)

        bench.network.tamper = tamper
        devices = [await bench.device(name) for name in NAMES]
        await bench.up(done)
        assert had == set(NAMES)
        assert asked
        for name in NAMES:
            bench.check(name, second)
        for device in devices:
            await device.close()

    go(scenario())


@pytest.mark.usefixtures("childless")
def test_a_device_that_is_to_keep_nothing_keeps_nothing(bench: Bench):
    """And takes part like the others. One that may write nowhere keeps nothing either, and says so."""

    async def scenario() -> None:
        run = bench.queue("a")
        off, blocked = bench.homes["pi-1"], bench.homes["pi-2"]
        with (off / "device.toml").open("a") as file:
            file.write("\n[model]\nkeep = false\n")
        (blocked / "model").write_text("a file where the directory should be")
        devices = [await bench.device(name) for name in NAMES]
        await bench.up(lambda: bench.heard("run a completed") and bench.has("pi-3", run))
        assert run.state().last is not None
        assert run.state().last["survivors"] == 3
        assert not (off / "model").exists()
        assert (blocked / "model").read_text().startswith("a file")
        said = [p for _, topic, p in bench.network.log if topic.startswith("covey/farm/from/")]
        assert said
        assert not [payload for payload in said if payload[1] == Decline.CODE]
        for device in devices:
            await device.close()

    go(scenario())


@pytest.mark.usefixtures("childless")
def test_what_leaves_a_device_is_what_left_it_before(
    bench: Bench, caplog: pytest.LogCaptureFixture
):
    """Keeping the model adds requests for two blobs, the model and the graph, and no other message."""

    async def scenario() -> None:
        run = bench.queue("a")
        with (bench.homes["pi-1"] / "device.toml").open("a") as file:
            file.write("\n[model]\nkeep = false\n")
        devices = [await bench.device(name) for name in NAMES]
        await bench.up(lambda: all(bench.has(name, run) for name in NAMES[1:]))
        for device in devices:
            await device.close()
        sent: dict[str, dict[int, int]] = {name: {} for name in NAMES}
        asked: dict[str, set[bytes]] = {name: set() for name in NAMES}
        for _, topic, payload in bench.network.log:
            parts = topic.split("/")
            if parts[2] == "from":
                kinds, name = sent[parts[3]], parts[3]
                kinds[payload[1]] = kinds.get(payload[1], 0) + 1
                if payload[1] == WantBlob.CODE:
                    asked[name].add(wire.decode_as(WantBlob, payload).message.blob)
        assert set(sent["pi-2"]) == set(sent["pi-1"])
        model = hashlib.sha256((run.path / "parameters.bin").read_bytes()).digest()
        infer = hashlib.sha256((PLAN / "infer.onnx").read_bytes()).digest()
        assert asked["pi-2"] - asked["pi-1"] == {model, infer}

    with caplog.at_level(logging.INFO):
        go(scenario())


@pytest.mark.usefixtures("childless")
def test_of_several_runs_the_last_round_s_model_is_on_offer(bench: Bench):
    """After a start that finds nothing to play; a run whose plan is gone costs a line in the log."""

    async def scenario() -> None:
        devices = [await bench.device(name) for name in NAMES]
        runs = {}
        for name in ("b", "a"):  # the later one comes first by name
            runs[name] = bench.queue(name)
            await bench.up(lambda name=name: bench.heard(f"run {name} completed"))  # type: ignore[misc]
        for device in devices:
            await device.close()
        with Store.open(bench.fleet.path / FILE) as store:
            offered = daemon.last_model(bench.fleet, store)
            digests = [hashlib.sha256(blob).hexdigest() for blob in offered]
            assert digests[-1] == store.run("a").model != store.run("b").model
            graphs = [(PLAN / f"{name}.onnx").read_bytes() for name in ("train", "infer")]
            assert offered[1:3] == graphs
            table = tomli_w.dumps({"plan": "gone"})
            (runs["a"].path / "run.toml").write_text(table)
            with pytest.raises(CoveyError, match="gone"):
                daemon.last_model(bench.fleet, store)
        bench.said.clear()
        await bench.up(lambda: bench.heard("waiting for devices and runs"))

    go(scenario())


def test_a_fleet_without_a_round_offers_nothing(bench: Bench):
    bench.queue("a")
    with Store.open(bench.fleet.path / FILE) as store:
        assert daemon.last_model(bench.fleet, store) == []


@only_mosquitto
def test_over_a_real_broker_that_dies_before_anybody_has_the_model(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """mosquitto is killed when the result is out, and forgets all; and a run later it is well."""
    hasten_home(monkeypatch)
    real = BlobServer.want
    held = [True]

    def want(self: BlobServer, digest: bytes, ranges: Ranges) -> None:
        if not held[0] or digest in known:
            real(self, digest, ranges)

    monkeypatch.setattr(BlobServer, "want", want)
    known: set[bytes] = set()

    async def scenario() -> None:
        broker = await brokers.start()
        async with LiveFleet(tmp_path / "fleet", "home", broker.url) as fleet:
            settled = Settled(fleet)
            settled.move_in()
            run = fleet.run(patient(rounds=1))
            known.update(hashlib.sha256(blob).digest() for blob in run.blobs())
            await fleet.play(run)
            wanted = [seat.directory / "model" / "wanted" for seat in fleet.seats]
            await fleet.until(lambda: all(path.exists() for path in wanted))
            await broker.kill()
            for path in broker.directory.glob("mosquitto.db*"):
                path.unlink()
            held[0] = False
            await brokers.start(port=broker.port)
            await settled.everybody_has(run.model_digest)
            again = fleet.run(patient(rounds=2), "again")
            stepwise(fleet, settled)
            await fleet.play(again)
            await settled.everybody_has(again.model_digest)
            for seat in fleet.seats:
                settled.check(seat, again.directory.path / "model.onnx")

    go(scenario())
