"""`covey up` in one process: real devices from their directories, the network in memory."""

import asyncio
import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tomli_w

import covey_device.assembly
from covey_coordinator import daemon, service
from covey_coordinator.config import BrokerConfig, EvaluationConfig
from covey_coordinator.daemon import Daemon, load_held_out, only_one
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.operating import Operator
from covey_coordinator.plans.bundle import load_bundle
from covey_coordinator.queueing import queue_run
from covey_coordinator.status import FILE, read_status
from covey_coordinator.store import FILE as STORE
from covey_coordinator.store import RunDirectory, Store
from covey_device.assembly import assemble, load_device
from covey_shared import wire
from covey_shared.errors import ConfigError, CoveyError, DataError, MalformedError, StorageError
from covey_shared.messages import RoundAbandoned
from covey_shared.notify import Notifier
from covey_shared.plan import GraphRef, encode_header
from covey_shared.topics import OFFLINE, Topics
from memory_fleet import PLAN, go, hasten
from memory_transport import MemoryTransport, Network

DEADLINES = {"gather_s": 5.0, "collect_s": 10.0, "absent_grace_s": 0.2, "resend_s": 0.3}


class Bench:
    """A fleet's directory with three devices, and the network between them."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.network = Network()
        self.said: list[str] = []
        self.topics = Topics("farm")
        self.notifier: Notifier | None = None
        broker = BrokerConfig(kind="external", url="mqtt://nowhere")
        self.fleet = FleetDirectory.create(path / "fleet", "farm", broker)
        self.path = self.fleet.path
        rng = np.random.default_rng(0)
        for name in ("pi-1", "pi-2", "pi-3"):
            data = path / f"{name}.npz"
            features = rng.random((64, 1, 8, 8)).astype(np.float32)
            np.savez(data, features=features, labels=rng.integers(0, 10, 64))
            self.fleet.add_device(name, days=1, data=data)
        monkeypatch.setattr(daemon, "MqttTransport", self._transport)
        monkeypatch.setattr(covey_device.assembly, "MqttTransport", self._transport)
        # A process for each device and round, which tests/fleet/test_model_at_home.py is about.
        monkeypatch.setattr(covey_device.assembly, "home_of", lambda parts: None)

    def _transport(self, url: object, client_id: str, **settings: Any) -> MemoryTransport:
        return self.network.client(client_id, settings.get("will"))

    def queue(self, name: str, **settings: Any) -> RunDirectory:
        table = {
            "plan": str(PLAN),
            "rounds": 1,
            "work": {"batches": 1},
            "cohort": {"goal": 3},
            "deadlines": DEADLINES,
        }
        path = self.path / f"{name}.toml"
        path.write_text(tomli_w.dumps(table | settings))
        return queue_run(self.path, path, name, {})

    @asynccontextmanager
    async def devices(self) -> AsyncIterator[None]:
        started = []
        for name in ("pi-1", "pi-2", "pi-3"):
            file = self.path / "devices" / name / "device.toml"
            # The limit is the whole process's, and other tests' torch may be in this one.
            (file.parent / "policy.toml").write_text("[limits]\nmax_memory_mb = 10000\n")
            started.append(assemble(load_device(file)))
            await started[-1].start()
        try:
            yield
        finally:
            for device in started:
                await device.close()

    async def up(self, until: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
        """`covey up`, stopped as soon as `until` is true."""
        stop = asyncio.Event()
        serving = asyncio.create_task(
            Daemon(self.fleet, self.said.append, self.notifier).serve(stop)
        )
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


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    hasten(monkeypatch)
    monkeypatch.setattr(daemon, "POLL_S", 0.02)
    return Bench(tmp_path, monkeypatch)


def test_runs_are_played_in_the_order_they_were_queued(bench: Bench):
    async def scenario() -> None:
        first, second = bench.queue("b"), bench.queue("a")
        async with bench.devices():
            await bench.up(lambda: bench.heard("run a completed"))
        runs = [line for line in bench.said if line.startswith("run ")]
        assert runs[0] == "run b: 1 rounds to go"
        assert runs[1].startswith("run b: round   1 ")
        assert "3/3 devices" in runs[1]
        assert runs[2] == "run b completed: 1 rounds completed, 0 abandoned"
        assert runs[3] == "run a: 1 rounds to go"
        assert [run.state().status for run in (first, second)] == ["completed"] * 2
        assert bench.said[0] == "fleet farm: broker external, mqtt://nowhere"

    go(scenario())


def test_it_remembers_who_was_there_and_what_became_of_them(bench: Bench):
    """Also of who went while no coordinator was there to hear of it."""

    async def scenario() -> None:
        bench.queue("a")

        def present(n: int) -> bool:
            status = read_status(bench.path)
            return status is not None and len(status.present) == n

        async with bench.devices():
            await bench.up(lambda: bench.heard("run a completed") and present(3))
        with Store.open(bench.path / STORE) as store:
            before = store.sightings()
            assert {name: seen.online for name, seen in before.items()} == dict.fromkeys(
                ("pi-1", "pi-2", "pi-3"), True
            )
            for name in before:
                ((found,),) = [store.device_rounds(name, 5)]
                assert found.fate is not None
                assert found.fate.what == "summed"
        gone = time.time()

        def told() -> bool:
            status = read_status(bench.path)
            return status is not None and status.connected

        bench.network.publish("nobody", bench.topics.presence("pi-1"), OFFLINE, retain=True)
        await bench.up(told)
        with Store.open(bench.path / STORE) as store:
            after = store.sightings()
            assert not after["pi-1"].online
            assert after["pi-1"].since_unix >= gone - 1

    go(scenario())


def test_its_supervisor_hears_of_it(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """READY, STATUS, the watchdog as long as the database answers, and the end."""
    heard: list[str] = []
    online_all = "STATUS=fleet farm: 3 devices online; no run is played"
    stuck = threading.Event()
    real = Store.last_round

    def last_round(self: Store) -> int:
        while stuck.is_set():
            time.sleep(0.01)
        return real(self)

    def listen() -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.append(supervisor.recv(4096).decode())

    async def scenario() -> None:
        bench.notifier = Notifier(str(tmp_path / "notify"), watchdog_s=0.08)

        def fed() -> bool:
            listen()
            return heard.count("WATCHDOG=1") >= 3 and online_all in status()

        def status() -> list[str]:
            return [word for word in heard if word.startswith("STATUS=")]

        async with bench.devices():
            await bench.up(fed)
            listen()
            assert heard.count("READY=1") == 1
            assert heard[-1] == "STOPPING=1"
            monkeypatch.setattr(Store, "last_round", last_round)
            heard.clear()
            since: list[float] = []

            def starved() -> bool:
                listen()
                if "READY=1" in heard and not since:
                    stuck.set()
                    since.append(time.monotonic())
                if not since or time.monotonic() - since[0] < 1.0:
                    return False
                stuck.clear()
                return True

            await bench.up(starved)
            after = heard[heard.index("READY=1") :]
            assert after.count("WATCHDOG=1") <= 3, "1 s without an answer of the database"

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.setblocking(False)
        go(scenario())


def test_it_says_that_it_is_there(bench: Bench):
    async def scenario() -> None:
        seen = []

        def there() -> bool:
            status = read_status(bench.path)
            if status is not None and len(status.present) == 3:
                seen.append(status)
            return bool(seen)

        assert read_status(bench.path) is None
        async with bench.devices():
            await bench.up(there)
        assert seen[0].connected
        assert seen[0].broker == "external, mqtt://nowhere"
        assert seen[0].present == ["pi-1", "pi-2", "pi-3"]
        assert not (bench.path / FILE).exists()

    go(scenario())


def test_a_status_of_a_process_that_is_gone_is_not_believed(bench: Bench, tmp_path: Path):
    (bench.path / FILE).write_bytes(
        b'{"pid": %d, "started_unix": 1.0, "broker": "", "connected": true, "present": [], '
        b'"faults": {}}' % os.getpid()
    )
    assert read_status(bench.path) is None  # a process of that number runs, but it is another
    for data in (b"", b"\xff", b'{"pid": 1}'):
        (bench.path / FILE).write_bytes(data)
        assert read_status(bench.path) is None


def test_a_run_that_was_interrupted_goes_on(bench: Bench):
    async def scenario() -> None:
        run = bench.queue("one", rounds=4)
        async with bench.devices():
            await bench.up(lambda: bench.heard("run one: round   2 "))
            assert bench.said[-1] == "run one: stopped; the next `covey up` goes on with it"
            state = run.state()
            assert state.status == "running"
            assert 2 <= state.rounds_done < 4
            await bench.up(lambda: bench.heard("run one completed"))
        assert run.state().rounds_done == 4
        assert [line["index"] for line in run.read_metrics()] == [1, 2, 3, 4]
        assert all(line["outcome"] == "completed" for line in run.read_metrics())

    go(scenario())


def test_a_run_that_is_stopped_between_two_rounds_goes_on_too(bench: Bench):
    async def scenario() -> None:
        run, stop = bench.queue("one", rounds=2), asyncio.Event()

        def say(line: str) -> None:
            bench.said.append(line)
            if "round   1 " in line:
                stop.set()

        async with bench.devices():
            await Daemon(bench.fleet, say).serve(stop)
            assert run.state().status == "running"
            await bench.up(lambda: bench.heard("run one completed"))
        assert [line["index"] for line in run.read_metrics()] == [1, 2]

    go(scenario())


# -- what operators wish ---------------------------------------------------------------------------


def operate(bench: Bench, what: Callable[[Operator], str]) -> str:
    """As a command in another process."""
    with Operator(bench.path) as operator:
        assert not operator.alone
        return what(operator)


def test_a_run_is_paused_and_resumed_while_it_is_played(bench: Bench):
    async def scenario() -> None:
        run, asked = bench.queue("one", rounds=4), []

        def pause_then_resume() -> bool:
            if not asked and bench.heard("round   1 "):
                asked.append(operate(bench, lambda operator: operator.pause("one", now=False)))
            if len(asked) == 1 and run.state().status == "paused":
                asked.append(operate(bench, lambda operator: operator.resume("one")))
            return bench.heard("run one completed")

        async with bench.devices():
            await bench.up(pause_then_resume)
        assert asked[0].startswith("run one pauses when its open round is over")
        assert asked[1] == "run one is queued again"
        assert bench.heard("run one: to be paused when its open round is over")
        assert bench.heard("run one paused: ")
        # The round that was open when it was asked counts, and none is lost or played twice.
        assert [line["outcome"] for line in run.read_metrics()] == ["completed"] * 4
        assert [line["index"] for line in run.read_metrics()] == [1, 2, 3, 4]

    go(scenario())


@pytest.mark.parametrize("what", ["pause", "abort"])
def test_an_open_round_is_abandoned_within_a_second(bench: Bench, what: str):
    """Of a run whose round would wait for devices for a long time."""

    async def scenario() -> None:
        run = bench.queue("one", rounds=4, deadlines=DEADLINES | {"gather_s": 600.0})
        other, asked = bench.queue("two"), []

        def ask() -> bool:
            if not asked and run.store.opened() is not None:
                operate(
                    bench,
                    lambda operator: (
                        operator.pause("one", now=True)
                        if what == "pause"
                        else operator.abort("one")
                    ),
                )
                asked.append(time.monotonic())
            if len(asked) == 1 and run.state().status in ("paused", "aborted"):
                asked.append(time.monotonic())
            return len(asked) == 2

        await bench.up(ask)
        assert asked[1] - asked[0] < 5
        state = run.state()
        assert state.status == ("paused" if what == "pause" else "aborted")
        assert (state.rounds_done, state.rounds_abandoned) == (1, 1)
        assert run.read_metrics()[0]["reason"] == f"the run was {state.status}"
        assert run.store.opened() is None or run.store.opened().run == "two"  # type: ignore[union-attr]
        assert other.state().status in ("queued", "running")  # its turn

    go(scenario())


def test_a_run_that_waits_for_the_broker_is_paused_all_the_same(bench: Bench):
    async def scenario() -> None:
        run, asked = bench.queue("one"), []
        await bench.network.go_down()

        def ask() -> bool:
            if not asked and run.state().status == "running":
                asked.append(operate(bench, lambda operator: operator.pause("one", now=False)))
            return run.state().status == "paused"

        await bench.up(ask)
        assert run.state().rounds_done == 0

    go(scenario())


def test_devices_are_told_of_a_round_whose_run_was_stopped_meanwhile(bench: Bench):
    async def scenario() -> None:
        run = bench.queue("one", rounds=2, deadlines=DEADLINES | {"gather_s": 600.0})
        await bench.up(lambda: run.store.opened() is not None)
        opened = run.store.opened()
        assert opened is not None
        with Operator(bench.path) as operator:
            assert operator.alone
            assert operator.abort("one") == "run one is aborted"
        before = len(bench.network.log)
        await bench.up(lambda: run.store.opened() is None)
        told = [
            wire.decode(payload).message
            for _, topic, payload in bench.network.log[before:]
            if topic.endswith("/all") and payload
        ]
        assert [(m.round, m.reason) for m in told if isinstance(m, RoundAbandoned)] == [
            (opened.round, "its run is aborted")
        ]
        assert run.state().status == "aborted"

    go(scenario())


def test_a_run_that_was_taken_back_goes_on_from_there(bench: Bench):
    async def scenario() -> None:
        run = bench.queue("one", rounds=3)
        async with bench.devices():
            await bench.up(lambda: bench.heard("run one completed"))
            with Operator(bench.path) as operator:
                operator.roll_back("one", 1, 0.0)
                operator.resume("one")
            bench.said.clear()
            await bench.up(lambda: bench.heard("run one completed"))
        assert bench.heard("run one: 2 rounds to go")
        lines = run.read_metrics()
        assert [line["index"] for line in lines] == [1, 2, 3]
        assert [line["round"] for line in lines] == [1, 4, 5]
        # Devices contributed to this model before; they do again, under a higher revision.
        assert lines[1]["model"] == lines[0]["next_model"]
        assert [line["revision"] for line in lines] == [0, 1, 0]
        assert all(line["survivors"] == 3 for line in lines)

    go(scenario())


def test_a_run_that_failed_can_be_resumed_once_it_is_mended(bench: Bench):
    async def scenario() -> None:
        run = bench.queue("one")
        text = (run.path / "run.toml").read_text()
        (run.path / "run.toml").write_text(text + "\n[wrok]\n")

        def mend() -> bool:
            if run.state().status == "failed":
                (run.path / "run.toml").write_text(text)
                operate(bench, lambda operator: operator.resume("one"))
            return bench.heard("run one completed")

        async with bench.devices():
            await bench.up(mend)

    go(scenario())


def test_a_run_that_cannot_be_played_fails_and_the_next_one_is_played(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its files were all right when it was queued; much can happen until its turn."""

    async def scenario() -> None:
        test_set = tmp_path / "test.npz"
        features, labels = np.zeros((4, 1, 8, 8), np.float32), np.zeros(4, np.int64)
        np.savez(test_set, features=features, labels=labels)
        gone = bench.queue("a-gone", evaluation={"file": str(test_set)})
        typo = bench.queue("b-typo")
        bug = bench.queue("d-bug")
        fine = bench.queue("e-fine")
        test_set.unlink()
        with (typo.path / "run.toml").open("a") as file:
            file.write("\n[wrok]\n")
        real = service.CoordinatorService.play

        async def play(self: Any, run: Any, **more: Any) -> Any:
            if run.directory.name == "d-bug":
                raise ZeroDivisionError("a bug")
            return await real(self, run, **more)

        monkeypatch.setattr(service.CoordinatorService, "play", play)
        async with bench.devices():
            await bench.up(lambda: bench.heard("run e-fine completed"))
        assert gone.state().status == "failed"
        assert gone.state().message == (
            f"evaluation set {test_set} cannot be read: No such file or directory"
        )
        assert "unknown key `wrok`; did you mean `work`?" in typo.state().message
        assert bug.state().message == "unexpected ZeroDivisionError: a bug"
        assert fine.state().status == "completed"

    go(scenario())


