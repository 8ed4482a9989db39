"""`covey-device doctor` on a device's own files, its broker and its plan."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from covey_coordinator.broker import RunningBroker, mosquitto, start_networked_broker
from covey_coordinator.config import BrokerConfig, load_fleet
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.kept_broker import access_of
from covey_device import trials
from covey_device.config import LimitsConfig
from covey_device.doctor import enrolled, estimate, network
from covey_device.doctor.enrolled import Enrolled, may
from covey_device.doctor.estimate import Estimate, cached_plan, estimated, judge, plan_at
from covey_device.doctor.findings import Finding
from covey_device.doctor.machine import Account, Machine, account_of
from covey_device.doctor.round import Round
from covey_device.keystore import MemoryFile
from covey_device.session import Memory
from covey_shared.errors import ConfigError, DataError, TrainingError
from covey_shared.fixedpoint import Encoding
from covey_shared.mqtt import MqttTransport
from covey_shared.plan import decode_header
from doctor_roots import account, machine, meminfo, plant
from enrolment_lab import Lab
from prerequisites import missing

MLP = Path(str(files("covey_fleet"))) / "plans" / "mlp"
HERE = Machine()
DAY_S = 86_400
NOBODY = Account("nobody-else", 54_321, frozenset({54_321}))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A device's directory, as `covey device add` makes it."""
    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", BrokerConfig())
    features = np.random.default_rng(0).random((40, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", features=features, labels=np.arange(40) % 10)
    return fleet.add_device("pi-1", days=30, data=tmp_path / "data.npz")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab") / "fleet") as lab:
        yield lab


def loaded(home: Path, here: Machine = HERE) -> Enrolled:
    finding, found = enrolled.load(home / "device.toml", here)
    assert found is not None, finding
    return found


def change(home: Path, **tables: dict[str, object] | None) -> None:
    """Edit device.toml."""
    table = tomllib.loads((home / "device.toml").read_text())
    for name, changes in tables.items():
        if changes is None:
            del table[name]
        else:
            table[name] = (table.get(name, {}) | changes) if "kind" not in changes else changes
    (home / "device.toml").write_text(tomli_w.dumps(table))


def ill(finding: Finding, says: str, fix: str) -> None:
    assert finding.verdict == "problem", finding
    assert says in finding.says
    assert fix in finding.fix


# -- configuration, policy -----------------------------------------------------------------------


def test_before_joining_the_machine_is_all_there_is(tmp_path: Path):
    finding, found = enrolled.load(tmp_path / "etc" / "device.toml", HERE)
    assert found is None
    assert finding.verdict == "note"
    assert "has not joined a fleet" in finding.says
    assert finding.fix.startswith("covey-device join TOKEN")


def test_a_configuration_that_cannot_be_used(home: Path):
    (home / "device.toml").write_text("fleet = 3\n")
    finding, found = enrolled.load(home / "device.toml", HERE)
    assert found is None
    ill(finding, "device.toml", "docs/configuration.md")


def test_a_sound_configuration(home: Path):
    finding, found = enrolled.load(home / "device.toml", HERE)
    assert finding.line() == (
        f"ok       configuration: {home / 'device.toml'}: device pi-1 of fleet farm"
    )
    assert found is not None
    assert found.service.uid == (home / "identity.key").stat().st_uid


def test_the_services_user_is_the_units(home: Path, tmp_path: Path):
    root = plant(
        tmp_path / "root",
        {"etc/systemd/system/covey-device.service": "[Service]\nUser=covey-device\n"},
    )
    here = machine(root, account=account("covey-device", 54_321, 54_321))
    assert loaded(home, here).service.name == "covey-device"
    # A unit for a user whom this system does not know: whoever owns the key.
    assert loaded(home, machine(root)).service == account_of(os.geteuid())


def test_a_policy(home: Path):
    finding, found = enrolled.policy(loaded(home), HERE)
    assert finding.line() == ("ok       policy: the defaults: sums of at least 3 devices, 400 MB")
    assert found is not None
    (home / "policy.toml").write_text("min_cohort = 5\n")
    (home / "policy.toml").chmod(0o644)
    assert enrolled.policy(loaded(home), HERE)[0].says.startswith(f"{home / 'policy.toml'}: sums")
    (home / "policy.toml").chmod(0o666)
    ill(enrolled.policy(loaded(home), HERE)[0], "others may write", "sudo chmod go-w")
    (home / "policy.toml").write_text("min_cohorts = 5\n")
    ill(enrolled.policy(loaded(home), HERE)[0], "min_cohorts", "docs/policy.md")


def test_files_that_the_service_may_not_read(home: Path):
    device = replace(loaded(home), service=NOBODY)
    (home / "policy.toml").write_text("min_cohort = 5\n")
    (home / "policy.toml").chmod(0o600)
    found, _ = enrolled.policy(device, HERE)
    ill(found, "the service's user nobody-else may not read", "sudo chgrp nobody-else")
    ill(enrolled.keys(device), "cannot read it", "sudo chown nobody-else")
    (home / "state").mkdir(exist_ok=True)
    ill(enrolled.state(device)[0], "cannot write there", "sudo chown -R nobody-else: ")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that everybody may look into, all the way down; pytest's own are closed."""
    folder = Path(tempfile.mkdtemp(prefix="covey-doctor-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_who_may_do_what_goes_by_modes(open_folder: Path):
    file = open_folder / "file"
    file.write_text("x")
    ours = file.stat()
    other = Account("other", ours.st_uid + 1, frozenset({ours.st_gid + 1}))
    member = Account("member", ours.st_uid + 1, frozenset({ours.st_gid}))
    for who, mode, wanted, allowed in (
        (other, 0o660, os.R_OK, False),
        (other, 0o664, os.R_OK, True),
        (other, 0o664, os.W_OK, False),
        (member, 0o640, os.R_OK, True),
        (member, 0o640, os.W_OK, False),
        (member, 0o606, os.R_OK, False),  # a group that may not, though all others may
        (account_of(os.geteuid()), 0o600, os.R_OK | os.W_OK, True),
    ):
        file.chmod(mode)
        assert may(who, file, wanted) is allowed, (who, oct(mode))
    file.chmod(0o777)
    (open_folder / "closed").mkdir(mode=0o700)
    inner = open_folder / "closed" / "inner"
    inner.write_text("x")
    inner.chmod(0o777)
    assert may(other, inner, os.R_OK) is False
    assert may(Account("root", 0, frozenset()), inner, os.R_OK)
    with pytest.raises(FileNotFoundError):
        may(other, open_folder / "gone", os.R_OK)


# -- keys, certificates, state -------------------------------------------------------------------


def test_keys(home: Path):
    device = loaded(home)
    assert enrolled.keys(device).verdict == "ok"
    (home / "identity.key").chmod(0o640)
    ill(enrolled.keys(device), "can be read by others (mode 0640)", "sudo chmod 600 ")
    (home / "identity.key").unlink()
    ill(enrolled.keys(device), "does not exist", "covey-device join --force")


def test_a_password_that_others_can_read(home: Path):
    (home / "password").write_text("hunter2\n")
    (home / "password").chmod(0o644)
    change(home, broker={"password_file": "password", "username": "me"})
    finding = enrolled.keys(loaded(home))
    ill(finding, "broker password", "sudo chmod 600 ")
    assert "hunter2" not in finding.line()


@pytest.mark.parametrize(
    ("days", "verdict", "says", "fix"),
    [
        (0, "ok", "identity until 20", ""),
        (20, "note", "it is not renewed by itself", "covey device add"),
        (31, "problem", "the identity certificate ended on", "covey device add"),
    ],
)
def test_a_certificate_that_nothing_renews(
    home: Path, days: int, verdict: str, says: str, fix: str
):
    finding = enrolled.certificates(loaded(home), time.time() + days * DAY_S)
    assert finding.verdict == verdict
    assert says in finding.says
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("days", "verdict", "says", "fix"),
    [
        (0, "ok", "TLS until 20", ""),
        (70, "note", "its renewal is overdue", "sudo covey-device renew"),
        (91, "problem", "the TLS certificate ended on", "covey-device join --force"),
    ],
)
def test_certificates_of_a_device_that_joined(
    lab: Lab, tmp_path: Path, days: int, verdict: str, says: str, fix: str
):
    name = f"pi-{os.urandom(4).hex()}"
    lab.joined(tmp_path / name, name)
    finding = enrolled.certificates(loaded(tmp_path / name), time.time() + days * DAY_S)
    assert finding.verdict == verdict
    assert says in finding.says
    assert fix in finding.fix
    # A clock that is behind does not hide it: the coordinator's last word counts as well.
    device = replace(loaded(tmp_path / name), signed_unix=time.time() + days * DAY_S)
    assert enrolled.certificates(device, 0.0).verdict == verdict


def test_certificates_that_are_not_this_devices(lab: Lab, tmp_path: Path):
    for name in ("pi-left", "pi-right"):
        lab.joined(tmp_path / name, name)
    left, right = (loaded(tmp_path / name) for name in ("pi-left", "pi-right"))
    shutil.copy(right.base / right.config.certificate, left.base / left.config.certificate)
    ill(enrolled.certificates(left, time.time()), "is for pi-right", "join --force")
    assert left.config.broker.cert_file is not None
    assert right.config.broker.cert_file is not None
    (left.base / left.config.certificate).unlink()
    ill(enrolled.certificates(left, time.time()), "has yet to sign", "ask your operator")
    shutil.copy(
        right.base / right.config.broker.cert_file, left.base / left.config.broker.cert_file
    )
    ill(
        enrolled.certificates(left, time.time()), "is for another name than pi-left", "join --force"
    )


def test_state(home: Path):
    device = loaded(home)
    finding, signed = enrolled.state(device)
    assert (finding.verdict, signed) == ("ok", 0.0)
    assert not device.state.exists()  # looking does not make it
    MemoryFile(device.state).save(Memory(41, signed_unix=1_790_000_000))
    finding, signed = enrolled.state(device)
    assert finding.line() == f"ok       state: {device.state}: last round 41"
    assert signed == 1_790_000_000.0
    device.state.chmod(0o755)
    assert enrolled.state(device)[0].verdict == "note"
    device.state.chmod(0o777)
    ill(enrolled.state(device)[0], "others may write to it", "sudo chmod 700")
    device.state.chmod(0o700)
    (device.state / "memory.json").write_text("{")
    ill(enrolled.state(device)[0], "is damaged", "restore it from a backup")


# -- data ----------------------------------------------------------------------------------------


def data(home: Path, fits: Callable[[], str] | None = None) -> Finding:
    return enrolled.data(loaded(home), HERE, fits)


def test_data_of_every_kind(home: Path):
    finding = data(home)
    assert finding.verdict == "ok"
    assert "readable; no plan to hold it against yet" in finding.says
    (home / "x.npy").write_bytes(b"x")
    change(home, data={"kind": "npy", "features": "x.npy", "labels": "y.npy"})
    ill(data(home), "key data.labels", "put it there, or correct [data]")
    (home / "y.npy").write_bytes(b"")
    ill(data(home), "is empty", "put the examples there")
    change(home, data={"kind": "csv", "file": ".", "labels": "y"})
    ill(data(home), "is a directory", "correct [data]")
    change(home, data={"kind": "python", "function": "mine:load"})
    assert data(home).verdict == "unknown"
    (home / "mine.py").write_text("raise SystemExit('this must not be run')\n")
    assert data(home).says == f"mine:load, in {home / 'mine.py'}; it is not called here"


def test_data_in_shards(home: Path):
    change(home, data={"kind": "shards", "directory": "shards"})
    ill(data(home), "key data.directory", "put it there")
    (home / "shards").mkdir()
    assert data(home).verdict == "note"
    (home / "shards" / "1.npz").write_bytes(bytes(1_000_000))
    (home / "shards" / ".2.npz.tmp").write_bytes(b"x")
    assert data(home).says == f"{home / 'shards'}: 1 shards, 1.0 MB"


def test_data_held_against_a_plan(home: Path):
    assert data(home, lambda: "40 examples").says.endswith("data.npz: 40 examples")

    def refuse() -> str:
        raise DataError("array 'features' has the wrong shape")

    ill(data(home, refuse), "the wrong shape", "docs/data.md")


def test_data_that_the_service_may_not_read(home: Path, tmp_path: Path):
    (tmp_path / "data.npz").chmod(0o600)
    finding = enrolled.data(replace(loaded(home), service=NOBODY), HERE)
    ill(finding, "the service's user nobody-else may not read", "sudo chgrp nobody-else")


# -- whether the service runs --------------------------------------------------------------------


def test_a_service_is_found_by_its_lock_and_not_disturbed(tmp_path: Path):
    assert network.service_runs(HERE, tmp_path) == ("stopped", None)
    memory = MemoryFile(tmp_path)
    with memory.held():
        assert network.service_runs(HERE, tmp_path) == ("running", os.getpid())
        with pytest.raises(ConfigError, match="another covey-device runs"), memory.held():
            pass
    assert network.service_runs(HERE, tmp_path) == ("stopped", None)
    assert network.service_runs(machine(tmp_path / "root"), tmp_path) == ("unknown", None)


def test_a_connection_of_the_service_is_seen():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert network.service_is_connected(os.getpid(), port) is False
        with socket.create_connection(("127.0.0.1", port)):
            assert network.service_is_connected(os.getpid(), port) is True
    assert network.service_is_connected(None, port) is None
    assert network.service_is_connected(2**22 + 1, port) is None


# -- the broker ----------------------------------------------------------------------------------

STOPPED: tuple[network.Running, None] = ("stopped", None)


class Counted:
    """Takes connections, and keeps what each one sends. answer: to the first packet."""

    def __init__(self, answer: bytes = b"\x20\x02\x00\x00") -> None:
        self.heard: list[bytes] = []
        self.answer = answer

    def __enter__(self) -> "Counted":
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                with client, contextlib.suppress(OSError):
                    client.settimeout(10)
                    data = client.recv(1000)
                    self.heard.append(data)
                    if data:
                        client.sendall(self.answer)
                        client.recv(1000)


def at(home: Path, port: int) -> Enrolled:
    change(home, broker={"url": f"mqtt://127.0.0.1:{port}"})
    return loaded(home)


def test_a_broker_that_lets_this_device_in(home: Path):
    with Counted() as server:
        finding = network.broker(at(home, server.port), STOPPED)
    assert finding.verdict == "ok"
    assert re.fullmatch(
        rf"127\.0\.0\.1:{server.port}: connected in \d+ ms, without TLS; it lets this device in",
        finding.says,
    )
    assert b"farm-pi-1-doctor" in server.heard[-1]
    assert server.heard[-1][9] & 0b110 == 0b010  # a clean session, and no will


@pytest.mark.parametrize(
    ("connected", "verdict", "says"),
    [
        (True, "ok", "the running service is connected"),
        (False, "problem", "the running service is not connected"),
        (None, "unknown", "whether the running service is connected"),
    ],
)
def test_nobody_logs_in_while_the_service_runs(
    home: Path, connected: bool | None, verdict: str, says: str
):
    with Counted() as server:
        finding = network.broker(
            at(home, server.port), ("running", 42), connected=lambda pid, port: connected
        )
        assert finding.verdict == verdict
        assert says in finding.says
    assert server.heard in ([], [b""])


def test_nobody_logs_in_where_it_is_not_known_whether_the_service_runs(home: Path):
    with Counted() as server:
        finding = network.broker(at(home, server.port), ("unknown", None))
        assert finding.verdict == "unknown"
        assert "no login" in finding.says
    assert server.heard in ([], [b""])


@pytest.mark.parametrize(
    ("code", "says"),
    [(5, "refuses user"), (4, "refuses user"), (2, "refuses the client id")],
)
def test_a_broker_that_turns_this_device_away(home: Path, code: int, says: str):
    with Counted(bytes((0x20, 2, 0, code))) as server:
        finding = network.broker(at(home, server.port), STOPPED)
    ill(finding, says, "was not revoked")


def test_no_broker(home: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ill(network.broker(at(home, port), STOPPED), "connection refused", "broker.url")
    change(home, broker={"url": "mqtt://no-such-host.invalid"})
    ill(network.broker(loaded(home), STOPPED), "cannot look up the host", "broker.url")


def test_a_broker_that_says_nothing(home: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        finding = network.broker(at(home, port), STOPPED, answer_s=0.3)
    ill(finding, "no answer from 127.0.0.1", "was not revoked")


def test_a_broker_whose_files_are_missing(home: Path):
    change(home, broker={"url": "mqtts://127.0.0.1", "ca_file": "gone.crt"})
    finding = network.broker(loaded(home), STOPPED)
    assert finding.verdict == "unknown"
    assert "gone.crt cannot be read" in finding.says


# -- the broker, over TLS ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running_broker(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")
    access = access_of(lab.fleet, load_fleet(lab.fleet.path))
    folder = tmp_path_factory.mktemp("broker")
    started = asyncio.run(start_networked_broker(folder, access, host="127.0.0.1"))
    yield started
    asyncio.run(started.stop())


def joined(lab: Lab, broker: RunningBroker, folder: Path) -> Enrolled:
    name = f"pi-{os.urandom(4).hex()}"
    lab.joined(folder / name, name)
    change(folder / name, broker={"url": f"mqtts://127.0.0.1:{broker.port}"})
    return loaded(folder / name)


def test_a_real_broker_and_the_enrolment_port(
    lab: Lab, running_broker: RunningBroker, tmp_path: Path
):
    device = joined(lab, running_broker, tmp_path)
    finding = network.broker(device, STOPPED)
    assert finding.verdict == "ok", finding
    assert re.search(r": TLSv1\.3 in \d+ ms; it lets this device in$", finding.says)
    port = network.enrolment_port(device)
    assert port is not None
    assert port.verdict == "ok", port
    assert f"127.0.0.1:{lab.port}: TLSv1.3" in port.says


def test_a_device_without_an_enrolment_port(home: Path):
    assert network.enrolment_port(loaded(home)) is None


def test_an_enrolment_port_that_is_closed_is_no_problem_yet(
    lab: Lab, running_broker: RunningBroker, tmp_path: Path
):
    device = joined(lab, running_broker, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    change(device.base, enrol={"port": port})
    finding = network.enrolment_port(loaded(device.base))
    assert finding is not None
    assert finding.verdict == "note"
    assert finding.says.startswith(f"nobody at 127.0.0.1:{port}: connection refused")


def test_a_running_service_keeps_its_connection(
    lab: Lab, running_broker: RunningBroker, tmp_path: Path
):
    """At this broker a second login with the device's certificate ends the first one's connection."""
    device = joined(lab, running_broker, tmp_path)
    lost: list[str] = []

    async def scenario() -> None:
        from covey_device.assembly import tls_of

        name = device.config.device
        up, again = asyncio.Event(), asyncio.Event()

        def transport() -> MqttTransport:
            return MqttTransport(
                device.config.broker.url, name, tls=tls_of(device.config.broker, device.base)
            )

        async def connected() -> None:
            up.set()

        service = transport()
        await service.start(lambda message: None, connected, lost.append)
        await asyncio.wait_for(up.wait(), 20)
        with MemoryFile(device.state).held():
            running = network.service_runs(HERE, device.state)
            assert running == ("running", os.getpid())
            finding = await asyncio.to_thread(network.broker, device, running)
        assert finding.says.endswith("; the running service is connected"), finding
        # It still is: what it says comes back, with nothing lost in between.
        topic = f"covey/farm/from/{name}"
        await asyncio.wait_for(service.publish(topic, b"x"), 20)
        assert lost == []
        # And this is what a login would have done.
        other = transport()

        async def settled() -> None:
            again.set()

        await other.start(lambda message: None, settled, lambda reason: None)
        await asyncio.wait_for(again.wait(), 20)
        async with asyncio.timeout(20):
            while not lost:
                await asyncio.sleep(0.01)
        await other.stop()
        await service.stop()

    asyncio.run(scenario())


def test_a_revoked_device_is_told(lab: Lab, running_broker: RunningBroker, tmp_path: Path):
    device = joined(lab, running_broker, tmp_path)
    lab.fleet.revoke(device.config.device, now_unix=int(time.time()))
    config = load_fleet(lab.fleet.path)
    assert asyncio.run(running_broker.admit(access_of(lab.fleet, config)))
    for running in (STOPPED, ("running", 42)):
        finding = network.broker(device, running, connected=lambda pid, port: False)
        assert finding.verdict == "problem", running
        assert re.search(r"refuses this device's certificate|closed the connection", finding.says)


# -- the plan ------------------------------------------------------------------------------------

SMALL = Round(batches=4, batch_size=8, peers=10)


def test_a_plan_is_a_directory_or_its_header(tmp_path: Path):
    assert plan_at(MLP).hash == plan_at(MLP / "plan.json").hash
    with pytest.raises(ConfigError, match="--plan takes a plan's directory"):
        plan_at(tmp_path)
    with pytest.raises(ConfigError, match="is not a plan's"):
        plan_at(MLP / "train.onnx")
    shutil.copytree(MLP, tmp_path / "mlp")
    (tmp_path / "mlp" / "train.onnx").write_bytes(b"x")
    with pytest.raises(ConfigError, match="do not match the plan header's digest"):
        plan_at(tmp_path / "mlp")


def test_the_plan_used_last_is_taken_from_the_cache(tmp_path: Path):
    assert cached_plan(tmp_path / "cache") is None
    (tmp_path / "cache").mkdir()
    for turn, name in enumerate(("cnn", "mlp")):
        plan = plan_at(MLP.parent / name)
        for digest, content in (
            (plan.hash, plan.header_bytes),
            (plan.header.train.sha256, plan.graph),
        ):
            (tmp_path / "cache" / digest).write_bytes(content)
            os.utime(tmp_path / "cache" / digest, (10**9 + turn, 10**9 + turn))
    (tmp_path / "cache" / ("0" * 64)).write_bytes(b"{}")  # newer, and no plan
    before = {
        p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "cache").iterdir()
    }
    found = cached_plan(tmp_path / "cache")
    assert found is not None
    assert found.header.name == "digits-mlp"
    # One without its graph, or damaged, is as if it were not there.
    (tmp_path / "cache" / found.header.train.sha256).unlink()
    other = cached_plan(tmp_path / "cache")
    assert other is not None
    assert other.header.name == "digits-cnn"
    (tmp_path / "cache" / other.hash).write_bytes(b"{" + bytes(10))
    assert cached_plan(tmp_path / "cache") is None
    assert set(before) >= {p.name for p in (tmp_path / "cache").iterdir()}


@pytest.fixture(scope="module")
def small() -> Estimate:
    return estimate.estimate(plan_at(MLP), SMALL, LimitsConfig())


def test_an_estimate_has_every_phase_and_the_bytes_of_a_real_round(small: Estimate):
    assert list(small.phases) == list(estimate.PHASES)
    assert all(seconds > 0 for seconds in small.phases.values())
    assert small.seconds == pytest.approx(sum(small.phases.values()))
    payload = Encoding(16, 10, small.n_params, 1.0, 1000, (10.0,)).payload_bytes
    assert payload <= small.up_bytes <= payload + 10 * 100
    assert 4 * small.n_params < small.down_bytes < 4 * small.n_params + 10 * 1000
    assert small.phases["upload"] == pytest.approx(8e-6 * small.up_bytes / 10.0)
    assert small.peak_bytes > small.service_bytes > 20_000_000


def test_an_estimate_grows_with_what_is_asked(small: Estimate):
    more = Round(batches=4000, batch_size=64, peers=128, uplink_mbit=1.0, downlink_mbit=2.0)
    large = estimate.estimate(plan_at(MLP), more, LimitsConfig())
    assert large.phases["upload"] > 9 * small.phases["upload"]
    assert large.phases["fetch"] > 4 * small.phases["fetch"]
    # Measured: by far more than any noise.
    assert large.phases["train"] > small.phases["train"]
    assert large.phases["keys"] > small.phases["keys"]
    assert large.phases["committee"] > small.phases["committee"]


def test_an_estimate_in_words(small: Estimate):
    lines = estimate.in_words(small)
    assert re.fullmatch(
        r"a round of plan 'digits-mlp' [0-9a-f]{12} \(4,810 parameters\) on this machine, 4 batches of "
        r"8, 10 devices:", lines[0],
    )  # fmt: skip
    assert [re.split(r" {2,}", line.strip())[0] for line in lines[1:7]] == [
        *estimate.PHASES.values()
    ]
    assert re.match(r"  together +[\d.]+ s   and the waiting for others$", lines[7])
    assert re.match(r"  memory at its highest +\d+ MB   \d+ MB of it without a plan$", lines[8])


def test_a_round_that_fits(small: Estimate, tmp_path: Path):
    root = plant(tmp_path, {"proc/meminfo": meminfo(4_000_000, 3_000_000)})
    finding = judge(small, LimitsConfig(), machine(root))
    assert finding.verdict == "ok"
    assert re.fullmatch(r"a round of 'digits-mlp' takes [\d.]+ s and \d+ MB here", finding.says)


@pytest.mark.parametrize(
    ("limits", "available_kb", "verdict", "says", "fix"),
    [
        (
            LimitsConfig(max_memory_mb=20),
            3_000_000,
            "problem",
            "gives 20",
            "raise limits.max_memory_mb",
        ),
        (LimitsConfig(), 10_000, "problem", "MB that are available", "free some memory"),
        (
            LimitsConfig(max_seconds=1e-6),
            3_000_000,
            "note",
            "at limits.max_seconds",
            "fewer batches",
        ),
        (LimitsConfig(max_batches=2), 3_000_000, "note", "after 2 batches", "policy.toml"),
    ],
)
def test_a_round_that_does_not_fit(
    small: Estimate,
    tmp_path: Path,
    limits: LimitsConfig,
    available_kb: int,
    verdict: str,
    says: str,
    fix: str,
):
    root = plant(tmp_path, {"proc/meminfo": meminfo(4_000_000, available_kb)})
    finding = judge(small, limits, machine(root))
    assert finding.verdict == verdict
    assert says in finding.says
    assert fix in finding.fix


def test_a_plan_that_its_trial_refuses(monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise TrainingError("plan 'digits-mlp' crashed")

    monkeypatch.setattr(trials, "measure", refuse)
    finding, found = estimated(plan_at(MLP), SMALL, LimitsConfig(), HERE)
    assert found is None
    ill(finding, "crashed", "batch_size")


def test_masking_is_timed_on_a_slice(monkeypatch: pytest.MonkeyPatch):
    """Of the largest model there may be it takes no longer than of a small one."""
    sizes: list[int] = []
    real = Encoding.encode

    def encode(self: Encoding, delta: Any, *rest: Any) -> Any:
        sizes.append(delta.size)
        return real(self, delta, *rest)

    monkeypatch.setattr(Encoding, "encode", encode)
    large = Encoding(16, 100, 1 << 28, 1.0, 1000, (10.0,))
    assert estimate._masking_s(large) > 0
    assert set(sizes) == {estimate.SLICE}


MEASURED = """
import json, sys, time
from pathlib import Path
import numpy as np
from covey_device.footprint import keep_small
keep_small()
import covey_device.assembly
import covey_shared.mqtt.client
from covey_device.trainer import Trainer, Work
from covey_device.data import source_of_arrays
from covey_shared.plan import decode_header
from covey_shared.runtime import TrainStep
from covey_shared import fixedpoint, masking

plan = Path(sys.argv[1])
header = decode_header((plan / "plan.json").read_bytes())
model = np.frombuffer((plan / "initial.bin").read_bytes(), "<f4").astype(np.float32)
source = source_of_arrays(np.ones((64, *header.features.shape), np.float32), np.arange(64) % 10, header)
trainer = Trainer(TrainStep(header, (plan / "train.onnx").read_bytes()), source, header)
work = Work(4, 8, 60.0, 10**9)
result = trainer.train(model, work, clock=time.monotonic, rng=np.random.default_rng(0))
encoding = fixedpoint.Encoding(16, 10, header.n_params, 1.0, 1000, (10.0,))
ring = encoding.encode(result.delta, result.examples, (1.0,), lambda n: bytes(n))
masking.add_masks(ring, [bytes([i]) * 32 for i in range(5)], [bytes([i]) * 32 for i in range(5, 10)])
payload = fixedpoint.pack(ring, encoding.bits)
status = open("/proc/self/status").read()
peak = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
print(json.dumps({"peak": peak, "payload": len(payload)}))
"""


def test_an_estimate_is_of_the_size_of_what_a_round_takes(small: Estimate):
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, MLP],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["payload"] <= small.up_bytes
    assert found["peak"] / 2 < small.peak_bytes < found["peak"] * 2


def test_the_shipped_plan_is_what_this_file_thinks():
    assert decode_header((MLP / "plan.json").read_bytes()).n_params == 4810
