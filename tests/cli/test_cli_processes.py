"""Everything by hand, as a newcomer does it: `covey up`, `covey run`, `covey-device run` as processes.

Bounded waits, and no process outlives its test.
"""

import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import tomli_w

from brokers import missing
from covey_coordinator.broker import embedded
from covey_coordinator.store import FILE, RunDirectory, Store
from memory_fleet import PLAN
from processes import COVEY, COVEY_DEVICE, Child, covey, free_port, wait


def make_fleet(tmp_path: Path, n: int) -> None:
    """A fleet in tmp_path/farm with n devices, and a run.toml that does not wait long."""
    port = free_port()
    made = covey(
        tmp_path, "init", "farm", "--broker", "embedded", "--port", port, "--fleet", "farm"
    )
    assert made.returncode == 0, made.stderr
    rng = np.random.default_rng(0)
    for i in range(n):
        features = rng.random((64, 1, 8, 8)).astype(np.float32)
        np.savez(tmp_path / f"{i}.npz", features=features, labels=rng.integers(0, 10, 64))
        added = covey(
            tmp_path, "device", "add", f"pi-{i}", "--data", f"{i}.npz", "--fleet-dir", "farm"
        )
        assert added.returncode == 0, added.stderr
    table = {
        "plan": str(PLAN),
        "rounds": 2,
        "work": {"batches": 2},
        "deadlines": {"gather_s": 20.0, "absent_grace_s": 0.5, "resend_s": 1.0},
        "evaluation": {"file": "0.npz"},
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(table))


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """With the embedded broker, which is everywhere where the tests are."""
    if not embedded.available():
        missing("amqtt is not installed: pip install 'covey[demo]'")
    make_fleet(tmp_path, 3)
    return tmp_path


def up(start: Callable[..., Child]) -> Child:
    child = start(COVEY, "up", "--fleet-dir", "farm")
    child.until(r"^\d\d:\d\d:\d\d fleet farm: broker embedded [\d.]+, mqtt://127\.0\.0\.1:\d+$")
    child.until("waiting for devices and runs; Ctrl-C stops$")
    return child


def device(start: Callable[..., Child], i: int) -> Child:
    return start(COVEY_DEVICE, "run", "--config", f"farm/devices/pi-{i}/device.toml")


def test_from_an_empty_directory_to_a_model_and_on_after_a_stop(
    fleet: Path, start: Callable[..., Child]
):
    # Queued before anything runs.
    queued = covey(fleet, "run", "run.toml", "--name", "early", "--detach", "--fleet-dir", "farm")
    assert queued.stdout.splitlines() == [
        "run early queued",
        "`covey up` does not run for this fleet: start it in another terminal",
    ]
    coordinator = up(start)
    coordinator.until("run early: 2 rounds to go$")
    devices = [device(start, i) for i in range(3)]
    for i, child in enumerate(devices):
        child.until(
            rf"^\d\d:\d\d:\d\d pi-{i} of fleet farm: broker mqtt://127\.0\.0\.1:\d+; Ctrl-C stops$"
        )
        child.until(rf"pi-{i}: connected$")
    coordinator.until("run early completed: 2 rounds completed, 0 abandoned$")

    # A second `covey up` has no business here.
    second = covey(fleet, "up", "--fleet-dir", "farm")
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == "covey: another `covey up` runs in farm; stop it first\n"

    # Followed from another terminal.
    run = start(COVEY, "run", "run.toml", "--name", "followed", "--fleet-dir", "farm")
    assert run.wait() == 0, run.text
    assert run.lines[0] == "run followed queued"
    for number, line in enumerate(run.lines[1:3], 1):
        assert re.fullmatch(
            rf"round   {number}  +[\d.]+ s  3/3 devices  192 examples  training loss \d\.\d{{4}}  "
            r"test accuracy \d\.\d{4}",
            line,
        ), line
    assert run.lines[3:] == [
        "run followed completed: 2 rounds completed, 0 abandoned",
        "model: farm/runs/followed/model.onnx",
        "metrics: farm/runs/followed/metrics.jsonl",
    ]

    status = covey(fleet, "status", "--fleet-dir", "farm").stdout
    assert "online: pi-0, pi-1, pi-2\n" in status
    assert re.search(r"coordinator: running, connected to broker embedded ", status)
    assert re.search(r"followed +completed +2 +2 +0", status)
    listed = covey(fleet, "device", "list", "--fleet-dir", "farm").stdout
    assert re.search(r"pi-2 +yes +active +20\d\d-\d\d-\d\d", listed)

    # Stopped in the middle of a round, gone on with by another process.
    again = covey(
        fleet,
        "run",
        "run.toml",
        "--name",
        "long",
        "--rounds",
        "6",
        "--detach",
        "--fleet-dir",
        "farm",
    )
    assert again.stdout.splitlines() == ["run long queued"]
    coordinator.until(r"run long: round   2 .* devices")
    assert coordinator.end(signal.SIGINT) == 0
    assert coordinator.lines[-1].endswith("run long: stopped; the next `covey up` goes on with it")
    store = Store.open(fleet / "farm" / FILE)
    directory = RunDirectory(fleet / "farm" / "runs" / "long", store)
    called = store.opened() is not None and bool(store.entries())
    assert directory.state().status == "running"
    assert 2 <= directory.state().rounds_done < 6
    interrupted = covey(fleet, "status", "--fleet-dir", "farm").stdout
    assert "coordinator: not running (covey up)" in interrupted
    assert re.search(r"long +interrupted ", interrupted)
    devices[0].until(r"pi-0: (no broker at|connection lost|the broker).*; next try in \d")
    coordinator = up(start)
    coordinator.until("run long completed: 6 rounds completed, 0 abandoned$")
    goes_on = re.search(r"run long: its open round goes on \([a-z]+\)", coordinator.text)
    assert (goes_on is not None) == called
    assert [line["index"] for line in directory.read_metrics()] == [1, 2, 3, 4, 5, 6]

    # Everything ends when it is asked to.
    assert [child.end() for child in devices] == [0, 0, 0]
    assert all(child.lines[-1].endswith(": stopped") for child in devices)
    assert coordinator.end() == 0
    assert not (fleet / "farm" / "status.json").exists()


