"""`covey-device audit`, as typed, on a log that real rounds have written."""

import calendar
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from covey_coordinator.config import BrokerConfig
from covey_coordinator.fleet import FleetDirectory
from covey_device.audit import FILE, Audit, AuditLog
from covey_device.cli import main
from covey_device.keystore import MemoryFile
from covey_device.session import Ended, Fetch, Publish, Train
from covey_shared.messages import CheckIn
from lab import Lab

DAYS = ("2026-11-19T09:30:00", "2026-11-20T14:03:00", "2026-11-21T23:59:00")


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture
def home(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it for one test."""
    monkeypatch.setattr("covey_device.cli.os.umask", lambda mask: 0)
    shutil.copytree(written, tmp_path / "pi-1")
    return tmp_path / "pi-1"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device that was enrolled, and in a round on each of three days."""
    fleet = FleetDirectory.create(
        tmp_path_factory.mktemp("audit") / "fleet", "farm", BrokerConfig()
    )
    home = fleet.add_device("pi-1", days=30, data=None)
    text = (home / "device.toml").read_text()
    (home / "device.toml").write_text(re.sub(r'url = ".*"', 'url = "mqtt://127.0.0.1"', text))
    MemoryFile(home / "state")
    now = [0.0]
    audit = Audit(AuditLog(home / "state", clock=lambda: now[0]))
    lab = Lab(4)
    for number, day in enumerate(DAYS, 1):
        now[0] = calendar.timegm(time.strptime(day, "%Y-%m-%dT%H:%M:%S"))
        if number == 1:
            audit.note("enrolled", fleet="farm", device="pi-1")
        lab.model = bytes([number]) * 32
        play = lab.round(lab.spec(number)).run()
        for action in play.actions[lab.names[0]]:
            match action:
                case Fetch(call):
                    audit.called(call)
                    audit.prepared(call.round, "digits")
                case Publish(message):
                    audit.leaving(message)
                case Train(_, head):
                    audit.cohort(head)
                case Ended(round_id, outcome, contributed):
                    audit.ended(round_id, outcome, contributed=contributed)
    return home


def audit(home: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["audit", "--config", str(home / "device.toml"), *options])


def test_all_of_it_in_words(home: Path):
    result = audit(home)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "2026-11-19 09:30 enrolled: fleet farm, device pi-1."
    assert [line[:24] for line in lines[1:]] == [
        "2026-11-19 09:30 round 1",
        "2026-11-20 14:03 round 2",
        "2026-11-21 23:59 round 3",
    ]
    for line in lines[1:]:
        assert (
            "joined, one of 4 devices (at least 3 in a sum). Left this device: 6 messages" in line
        )
        assert "the sum is complete, and this device's update is in it. Plan digits " in line


def test_the_last_rounds_and_what_came_after(home: Path):
    assert [line[17:24] for line in audit(home, "--rounds", "2").stdout.splitlines()] == [
        "round 2",
        "round 3",
    ]
    assert len(audit(home, "--rounds", "3").stdout.splitlines()) == 3
    assert len(audit(home, "--rounds", "4").stdout.splitlines()) == 4
    Audit(AuditLog(home / "state")).note("renewed")
    assert len(audit(home, "--rounds", "1").stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("since", "rounds"),
    [("2026-11-19", 3), ("2026-11-20", 2), ("2026-11-20T14:03", 2), ("2026-11-20T14:04", 1)],
)
def test_since_a_day(home: Path, since: str, rounds: int):
    shown = audit(home, "--since", since).stdout
    assert len(re.findall(r"round \d:", shown)) == rounds


def test_nothing_to_tell(home: Path):
    assert audit(home, "--since", "2026-12-01").stdout == "nothing since then\n"
    (home / "state" / FILE).unlink()
    assert audit(home).stdout == "nothing yet\n"
    assert audit(home, "--verify").stdout == "the log is empty\n"


def test_json_is_the_log_itself(home: Path):
    assert audit(home, "--json").stdout == (home / "state" / FILE).read_text()
    shown = [
        json.loads(line) for line in audit(home, "--json", "--rounds", "1").stdout.splitlines()
    ]
    assert {entry["round"] for entry in shown} == {3}
    assert [entry["kind"] for entry in shown] == ["joined", *["sent"] * 5, "ended"]
    assert shown[0]["message"] == CheckIn.LABEL


def test_verify_says_what_it_found(home: Path):
    shown = audit(home, "--verify").stdout
    assert re.fullmatch(
        r"22 entries, 1 to 22: each follows from the last\nentry 22 is [0-9a-f]{64}; .*\n", shown
    )
    path = home / "state" / FILE
    path.write_text(path.read_text().replace('"in_sum":true', '"in_sum":false', 1))
    result = audit(home, "--verify")
    assert result.exit_code == 1
    assert result.stderr == (
        f"covey-device: {path}, after entry 8: entry 9 does not follow from the one before it; a line "
        "was changed, taken out or put in\n"
    )
    assert audit(home).exit_code == 0  # what is there can be read all the same


def test_a_line_that_is_being_written(home: Path):
    path = home / "state" / FILE
    path.write_bytes(path.read_bytes() + b'{"n":23,"at"')
    assert "a line at the end is not finished" in audit(home, "--verify").stdout
    assert len(audit(home).stdout.splitlines()) == 4


def test_verify_goes_alone(home: Path):
    result = audit(home, "--verify", "--rounds", "3")
    assert result.exit_code == 1
    assert result.stderr == (
        "covey-device: --verify checks the whole log: leave the other options out\n"
    )


def test_while_the_service_has_the_state(home: Path):
    with MemoryFile(home / "state").held():
        assert audit(home).exit_code == 0


def test_a_reader_that_has_seen_enough(home: Path):
    """`covey-device audit | head -1`, of a log that fills any pipe."""
    log = AuditLog(home / "state")
    for number in range(3000):
        log.append("note", {"number": number})
    command = [sys.executable, "-c", "from covey_device.cli import main; main()"]
    child = subprocess.Popen(
        [*command, "audit", "--config", home / "device.toml"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert b"enrolled" in child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b""
    child.wait(30)
