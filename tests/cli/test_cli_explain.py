"""What an operator is told of a device that does not take part: `covey device explain` and its kin."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from covey_coordinator import explaining
from covey_coordinator.cli import main
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.status import write_status
from covey_coordinator.store import FILE, Attendance, Progress, RunDirectory, Sighting, Store
from covey_coordinator.turnout import Fate, Turnout
from covey_shared.messages import DeviceId

Covey = Callable[..., list[str]]

NOW = int(time.time())
DAY = 86400


@pytest.fixture
def covey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Covey:
    """A command that succeeds -> the lines that it prints, columns as one space."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("COVEY_FLEET", raising=False)

    def run(*arguments: object) -> list[str]:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return [" ".join(line.split()) for line in result.stdout.splitlines()]

    return run


@pytest.fixture
def fleet(covey: Covey, tmp_path: Path) -> FleetDirectory:
    covey("init", "--fleet", "farm")
    for name in ("pi-1", "pi-2"):
        covey("device", "add", name)
    return FleetDirectory(tmp_path)


def run_of(fleet: FleetDirectory, store: Store, status: str = "running") -> RunDirectory:
    path = fleet.path / "runs" / "digits"
    run = RunDirectory.create(path, b'plan = "p"\n', bytes(16), store, created_unix=NOW - DAY)
    state = run.state()
    state.status = status  # type: ignore[assignment]
    run.save_state(state)
    return run


def play(
    run: RunDirectory, at: float, found: dict[str, Fate], *, reason: str = "", **turnout: Any
) -> None:
    """A round that ended `at` seconds after the epoch."""
    state = run.state()
    state.rounds_done += 1
    state.last = {
        "round": run.store.next_round(), "index": state.rounds_done, "cohort": 3, "seconds": 60.0,
        "outcome": "abandoned" if reason else "completed", "reason": reason,
    }  # fmt: skip
    told = Turnout(opened_unix=at - 60, ended_unix=at, checked_in=3, chosen=3, **turnout)
    fates = {DeviceId(name): fate for name, fate in found.items()}
    run.finish_round(state, Attendance(told, fates))


def online(fleet: FleetDirectory, *names: str, **faults: int) -> None:
    write_status(fleet.path, "mosquitto on this machine", True, list(names), faults)


SUMMED = Fate("summed", "unmask")


def test_all_that_became_of_a_device(covey: Covey, fleet: FleetDirectory):
    whole: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"pi-1": Fate("refused", words="pi-1 may not take part: kept out until round 9: it lied")}, {},
         "checked in, and was left out: kept out until round 9: it lied"),
        ({"pi-1": SUMMED}, {}, "in the sum, and helped to unmask it"),
        ({"pi-1": Fate("summed", "collect", "its disk is full")}, {},
         "in the sum; others were enough to confirm and unmask it; then it left: its disk is full"),
        ({"pi-1": SUMMED}, {"reason": "no room"}, "in the sum, which could not be used: no room"),
        ({}, {"chance": 0.0125}, "not heard of: who was online answered with a chance of 1.2%"),
        ({}, {"chance": 0.0125}, "not heard of: who was online answered with a chance of 1.2%"),
        ({}, {}, "not heard of: it was not online when devices were called"),
        ({"pi-1": Fate("undrawn", words="9 checked in, 3 were drawn")}, {},
         "checked in, and was not drawn: 9 checked in, 3 were drawn"),
        ({"pi-1": Fate("late")}, {}, "checked in too late: the cohort had been made"),
        ({"pi-1": Fate("silent", "gather", "it went offline")}, {},
         "online, and did not answer the call; it went offline"),
        ({"pi-1": Fate("silent", "collect", "its upload had begun")}, {},
         "silent since collect: its update did not come, or not whole; its upload had begun"),
        ({"pi-1": Fate("spent", "share")}, {"reason": "2 of 4"},
         "the round was given up in share: 2 of 4"),
        ({"pi-1": Fate("blamed", "roster", "bad boxes")}, {"reason": "bad boxes"},
         "to blame for the end of the round: bad boxes"),
        ({"pi-1": Fate("declined", "collect", "too hot")}, {}, "left in collect: too hot"),
        ({"pi-1": Fate("declined", "gather", "too\x1b[31m hot")}, {},
         "declined: too\N{REPLACEMENT CHARACTER}[31m hot"),
    ]  # fmt: skip
    with Store.open(fleet.path / FILE) as store:
        run = run_of(fleet, store)
        for at, (found, more, _) in enumerate(whole):
            play(run, 60.0 * at, found, **more)
        store.saw({"pi-1": Sighting(True, 3600.0)})
    online(fleet, "pi-1", **{"pi-1": 2})
    lines = covey("device", "explain", "pi-1", "--rounds", 100)
    ends = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(fleet.device("pi-1").not_after_unix))
    assert lines[:4] == [
        "device pi-1: active",
        f"standing added by covey device add; its certificate ends {ends}",
        "online yes, since 1970-01-01 01:00 UTC",
        "faults 2 in rounds since `covey up` started",
    ]
    assert lines[-1] == "advice on the device: covey-device explain, or covey-device log, says more"
    expected = [
        f"round {at} of digits 1970-01-01 00:{at - 1:02} UTC: {told}"
        for at, (_, _, told) in enumerate(whole, 1)
    ]
    expected[4:6] = [
        "rounds 5 to 6 of digits 1970-01-01 00:05 UTC: not heard of: who was online answered with a "
        "chance of 1.2%"
    ]
    assert lines[4:-1] == expected[::-1]
    assert len(covey("device", "explain", "pi-1", "--rounds", 2)) == 4 + 2 + 1