def test_a_device_damaged_meanwhile_keeps_nobody_from_playing(bench: Bench):
    async def scenario() -> None:
        bench.queue("first")
        run, damaged = bench.queue("one"), []

        def damage_then_wait() -> bool:
            if not damaged and bench.heard("waiting for devices"):
                certificate = bench.path / "devices" / "pi-9" / "certificate"
                certificate.parent.mkdir()
                certificate.write_bytes(b"garbage")
                damaged.append(certificate)
            return bench.heard("run one completed")

        async with bench.devices():
            await bench.up(damage_then_wait)
        assert run.state().status == "completed"
        assert bench.heard("devices added since the last run are not pinned: ")
        with pytest.raises(ConfigError, match="add the device anew"):  # nor is it passed over
            await bench.up(lambda: False)

    go(scenario())


def test_one_at_a_time(bench: Bench):
    async def scenario() -> None:
        async def second() -> None:
            await Daemon(bench.fleet, bench.said.append).serve(asyncio.Event())

        with (
            only_one(bench.path),
            pytest.raises(ConfigError, match=r"another `covey up` runs in .*; stop it first"),
        ):
            await second()

    go(scenario())


def test_a_lock_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(StorageError, match=r"cannot write .*\.lock: "), only_one(tmp_path / "none"):
        pass


