"""What an operator sees of `covey`, command by command, without processes."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from covey_coordinator import fleet as fleet_module
from covey_coordinator.cli import main
from covey_coordinator.store import FILE, RunDirectory, RunState, Store
from memory_fleet import PLAN

Covey = Callable[..., Result]


@pytest.fixture
def covey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Covey:
    """Runs a command in tmp_path, and holds every error to one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("COVEY_FLEET", raising=False)

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        if result.exit_code == 1:
            assert re.fullmatch(r"covey: [^\n]+\n", result.stderr), result.stderr
        if result.exit_code == 0:
            assert result.stderr == ""
        return result

    return run


def failed(result: Result) -> str:
    """The one line of an error."""
    assert result.exit_code == 1
    return result.stderr.removeprefix("covey: ").removesuffix("\n")


def trimmed(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line.rstrip() for line in result.stdout.splitlines()]


# -- a fleet is made -------------------------------------------------------------------------------


def test_a_fleet_from_nothing(covey: Covey, tmp_path: Path):
    assert trimmed(covey("init", "farm", "--fleet", "farm")) == [
        f"fleet farm made in {tmp_path}/farm",
        "next in farm: covey device add NAME, then covey up",
    ]
    assert trimmed(covey("device", "list", "--fleet-dir", "farm")) == [
        "no devices yet: covey device add NAME"
    ]
    assert trimmed(covey("device", "add", "pi-1", "--fleet-dir", "farm")) == [
        "device pi-1 added: farm/devices/pi-1",
        "next: set [data] in farm/devices/pi-1/device.toml to the device's own data",
        "then: covey-device run --config farm/devices/pi-1/device.toml",
    ]
    lines = trimmed(covey("device", "list", "--fleet-dir", "farm"))
    assert lines[0].split() == ["device", "online", "status", "certificate", "ends", "identity"]
    assert re.fullmatch(r" pi-1 +\? +active +20\d\d-\d\d-\d\d +[0-9a-f]{16}", lines[1])
    assert trimmed(covey("status", "--fleet-dir", "farm")) == [
        f"fleet farm in {tmp_path}/farm",
        "coordinator: not running (covey up)",
        "the fleet CA's key is on this machine, beside the coordinator's: whoever takes it over can "
        "invent devices, and sum one real device among them",
        "no runs yet: covey run PLAN",
    ]


def test_in_its_own_directory_nothing_needs_to_be_said_twice(covey: Covey, tmp_path: Path):
    assert trimmed(covey("init"))[1] == "next: covey device add NAME, then covey up"
    np.savez(tmp_path / "data.npz", x=np.zeros(1))
    assert trimmed(covey("device", "add", "pi-1", "--data", "data.npz")) == [
        "device pi-1 added: devices/pi-1",
        "then: covey-device run --config devices/pi-1/device.toml",
    ]
    assert f'file = "{tmp_path}/data.npz"' in (tmp_path / "devices/pi-1/device.toml").read_text()


def test_what_an_external_broker_must_know_is_told(covey: Covey):
    made = covey("init", "farm", "--broker", "external", "--broker-url", "mqtts://broker.lan")
    assert trimmed(made)[1] == (
        "the broker must know the user coordinator, with the password in "
        "farm/broker/coordinator.password"
    )
    assert trimmed(covey("device", "add", "pi-1", "--fleet-dir", "farm"))[1] == (
        "the broker must know the user pi-1, with the password in farm/devices/pi-1/broker.password"
    )


def test_the_environment_names_the_fleet(covey: Covey, monkeypatch: pytest.MonkeyPatch):
    covey("init", "farm")
    monkeypatch.setenv("COVEY_FLEET", "farm")
    assert covey("device", "add", "pi-1").exit_code == 0


