"""What an operator of a networked fleet sees of `covey`, command by command."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from covey_coordinator.cli import main
from covey_coordinator.devices import Refusal
from covey_coordinator.enrolment import EnrolmentDesk, Peer
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.status import write_status
from covey_shared import wire
from covey_shared.enrolment import Enrolled, Token, decode_token, fingerprint
from enrolling import Applicant, who_is_there
from memory_fleet import PLAN

Covey = Callable[..., Result]


@pytest.fixture
def covey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Covey:
    """Runs a command in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("COVEY_FLEET", "farm")

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result

    return run


@pytest.fixture
def fleet(covey: Covey, tmp_path: Path) -> FleetDirectory:
    lines(covey("init", "farm", "--fleet", "farm", "--address", "farm.lan"))
    return FleetDirectory(tmp_path / "farm")


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line.rstrip() for line in result.stdout.splitlines()]


def failed(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert re.fullmatch(r"covey: [^\n]+\n", result.stderr), result.stderr
    return result.stderr.removeprefix("covey: ").removesuffix("\n")


def token_of(result: Result) -> Token:
    (line,) = lines(result)
    return decode_token(line)


def join(fleet: FleetDirectory, token: Token, seed: int, address: str = "10.0.0.7") -> object:
    request = Applicant(seed).asks(token)
    return wire.decode(
        EnrolmentDesk(fleet).handle(request, Peer(address), int(time.time()))
    ).message


def test_a_networked_fleet_from_nothing(covey: Covey, tmp_path: Path):
    told = lines(
        covey("init", "barn", "--fleet", "barn", "--address", "Barn.lan", "--address", "10.0.0.1",
              "--port", 9001, "--enrol-port", 9002)
    )  # fmt: skip
    trust = FleetDirectory(tmp_path / "barn").trust
    keys = [" ".join(re.findall("....", key.hex()[:32])) for key in (trust.ca,)]
    assert told == [
        f"fleet barn made in {tmp_path}/barn",
        "devices join at barn.lan:9002, rounds are at mqtts://barn.lan:9001",
        f"fleet CA: {keys[0]}",
        f"coordinator's key: {trust.coordinator.hex()}",
        "next in barn: covey up, then covey device token --name NAME",
    ]
    assert lines(covey("device", "list", "--fleet-dir", "barn")) == [
        "no devices yet: covey device token --name NAME"
    ]
    assert lines(covey("status", "--fleet-dir", "barn")) == [
        f"fleet barn in {tmp_path}/barn",
        "coordinator: not running (covey up)",
        *told[1:4],
        "the fleet CA's key is on this machine, beside the coordinator's: whoever takes it over can "
        "invent devices, and sum one real device among them",
        "no runs yet: covey run PLAN",
    ]


def test_a_token_is_the_only_line_on_stdout(covey: Covey, fleet: FleetDirectory):
    result = covey("device", "token", "--name", "pi-1", "--hours", 2)
    token = token_of(result)
    assert (token.host, token.port) == ("farm.lan", 8884)
    desk = EnrolmentDesk(fleet)
    trust = wire.decode(desk.handle(who_is_there(token), Peer("x"), 0))
    assert fingerprint(trust.body) == token.fingerprint
    blank, how, compare, up = result.stderr.splitlines()
    ends = time.strftime("%Y-%m-%d %H:", time.gmtime(time.time() + 7200))
    assert blank == ""
    assert re.fullmatch(
        rf"on the device: covey-device join TOKEN +\(for pi-1, once, until ({ends}|\S+ )\S+ UTC\)",
        how,
    )
    assert compare == "compare there: fleet CA " + " ".join(
        re.findall("....", fleet.trust.ca.hex()[:32])
    )
    assert up == "`covey up` does not run for this fleet: start it first"
    assert lines(covey("device", "list"))[1].split() == ["pi-1", "no", "invited"]
    write_status(fleet.path, "b", True, [], {})
    assert len(covey("device", "token", "--name", "pi-2").stderr.splitlines()) == 3


def test_a_device_s_life(covey: Covey, fleet: FleetDirectory):
    token = token_of(covey("device", "token", "--name", "pi-1"))
    assert isinstance(join(fleet, token, 1), Enrolled)
    head, row = lines(covey("device", "list"))
    assert head.split() == ["device", "online", "status", "certificate", "ends", "identity"]
    assert re.fullmatch(r" pi-1 +\? +active +20\d\d-\d\d-\d\d +[0-9a-f]{16}", row)
    join(fleet, token, 1)  # its answer got lost, and with it the TLS key that it had made
    join(fleet, token, 2, "6.6.6.6")
    moment = r"20\d\d-\d\d-\d\d \d\d:\d\d UTC"
    patterns = [
        r"device pi-1: active",
        r"identity: ([0-9a-f]{4} ){7}[0-9a-f]{4}",
        rf"identity certificate: from {moment} to {moment}",
        rf"joined: {moment}, its token used 2 times",
        *[rf"TLS certificate [0-9a-f]{{30,40}}: to {moment}"] * 2,
        rf"refused {moment}, 6\.6\.6\.6: this token was used by another device; if that was not .*",
    ]
    shown = lines(covey("device", "show", "pi-1"))
    assert len(shown) == len(patterns)
    for pattern, line in zip(patterns, shown, strict=True):
        assert re.fullmatch(pattern, line), line

    assert "device pi-1 is there already" in failed(covey("device", "token", "--name", "pi-1"))
    assert lines(covey("device", "renew", "pi-1")) == [
        "`covey up` does not run for this fleet; pi-1 is asked when both are there"
    ]
    write_status(fleet.path, "b", True, ["pi-1"], {"pi-1": 3})
    assert lines(covey("device", "renew", "pi-1")) == [
        "pi-1 is asked to renew; covey device show pi-1 tells whether it did"
    ]
    shown = lines(covey("device", "show", "pi-1"))
    assert shown[1:3] == ["online: yes", "faults in rounds: 3"]
    write_status(fleet.path, "b", True, [], {})
    assert lines(covey("device", "renew", "pi-1")) == [
        "pi-1 is offline; it is asked when it is back"
    ]
    assert lines(covey("device", "revoke", "pi-1")) == [
        "device pi-1 revoked: from the next round on no sum contains it"
    ]
    assert lines(covey("device", "revoke", "pi-1")) == ["device pi-1 was revoked before"]
    shown = lines(covey("device", "show", "pi-1"))
    assert shown[0] == "device pi-1: revoked"
    assert any(re.fullmatch(rf"revoked: {moment}", line) for line in shown)
    assert "pi-1 is revoked; covey device token --again" in failed(covey("device", "renew", "pi-1"))
    assert "device pi-1 was revoked; choose another" in failed(
        covey("device", "token", "--name", "pi-1")
    )
    token = token_of(covey("device", "token", "--name", "pi-1", "--again"))
    assert isinstance(join(fleet, token, 3), Enrolled)
    assert " active " in lines(covey("device", "list"))[1]


def test_a_run_waits_for_devices_that_may_take_part(covey: Covey, fleet: FleetDirectory):
    """Its goal is the fleet's size, without those that are shut out."""
    for n in range(1, 7):
        join(fleet, token_of(covey("device", "token", "--name", f"pi-{n}")), n, f"10.0.0.{n}")
    covey("device", "revoke", "pi-6")
    lines(covey("run", PLAN, "--name", "one", "--detach"))
    assert "goal = 5\n" in (fleet.path / "runs" / "one" / "run.toml").read_text()


def test_a_device_that_waits_for_the_fleet_ca(covey: Covey, fleet: FleetDirectory):
    (fleet.path / "ca" / "ca.key").rename(fleet.path / "moved.key")
    token = token_of(covey("device", "token", "--name", "pi-1"))
    assert isinstance(join(fleet, token, 1), Enrolled)
    assert lines(covey("device", "list"))[1].split()[:3] == ["pi-1", "?", "pending"]
    shown = lines(covey("device", "show", "pi-1"))
    assert shown[0] == "device pi-1: pending"
    assert any(line.startswith("waits for the fleet CA: since ") for line in shown)
    assert ", on another machine" in covey("status").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["device", "show", "pi-9"], "there is no device 'pi-9' in this fleet; covey device list"),
        (["device", "revoke", "pi-9"], "there is no device 'pi-9' in this fleet"),
        (["device", "renew", "pi-9"], "there is no device 'pi-9' in this fleet"),
        (["device", "token", "--name", "Pi_9"], "device name 'Pi_9': 1 to 32 lower-case"),
        (["device", "token", "--name", "coordinator"], "that is the coordinator's own"),
        (["device", "add", "pi-9"], "covey device token --name pi-9"),
        (
            ["init", "x", "--address", "http://x"],
            "the command line: key `address`: 'http://x' is no",
        ),
        (["init", "x", "--address", "h", "--broker", "embedded"], "needs mosquitto"),
    ],
)
def test_mistakes_are_one_line(
    covey: Covey, fleet: FleetDirectory, arguments: list[str], message: str
):
    assert message in failed(covey(*arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["device", "token"], "Missing option '--name'"),
        (["device", "token", "--name", "a", "--hours", "0"], "0.0 is not in the range 0<x<=8760"),
        (["init", "x", "--ca", "README"], "'README' does not exist"),
        (["ca", "sign", "none"], "'none' does not exist"),
        (["ca", "requests"], "Missing option '-o'"),
    ],
)
def test_a_wrong_use_is_told_with_the_usage(covey: Covey, arguments: list[str], message: str):
    result = covey(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_ca_elsewhere_needs_an_address(covey: Covey, tmp_path: Path):
    (tmp_path / "ca.pub").write_text("00" * 32)
    result = covey("init", "x", "--ca", "ca.pub")
    assert result.exit_code == 2
    assert "--ca goes with --address" in result.stderr
    (tmp_path / "ca.pub").write_text("no key")
    assert "ca.pub is not a key of 64 hexadecimal digits" in failed(
        covey("init", "x", "--address", "h", "--ca", "ca.pub")
    )


def test_hidden_words_in_a_refusal_do_not_reach_the_terminal(covey: Covey, fleet: FleetDirectory):
    token = token_of(covey("device", "token", "--name", "pi-1"))
    join(fleet, token, 1)
    record = fleet.book.record("pi-1")
    assert record is not None
    record.refusals.append(Refusal(0, "x", "a\x1b[2Jb"))
    fleet.book.save(record)
    assert "\x1b" not in covey("device", "show", "pi-1").stdout