# -- the broker ------------------------------------------------------------------------------------


# -- what is checked before a run is queued --------------------------------------------------------


def archive(tmp_path: Path, **arrays: Any) -> Path:
    path = tmp_path / "test.npz"
    np.savez(path, **arrays)
    return path


IMAGES, LABELS = np.zeros((4, 1, 8, 8), np.float32), np.array([0, 3, 9, 1], np.int64)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"features": IMAGES}, "has no array 'labels'; it has ['features']"),
        ({"features": IMAGES, "labels": LABELS[:3]}, "4 features but 3 labels"),
        ({"features": IMAGES[:, 0], "labels": LABELS}, "the plan wants float32[batch, 1, 8, 8]"),
        ({"features": IMAGES.astype(np.float64), "labels": LABELS}, "the plan wants float32"),
        ({"features": IMAGES, "labels": LABELS.astype(np.int32)}, "the plan wants int64[batch]"),
        ({"features": IMAGES, "labels": LABELS + 1}, "labels range from 1 to 10"),
        ({"features": IMAGES, "labels": LABELS - 1}, "the plan has classes 0 to 9"),
        ({"features": IMAGES + np.float32("nan"), "labels": LABELS}, "not all features are finite"),
        ({"features": IMAGES[:0], "labels": LABELS[:0]}, "the batch is empty"),
    ],
)
def test_a_test_set_that_does_not_fit_is_refused_at_once(
    bench: Bench, tmp_path: Path, arrays: dict[str, Any], problem: str
):
    path = archive(tmp_path, **arrays)
    with pytest.raises(DataError) as caught:
        bench.queue("one", evaluation={"file": str(path)})
    assert str(caught.value).startswith(f"evaluation set {path}")
    assert problem in str(caught.value)
    assert not (bench.path / "runs" / "one").exists()