def test_a_certificate_that_ended_is_told(covey: Covey, monkeypatch: pytest.MonkeyPatch):
    covey("init")
    monkeypatch.setattr(fleet_module, "DAY_S", -86_400)
    covey("device", "add", "pi-1", "--days", 3)
    assert re.search(r"pi-1 +\? +ended +20\d\d-\d\d-\d\d ", covey("device", "list").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "farm"], "farm holds a fleet already; choose another directory"),
        (
            ["init", "x", "--fleet", "My Farm"],
            "fleet name 'My Farm': 1 to 32 lower-case letters, digits and inner hyphens",
        ),
        (
            ["init", "x", "--broker", "external", "--broker-url", "broker.lan"],
            "the command line: key `broker.url`: broker URL ...: it starts with mqtt:// or, for "
            "TLS, mqtts://",
        ),
        (
            ["device", "add", "Pi_1", "--fleet-dir", "farm"],
            "device name 'Pi_1': 1 to 32 lower-case letters, digits and inner hyphens",
        ),
        (
            ["device", "add", "pi-1", "--fleet-dir", "farm"],
            "there is a device 'pi-1' already: farm/devices/pi-1; choose another name, or remove it",
        ),
        (
            ["device", "add", "pi-2", "--fleet-dir", "none"],
            "none/covey.toml does not exist; `covey init` makes a fleet",
        ),
        (
            ["device", "list", "--fleet-dir", "none"],
            "none/covey.toml does not exist; `covey init` makes a fleet",
        ),
        (
            ["status", "--fleet-dir", "none"],
            "none/covey.toml does not exist; `covey init` makes a fleet",
        ),
        (
            ["up", "--fleet-dir", "none"],
            "none/covey.toml does not exist; `covey init` makes a fleet",
        ),
        (
            ["run", str(PLAN), "--fleet-dir", "none"],
            "none/covey.toml does not exist; `covey init` makes a fleet",
        ),
    ],
)
def test_mistakes_are_one_line(covey: Covey, arguments: list[str], message: str):
    covey("init", "farm")
    covey("device", "add", "pi-1", "--fleet-dir", "farm")
    assert failed(covey(*arguments)) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'."),
        (["run"], "Missing argument 'PLAN'."),
        (["run", "none"], "'none' does not exist."),
        (["run", ".", "--rounds", "0"], "0 is not in the range x>=1."),
        (["run", ".", "--goal", "129"], "129 is not in the range 2<=x<=128."),
        (["run", ".", "--lr", "fast"], "'fast' is not a valid float."),
        (["init", "--port", "70000"], "70000 is not in the range 1<=x<=65535."),
        (["init", "--broker", "rabbit"], "'rabbit' is not one of"),
        (["init", "--broker", "external"], "--broker external and --broker-url go together"),
        (["init", "--broker-url", "mqtt://h"], "--broker external and --broker-url go together"),
        (["device", "add", "a", "--data", "none.npz"], "'none.npz' does not exist."),
    ],
)
def test_a_wrong_use_is_told_with_the_usage(covey: Covey, arguments: list[str], message: str):
    result = covey(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("Usage: covey ")


# -- runs are queued -------------------------------------------------------------------------------


def test_a_run_is_queued_and_shown(covey: Covey, tmp_path: Path):
    covey("init")
    assert trimmed(covey("run", PLAN, "--name", "one", "--rounds", 3, "--detach")) == [
        "run one queued",
        "`covey up` does not run for this fleet: start it in another terminal",
    ]
    lines = trimmed(covey("status"))[-2:]
    assert lines[0].split() == ["run", "status", "rounds", "completed", "abandoned", "note"]
    assert lines[1].split() == ["one", "queued", "0", "0", "0"]
    written = (tmp_path / "runs/one/run.toml").read_text()
    assert "rounds = 3" in written
    assert "gather_s = 30.0" in written  # complete, so that an upgrade changes nothing of it


def test_where_runs_stand(covey: Covey, tmp_path: Path):
    covey("init")
    states = {
        "done": RunState(run_id="0" * 32, status="completed", rounds_done=9, rounds_completed=9),
        "going": RunState(run_id="0" * 32, status="running", rounds_done=2, rounds_completed=1),
        "wrong": RunState(run_id="0" * 32, status="failed", message="the plan is gone"),
    }
    with Store.open(tmp_path / FILE) as store:
        for name, state in states.items():
            RunDirectory.create(tmp_path / "runs" / name, b"", bytes(16), store).save_state(state)
    rows = [line.split(maxsplit=5) for line in trimmed(covey("status"))[-3:]]
    assert rows[0] == ["done", "completed", "9", "9", "0"]
    assert rows[1] == ["going", "interrupted", "2", "1", "0"]
    assert rows[2] == ["wrong", "failed", "0", "0", "0", "the plan is gone"]


def test_a_running_coordinator_is_shown(covey: Covey, tmp_path: Path):
    from covey_coordinator.status import write_status

    covey("init", "--fleet", "farm")
    write_status(tmp_path, "mosquitto 2.0, mqtt://h", True, ["pi-1", "pi-2"], {})
    covey("device", "add", "pi-1")
    covey("device", "add", "pi-3")
    assert trimmed(covey("status"))[1:3] == [
        "coordinator: running, connected to broker mosquitto 2.0, mqtt://h",
        "online: pi-1, pi-2",
    ]
    assert [line.split()[1] for line in trimmed(covey("device", "list"))[1:]] == ["yes", "no"]
    assert trimmed(covey("run", PLAN, "--name", "a", "--detach")) == ["run a queued"]
    write_status(tmp_path, "b", False, [], {})
    assert trimmed(covey("status"))[1:3] == [
        "coordinator: running, not connected to broker b",
        "online: no device",
    ]
    assert trimmed(covey("run", PLAN, "--name", "b", "--detach"))[1] == (
        "no device is online yet: start some with covey-device run"
    )
    write_status(tmp_path, "b", True, [f"pi-{i}" for i in range(5000)], {})
    assert trimmed(covey("status"))[2].endswith(" and 4980 more")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (None, ["{tmp}"], "cannot read {tmp}/plan.json: No such file or directory; a plan's directory"),
        ("fleet = ", ["{file}"], "{file}: not TOML: "),
        ("plan = 3", ["{file}"], "{file}: key `plan` is 3; it must be a path in quotes"),
        ('plan = "none"', ["{file}"], "cannot read {tmp}/none/plan.json: No such file"),
        ('plan = "p"\n[wrok]', ["{file}"], "{file}: unknown key `wrok`; did you mean `work`?"),
        (
            'plan = "{plan}"\nwork.hyper.momentum = 1',
            ["{file}"],
            "key `work.hyper.momentum`: the plan ",
        ),
        (
            'plan = "{plan}"\nevaluation.file = "none.npz"',
            ["{file}"],
            "evaluation set {tmp}/none.npz cannot be read: No such file or directory",
        ),
        (None, ["{plan}", "--goal", "2"], "the command line: key `cohort.minimum` is 3, above"),
        (None, ["{plan}", "--name", "No/Slash"], "run name 'No/Slash': 1 to 32 lower-case"),
        (None, ["{plan}", "--lr", "nan"], "key `work.hyper.lr` is nan; it must be a finite number"),
        (None, ["{plan}", "--test", "{bad}"], "evaluation set {bad}: features are float32[4, 3]"),
        (None, ["{plan}", "--name", "taken"], "there is a run 'taken' already; choose another name"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_not_queued(
    covey: Covey, tmp_path: Path, make: str | None, arguments: list[str], message: str
):
    places = {
        "{tmp}": str(tmp_path), "{file}": str(tmp_path / "run.toml"), "{plan}": str(PLAN),
        "{bad}": str(tmp_path / "bad.npz"),
    }  # fmt: skip

    def filled(text: str) -> str:
        for place, value in places.items():
            text = text.replace(place, value)
        return text

    covey("init")
    covey("run", PLAN, "--name", "taken", "--detach")
    np.savez(tmp_path / "bad.npz", features=np.zeros((4, 3), np.float32), labels=np.zeros(4))
    (tmp_path / "run.toml").write_text(filled(make or ""))
    assert filled(message) in failed(covey("run", *map(filled, arguments), "--detach"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["taken"]


def test_following_a_run_that_is_over(
    covey: Covey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The lines of a followed run, as `covey up` writes them."""
    from covey_coordinator import queueing

    lines = [
        {"index": 1, "outcome": "completed", "seconds": 1.5, "survivors": 3, "cohort": 4,
         "examples": 96, "train_loss": 2.31, "test_loss": 2.0, "test_accuracy": 0.25},
        {"index": 2, "outcome": "abandoned", "seconds": 30.0, "reason": "2 devices checked in"},
        {"index": 3, "outcome": "completed", "seconds": 1.25, "survivors": 4, "cohort": 4,
         "examples": 128, "train_loss": 1.5, "test_problem": "it does not fit"},
    ]  # fmt: skip
    real = queueing.queue_run

    def queue_and_play(*arguments: object) -> RunDirectory:
        run = real(*arguments)  # type: ignore[arg-type]
        state = run.state()
        for line in lines:
            state.last = line
            run.finish_round(state)
        state.status, state.rounds_completed, state.rounds_abandoned = "completed", 2, 1
        run.save_state(state)
        return run

    monkeypatch.setattr(queueing, "queue_run", queue_and_play)
    covey("init")
    assert trimmed(covey("run", PLAN, "--name", "one"))[2:] == [
        "round   1     1.5 s  3/4 devices  96 examples  training loss 2.3100  test accuracy 0.2500",
        "round   2    30.0 s  abandoned: 2 devices checked in",
        "round   3     1.2 s  4/4 devices  128 examples  training loss 1.5000  not evaluated: it "
        "does not fit",
        "run one completed: 2 rounds completed, 1 abandoned",
        "model: runs/one/model.onnx",
        "metrics: runs/one/metrics.jsonl",
    ]


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ({"status": "failed", "message": "the plan is gone"}, "run one failed: the plan is gone"),
        (
            {"status": "completed", "rounds_abandoned": 20},
            "run one completed: 0 rounds completed, 20 abandoned",
        ),
    ],
)
def test_a_run_that_gave_no_model_is_exit_status_1(
    covey: Covey, monkeypatch: pytest.MonkeyPatch, state: dict[str, object], line: str
):
    from covey_coordinator import queueing

    real = queueing.queue_run

    def queue_and_end(*arguments: object) -> RunDirectory:
        run = real(*arguments)  # type: ignore[arg-type]
        run.save_state(RunState(run_id="0" * 32, **state))  # type: ignore[arg-type]
        return run

    monkeypatch.setattr(queueing, "queue_run", queue_and_end)
    covey("init")
    result = CliRunner().invoke(main, ["run", str(PLAN), "--name", "one"])
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].rstrip() == line


# -- help, start-up, surprises ---------------------------------------------------------------------


def test_help_is_short_enough_to_read(covey: Covey):
    top = covey("--help").stdout
    for name in ("demo", "device", "init", "plan", "run", "status", "up"):
        assert re.search(rf"^  {name} +\S", top, re.MULTILINE)
    commands = [["init"], ["up"], ["run"], ["status"]]
    commands += [["device", name] for name in ("add", "list", "renew", "revoke", "show", "token")]
    commands += [["ca", name] for name in ("import", "init", "requests", "sign")]
    for command in commands:
        text = covey(*command, "-h").stdout
        assert text.startswith(f"Usage: covey {' '.join(command)} ")
        assert max(map(len, text.splitlines())) <= 80
    assert re.fullmatch(r"covey, version \d+\.\d+\.\d+", trimmed(covey("--version"))[0])


def test_a_bug_is_one_line_too(covey: Covey, monkeypatch: pytest.MonkeyPatch):
    def load(path: Path) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("covey_coordinator.config.load_fleet", load)
    assert failed(covey("status")) == (
        "unexpected ZeroDivisionError: division by zero. This is a bug in covey; with COVEY_DEBUG=1 "
        "in the environment it shows where"
    )
    monkeypatch.setenv("COVEY_DEBUG", "1")
    assert isinstance(CliRunner().invoke(main, ["status"]).exception, ZeroDivisionError)


def test_a_reader_that_has_seen_enough_is_no_bug(monkeypatch: pytest.MonkeyPatch):
    def load(path: Path) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("covey_coordinator.config.load_fleet", load)
    assert CliRunner().invoke(main, ["status"]).output == ""


HEAVY = {
    "torch", "onnx", "onnxscript", "onnxruntime", "sklearn", "scipy", "matplotlib", "amqtt",
    "rich", "paho",
}  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ("covey_coordinator", "--help"),
        ("covey_coordinator", "run", "--help"),
        ("covey_coordinator", "plan", "compile", "--help"),
        ("covey_coordinator", "--version"),
        ("covey_device", "--help"),
        ("covey_device", "run", "--help"),
    ],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(arguments: tuple[str, ...], tmp_path: Path):
    package, *rest = arguments
    code = (
        f"import sys, atexit\nfrom {package}.cli import main\n"
        f"atexit.register(lambda: print(sorted(set({sorted(HEAVY)!r}) & sys.modules.keys())))\n"
        f"main({rest!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


def test_initialising_needs_no_onnxruntime(tmp_path: Path):
    code = (
        "import sys\nfrom covey_coordinator.cli import main\n"
        "main(['init', 'farm'], standalone_mode=False)\n"
        "main(['device', 'add', 'pi', '--fleet-dir', 'farm'], standalone_mode=False)\n"
        "main(['device', 'list', '--fleet-dir', 'farm'], standalone_mode=False)\n"
        "main(['status', '--fleet-dir', 'farm'], standalone_mode=False)\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'sklearn'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env=os.environ | {"COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
