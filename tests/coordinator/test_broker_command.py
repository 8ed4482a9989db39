"""`covey broker config`: what it writes is what mosquitto runs on another machine."""

import os
import re
import ssl
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from covey_coordinator import pki
from covey_coordinator.broker import mosquitto, running
from covey_coordinator.broker.access import access_control
from covey_coordinator.cli import main
from covey_coordinator.config import BrokerConfig, load_fleet
from covey_coordinator.devices import DeviceRecord, Grant
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.kept_broker import tls_of
from covey_shared.messages import DeviceId
from covey_shared.topics import Topics
from prerequisites import missing
from raw_mqtt import RawClient, TurnedAwayError

FILES = {"mosquitto.conf", "covey.acl", "ca.crt", "crl.pem", "server.crt", "server.key"}


@pytest.fixture
def port() -> int:
    return running._free_port()


@pytest.fixture
def fleet(tmp_path: Path, port: int) -> FleetDirectory:
    """At an external broker, which is this machine's."""
    broker = BrokerConfig(kind="external", url=f"mqtts://127.0.0.1:{port}")
    return FleetDirectory.create(tmp_path / "fleet", "farm", broker, addresses=("c.lan",))


def config(fleet: FleetDirectory, output: Path, *options: str, status: int = 0) -> str:
    done = CliRunner().invoke(
        main,
        ["broker", "config", "--fleet-dir", str(fleet.path), "--output", str(output), *options],
    )
    assert done.exit_code == status, done.output
    return done.output


@contextmanager
def running_there(installed: Path) -> Iterator[subprocess.Popen[bytes]]:
    """mosquitto as on the broker's machine, with that configuration and nothing else."""
    program = mosquitto.find()
    if program is None:
        missing("mosquitto is not installed: apt install mosquitto")
    text = (installed / "mosquitto.conf").read_text()
    text = text.replace("/var/lib/mosquitto/", f"{installed}/")
    if os.geteuid() == 0:
        text += "user root\n"
    (installed / "mosquitto.conf").write_text(text)
    (listener,) = re.findall(r"^listener (\d+)$", text, re.MULTILINE)
    log = (installed / "log").open("wb")
    command = [str(program), "-c", str(installed / "mosquitto.conf")]
    with log, subprocess.Popen(command, stderr=log) as process:
        try:
            while not running._listens(process.pid, int(listener)):
                assert process.poll() is None, (installed / "log").read_text()
                time.sleep(0.02)
            yield process
        finally:
            process.terminate()


def test_what_it_writes_is_complete_and_mosquitto_runs_it(
    fleet: FleetDirectory, tmp_path: Path, port: int
):
    output = tmp_path / "etc"
    said = config(fleet, output, "--install-dir", str(output))
    assert {path.name for path in output.iterdir()} == FILES
    assert stat.S_IMODE(output.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()} == {0o600}
    for name in FILES:
        assert name in said
    topics = Topics("farm")
    context = tls_of(fleet, load_fleet(fleet.path))
    with running_there(output) as broker:
        with RawClient(port, context) as coordinator:
            coordinator.subscribe(topics.all, topics.outbox("+"))
            coordinator.ping()
        with pytest.raises(TurnedAwayError):
            RawClient(port, ssl.create_default_context(cafile=output / "ca.crt"))
        assert broker.poll() is None
    log = (output / "log").read_text()
    assert ": Error" not in log
    # every option is known to it, and none is on its way out
    assert "Unknown" not in log
    assert "deprecated" not in log.lower()


def test_after_a_revocation_it_says_so(fleet: FleetDirectory, tmp_path: Path):
    output = tmp_path / "etc"
    assert "revoked in it" not in config(fleet, output)
    key = (output / "server.key").read_bytes()
    rules, revocations = (output / "covey.acl").read_text(), (output / "crl.pem").read_bytes()
    identity, grant = "ab" * 32, Grant("1234", int(time.time()) + 1000)
    record = DeviceRecord(
        device=DeviceId("pi-1"), identity=identity, enrolled_unix=1, grants=[grant]
    )
    with fleet.book.changing():
        fleet.book.save(record)
    done = CliRunner().invoke(main, ["device", "revoke", "pi-1", "--fleet-dir", str(fleet.path)])
    assert "your broker still lets it in: covey broker config" in done.output
    assert "revoked in it: pi-1" in config(fleet, output)
    assert (output / "covey.acl").read_text() == access_control("farm", ["pi-1"]) != rules
    assert (output / "crl.pem").read_bytes() != revocations
    crl = pki.x509.load_pem_x509_crl((output / "crl.pem").read_bytes())
    assert [entry.serial_number for entry in crl] == [0x1234]
    # the key that the broker has stays what it is
    assert (output / "server.key").read_bytes() == key


def test_an_external_broker_has_a_key_of_its_own(fleet: FleetDirectory, tmp_path: Path):
    output = tmp_path / "etc"
    config(fleet, output, "--days", "100")
    assert (output / "server.key").read_bytes() != fleet.tls.read("server.key")
    leaf = pki.read_leaf(pki.load_certificate(output / "server.crt"))
    assert leaf.hosts == {"127.0.0.1"}
    assert leaf.not_after_unix - leaf.issued_unix == 100 * pki.DAY_S
    certificate = (output / "server.crt").read_bytes()
    config(fleet, output)
    assert (output / "server.crt").read_bytes() == certificate
    # but not when it is due, damaged or another host's
    old = pki.server_certificate(
        fleet.tls.authority, ["127.0.0.1"], days=30, now_unix=int(time.time()) - 25 * pki.DAY_S
    )
    other = pki.server_certificate(
        fleet.tls.authority, ["elsewhere"], days=30, now_unix=int(time.time())
    )
    for pair in (old, other, pki.Pair(certificate, other.key), pki.Pair(b"x", b"y")):
        (output / "server.crt").write_bytes(pair.certificate)
        (output / "server.key").write_bytes(pair.key)
        config(fleet, output)
        fresh = pki.load_certificate(output / "server.crt")
        assert pki.read_leaf(fresh).hosts == {"127.0.0.1"}
        assert (output / "server.crt").read_bytes() not in (pair.certificate, certificate)


def test_where_covey_up_would_run_it_the_key_is_the_fleets(tmp_path: Path):
    fleet = FleetDirectory.create(
        tmp_path / "fleet", "farm", BrokerConfig(), addresses=("127.0.0.1",)
    )
    done = CliRunner().invoke(main, ["broker", "config", "--fleet-dir", str(fleet.path)])
    assert done.exit_code == 0, done.output
    output = fleet.path / "broker" / "mosquitto"
    assert {path.name for path in output.iterdir()} == FILES
    assert (output / "server.key").read_bytes() == fleet.tls.read("server.key")
    text = (output / "mosquitto.conf").read_text()
    assert "\nlistener 8883\n" in text
    assert "certfile /etc/mosquitto/covey/server.crt\n" in text


def test_a_local_fleet_has_none(tmp_path: Path):
    fleet = FleetDirectory.create(tmp_path / "fleet", "farm", BrokerConfig())
    said = config(fleet, tmp_path / "etc", status=1)
    assert "this fleet is local" in said
    assert "covey init --address" in said
    assert not (tmp_path / "etc").exists()


def test_a_path_that_mosquitto_could_not_find_is_refused(fleet: FleetDirectory, tmp_path: Path):
    said = config(fleet, tmp_path / "etc", "--install-dir", "here", status=1)
    assert "--install-dir here: give the whole path" in said