def test_killed_and_started_again_it_goes_on_by_itself(fleet: Path, start: Callable[..., Child]):
    # The broker dies with it, and devices come back to the next one when they try again.
    text = (fleet / "run.toml").read_text().replace("gather_s = 20.0", "gather_s = 50.0")
    (fleet / "run.toml").write_text(text.replace("absent_grace_s = 0.5", "absent_grace_s = 20.0"))
    queued = covey(
        fleet, "run", "run.toml", "--name", "long", "--rounds", 3, "--detach", "--fleet-dir", "farm"
    )
    assert queued.returncode == 0
    devices = [device(start, i) for i in range(3)]
    with Store.open(fleet / "farm" / FILE) as store:
        directory = RunDirectory(fleet / "farm" / "runs" / "long", store)
        for phase, done in (("gather", 0), ("collect", 1)):
            coordinator = up(start)
            # What it took of the processor: the clock tells of other tests as well.
            spent = psutil.Process(coordinator.pid).cpu_times()
            assert spent.user + spent.system < 2

            def reached(phase: str = phase, done: int = done) -> bool:
                now, opened = directory.progress(), store.opened()
                over = store.run("long").rounds_done
                here = now is not None and opened is not None and now.round == opened.round
                return over > done or (
                    here and over == done and now is not None and now.phase == phase
                )

            wait(reached)
            coordinator.kill()
        before = store.rounds("long")
        coordinator = up(start)
        coordinator.until("run long completed: ")
        after = store.rounds("long")
        assert after[: len(before)] == before
        assert [line["index"] for line in after] == [1, 2, 3]
        assert all(line["outcome"] == "completed" for line in after), after
        assert directory.read_metrics() == after
        assert store.opened() is None
    for child in [coordinator, *devices]:
        assert child.end() == 0


def test_a_device_without_a_broker_keeps_trying_and_stops_at_once(
    fleet: Path, start: Callable[..., Child]
):
    child = device(start, 1)
    child.until(r"(?s)(pi-1: no broker at 127\.0\.0\.1:\d+: .*next try in [\d.]+ s.*){3}")
    assert "pi-1: memory: at most " in child.lines[1]
    for line in child.lines[2:]:
        assert re.fullmatch(
            r"\d\d:\d\d:\d\d pi-1: no broker at 127\.0\.0\.1:\d+: connection refused; is it running\?; "
            r"next try in [\d.]+ s",
            line,
        ), line
    assert child.end() == 0
    assert child.lines[-1].endswith("pi-1: stopped")


def test_a_port_that_is_taken_is_told(fleet: Path):
    text = (fleet / "farm" / "covey.toml").read_text()
    match = re.search(r"port = (\d+)", text)
    assert match is not None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(match[1])))
        taken.listen()
        done = covey(fleet, "up", "--fleet-dir", "farm")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"port {match[1]} on 127.0.0.1 is taken" in done.stderr


def test_a_broker_that_is_killed_is_started_again(fleet: Path, start: Callable[..., Child]):
    coordinator = up(start)
    child = device(start, 0)
    child.until("pi-0: connected$")
    (broker,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "covey_coordinator.broker" in " ".join(process.info["cmdline"] or ())
        and str(fleet) in " ".join(process.info["cmdline"])
    ]
    broker.kill()
    coordinator.until("the broker ended .*; starting it again")
    child.until(r"(?s)pi-0: connected\n.*pi-0: connected$")
    assert child.end() == 0
    assert coordinator.end() == 0