def test_for_programs(covey: Covey, fleet: FleetDirectory):
    with Store.open(fleet.path / FILE) as store:
        run = run_of(fleet, store)
        play(run, 60.0, {"pi-1": Fate("declined", "gather", "too hot")})
        for at in (120.0, 180.0, 240.0):
            play(run, at, {})
        store.saw({"pi-1": Sighting(False, 200.0)})
    online(fleet, "pi-2")
    found = json.loads("\n".join(covey("device", "explain", "pi-1", "--json", "--rounds", 2)))
    assert (found["device"], found["status"], found["online"]) == ("pi-1", "active", False)
    assert (found["since_unix"], found["certificate_ends_unix"]) == (
        200.0, fleet.device("pi-1").not_after_unix,
    )  # fmt: skip
    assert [(r["index"], r["what"]) for r in found["rounds"]] == [
        (4, None), (3, None), (1, "declined"),
    ]  # fmt: skip
    assert found["rounds"][-1] == {
        "run": "digits", "index": 1, "round": 1, "outcome": "completed", "rolled_back": False,
        "ended_unix": 60.0, "what": "declined", "phase": "gather", "words": "too hot",
        "told": "declined: too hot",
    }  # fmt: skip
    assert found["advice"] == [
        "on the device: covey-device check says what keeps it from the broker"
    ]


def test_of_a_fleet_that_has_played_nothing(covey: Covey, fleet: FleetDirectory):
    assert covey("device", "explain", "pi-2")[2:] == [
        "online unknown: `covey up` does not run",
        "runs none is queued or played: no device is called",
        "advice start `covey up`: without it no device takes part",
    ]
    online(fleet, "pi-1")
    assert covey("device", "explain", "pi-2")[2] == "online no, and was never seen"
    assert "rounds:" not in " ".join(covey("device", "show", "pi-2"))


def test_a_coordinator_that_is_away(covey: Covey, fleet: FleetDirectory):
    with Store.open(fleet.path / FILE) as store:
        store.saw({"pi-1": Sighting(False, 3600.0)})
    assert covey("device", "explain", "pi-1")[2] == (
        "online unknown: `covey up` does not run; it was offline then, since 1970-01-01 01:00 UTC"
    )


def test_a_run_that_waits_for_devices(covey: Covey, fleet: FleetDirectory):
    with Store.open(fleet.path / FILE) as store:
        run_of(fleet, store).show(
            Progress(round=0, index=1, phase="waiting for devices", detail="", answered=1,
                     awaited=3, present=1)
        )  # fmt: skip
    online(fleet, "pi-1")
    assert "runs digits waits for devices: 1 online, 3 needed" in covey("device", "explain", "pi-1")


def test_how_a_networked_device_stands(
    covey: Covey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    covey("init", "net", "--fleet", "net", "--address", "net.lan")
    monkeypatch.setenv("COVEY_FLEET", "net")
    result = CliRunner().invoke(main, ["device", "explain", "pi-9"])
    assert (result.exit_code, result.stderr) == (
        1,
        "covey: there is no device 'pi-9' in this fleet, and no token for it; covey device token "
        "--name pi-9 lets it in\n",
    )
    made = CliRunner().invoke(main, ["device", "token", "--name", "pi-9"])
    assert made.exit_code == 0
    first, standing, advice = covey("device", "explain", "pi-9")
    assert first == "device pi-9: invited"
    assert standing.startswith(
        "standing invited, and has not joined; its token may be used until 20"
    )
    assert advice.startswith("advice on the device: covey-device join TOKEN")


@pytest.mark.parametrize("status", ["revoked", "ended"])
def test_who_is_shut_out(
    covey: Covey, fleet: FleetDirectory, status: str, monkeypatch: pytest.MonkeyPatch
):
    online(fleet, "pi-1")
    if status == "revoked":
        covey("device", "revoke", "pi-1")
        told, advice = "standing revoked 20", []
    else:
        later = fleet.device("pi-1").not_after_unix + 5
        real = explaining.explain
        monkeypatch.setattr(
            explaining, "explain", lambda path, name, limit, now: real(path, name, limit, later)
        )
        told = "standing added by covey device add; its certificate ended 20"
        advice = [
            "advice it was away for too long to renew its certificate: covey device add a device of "
            "another name"
        ]
    lines = covey("device", "explain", "pi-1")
    assert lines[0] == f"device pi-1: {status}"
    assert lines[1].startswith(told)
    assert lines[4:] == advice


def test_in_brief(covey: Covey, fleet: FleetDirectory):
    """In `device show` and in `rounds show`."""
    with Store.open(fleet.path / FILE) as store:
        run = run_of(fleet, store)
        play(run, 60.0, {"pi-1": SUMMED})
        play(run, 120.0, {"pi-1": SUMMED})
        hot = Fate("declined", "gather", "too hot")
        told = {"too hot": 2, "its network is metered": 1}
        play(run, 180.0, {"pi-1": hot, "pi-2": hot}, declined=told, refused=1, late=2)
    (line,) = [line for line in covey("device", "show", "pi-1") if line.startswith("rounds:")]
    assert line == (
        "rounds: 2 in the sum, 1 declined (of the last 3); covey device explain pi-1 says more"
    )
    lines = covey("rounds", "show", 3)
    for row in (
        "ended 1970-01-01 00:03 UTC",
        "checked in 3",
        "declined 3: 2 too hot, 1 its network is metered",
        "left out 1",
        "too late 2",
    ):
        assert row in lines
    assert not [line for line in covey("rounds", "show", 2) if line.startswith("declined")]
    turnout = json.loads("\n".join(covey("rounds", "show", 3, "--json")))["turnout"]
    assert turnout["declined"] == told
