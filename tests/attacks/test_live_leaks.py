"""Nothing leaves by the side door: no lookup, no connection but to the broker, no file outside the state.

The whole fleet runs in an empty network namespace, without what would keep onnxruntime from sending telemetry
by itself (`CI`, `ORT_DISABLE_TELEMETRY`), under strace. Attempts count: nothing can succeed there.
"""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from alone import Traces, alone, namespaced
from covey_coordinator.broker import mosquitto
from covey_coordinator.config import BrokerConfig
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.store import FILE, Store
from memory_fleet import PLAN
from prerequisites import missing

PORT = 21883

HARMLESS = {"/dev/null", "/dev/tty"}


@pytest.fixture(scope="module")
def unshare() -> list[str]:
    """The command that makes an empty network."""
    for program in ("strace", "unshare", "pkill"):
        if shutil.which(program) is None:
            missing(f"{program} is not installed: apt install strace util-linux procps")
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")
    if (found := namespaced()) is None:
        missing("the kernel lets nobody make a network namespace")
    return found


def make(directory: Path, rounds: int) -> None:
    """A local fleet of three, with a broker of its own, and a run whose models are evaluated."""
    broker = BrokerConfig(kind="mosquitto", port=PORT)
    fleet = FleetDirectory.create(directory / "farm", "farm", broker)
    rng = np.random.default_rng(0)
    for i in range(3):
        features = rng.random((64, 1, 8, 8)).astype(np.float32)
        np.savez(directory / f"{i}.npz", features=features, labels=rng.integers(0, 10, 64))
        made = fleet.add_device(f"pi-{i}", days=1, data=directory / f"{i}.npz")
        # However busy the machine is that the tests run on.
        (made / "policy.toml").write_text(
            "[host]\ncpu_pressure = 0\nmemory_pressure = 0\nio_pressure = 0\n"
        )
    table = {
        "plan": str(PLAN),
        "rounds": rounds,
        "cohort": {"goal": 3},
        "work": {"batches": 2},
        "deadlines": {"gather_s": 60.0, "share_s": 60.0, "unmask_s": 60.0, "resend_s": 1.0},
        "evaluation": {"file": str(directory / "0.npz")},
    }
    (directory / "run.toml").write_text(tomli_w.dumps(table))


@pytest.fixture(scope="module")
def played(unshare: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet that has played a round, alone."""
    directory = tmp_path_factory.mktemp("alone")
    make(directory, 1)
    alone(unshare, directory)
    with Store.open(directory / "farm" / FILE) as store:
        state = store.run("alone")
        assert (state.status, state.rounds_completed) == ("completed", 1)
        assert all("test_loss" in line for line in store.rounds("alone")), "nothing was evaluated"
    return directory


def outside(written: set[str], *inside: Path) -> set[str]:
    """What was written that is not below any of these."""
    below = tuple(f"{path}{os.sep}" for path in inside)
    return {
        path
        for path in written - HARMLESS - set(map(str, inside))
        if not path.startswith((*below, "/proc/", "/dev/shm/sem."))
    }


@pytest.mark.parametrize("name", ["device", "coordinator", "follower", "prediction"])
def test_nobody_is_spoken_to_but_the_broker(played: Path, name: str):
    traces = Traces(played, name)
    addresses = {peer for peer in traces.peers() if not peer.startswith("/")}
    assert addresses == ({f"127.0.0.1:{PORT}"} if name in ("device", "coordinator") else set())
    assert "/etc/resolv.conf" not in traces.opened(), "a name was to be looked up"


@pytest.mark.parametrize("name", ["device", "coordinator", "follower", "prediction"])
def test_nothing_is_written_outside_the_state_directory(played: Path, name: str):
    inside = played / "farm"
    if name in ("device", "prediction"):
        inside = inside / "devices" / "pi-0"
    written = Traces(played, name).written()
    if name == "coordinator":
        # mosquitto_passwd hashes the passwords of a local fleet in a file of its own, and removes it.
        written = {path for path in written if not re.fullmatch("/tmp/[A-Za-z0-9_-]{30}", path)}
    assert outside(written, inside) == set()
    assert list((played / "home").rglob("*")) == []


def test_the_traces_see_what_there_is_to_see(played: Path):
    """Or the tests above would hold of empty files."""
    device, coordinator = Traces(played, "device"), Traces(played, "coordinator")
    state = played / "farm" / "devices" / "pi-0" / "state"
    assert any(path.startswith(f"{state}/") for path in device.written())
    assert any(path.endswith("/covey.db") for path in coordinator.written())
    assert any(path.endswith("/mosquitto.conf") for path in coordinator.opened())
    for traces in (device, coordinator, Traces(played, "prediction")):
        assert any("onnxruntime" in path for path in traces.opened())
    assert any("covey_device/trial" in path for path in device.opened()), "no plan was tried"


def test_telemetry_that_is_left_on_is_found(unshare: list[str], tmp_path: Path):
    """The same, but that onnxruntime is imported before the setting stands: it keeps a device id."""
    make(tmp_path, 1)
    alone(unshare, tmp_path, before="import onnxruntime")
    inside = {"device": tmp_path / "farm" / "devices" / "pi-0", "coordinator": tmp_path / "farm"}
    for name, directory in inside.items():
        traces = outside(Traces(tmp_path, name).written(), directory)
        assert any("/.onnxruntime/" in path for path in traces), (
            f"onnxruntime has stopped doing this in the {name}: drop the control"
        )