@pytest.mark.parametrize("data", [b"", b"text", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04."])
def test_a_test_set_that_is_none(tmp_path: Path, data: bytes):
    path = tmp_path / "test.npz"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"evaluation set {path}"):
        load_held_out(path, EvaluationConfig(file=str(path)))
    np.save(tmp_path / "test.npy", IMAGES)
    with pytest.raises(DataError, match=r"is no \.npz archive"):
        load_held_out(tmp_path / "test.npy", EvaluationConfig(file="x"))


def test_arrays_of_other_names_can_be_named(tmp_path: Path):
    path = archive(tmp_path, x=IMAGES, y=LABELS)
    read = load_held_out(path, EvaluationConfig(file="x", features="x", labels="y"))
    assert read.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("plan.json", r"plan\.json: plan header"),
        ("train.onnx", r"train\.onnx: bytes do not match"),
        ("initial.bin", r"initial\.bin: "),
    ],
)
def test_a_damaged_plan_is_refused_at_once(bench: Bench, tmp_path: Path, file: str, problem: str):
    copy = tmp_path / "plan"
    copy.mkdir()
    for path in PLAN.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / file).write_bytes(b"damaged")
    with pytest.raises(MalformedError, match=problem):
        bench.queue("one", plan=str(copy))
    (copy / file).unlink()
    with pytest.raises(StorageError, match=f"cannot read {copy / file}: No such file"):
        bench.queue("one", plan=str(copy))
    assert not (bench.path / "runs" / "one").exists()


def test_a_plan_whose_graphs_do_not_run_is_refused_at_once(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its digests are right; the rules for graphs tell."""
    graph = b"no graph at all"
    header = msgspec.structs.replace(
        load_bundle(PLAN).header,
        train=GraphRef(sha256=hashlib.sha256(graph).hexdigest(), size=len(graph)),
    )
    copy = tmp_path / "plan"
    copy.mkdir()
    for path in PLAN.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "train.onnx").write_bytes(graph)
    (copy / "plan.json").write_bytes(encode_header(header))
    with pytest.raises(MalformedError, match=r"devices would refuse it: train\.onnx"):
        bench.queue("one", plan=str(copy))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lr": float("nan")}, "the command line: key `work.hyper.lr` is nan"),
        ({"rounds": 0}, "the command line: key `rounds` is 0; it must be"),
        ({"goal": 2}, "`cohort.minimum` is 3, above `cohort.goal` (2)"),
    ],
)
def test_options_are_checked_like_keys(bench: Bench, options: dict[str, Any], problem: str):
    with pytest.raises(CoveyError) as caught:
        queue_run(bench.path, PLAN, "one", options)
    assert problem in str(caught.value)


def test_options_override_the_file_and_paths_are_relative_to_it(bench: Bench, tmp_path: Path):
    np.savez(tmp_path / "test.npz", features=IMAGES, labels=LABELS)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "plan").symlink_to(PLAN)
    file = tmp_path / "here" / "run.toml"
    table = {"plan": "plan", "rounds": 9, "evaluation": {"file": "../test.npz"}}
    file.write_text(tomli_w.dumps(table))
    run = queue_run(bench.path, file, "one", {"rounds": 3, "lr": 0.5, "goal": None})
    config, loaded = daemon.load_run(run)
    assert (config.rounds, config.work.hyper, config.cohort.goal) == (3, {"lr": 0.5}, 3)
    assert loaded.rounds_left == 3


def test_runs_without_a_name_get_one_of_their_own(bench: Bench):
    names = {queue_run(bench.path, PLAN, None, {}).name for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith("20") for name in names)
