"""`covey demo` as a user meets it: what it prints, what it leaves, how it refuses and how it ends."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest
from click.testing import CliRunner, Result

from brokers import PASSWORD, USER
from covey_coordinator.broker import BrokerKind, RunningBroker
from covey_fleet import digits
from covey_fleet.command import INTERRUPTED, demo
from covey_fleet.witness import Witness
from covey_shared.mqtt import MqttTransport
from mqtt_clients import Listener, run

COVEY = [sys.executable, "-m", "covey_fleet"]
SMALL = ["--devices", "4", "--rounds", "3", "--dropout", "0.25", "--seed", "2"]


def ask(*options: str) -> Result:
    return CliRunner().invoke(demo, list(options))


@pytest.fixture(scope="module")
def finished(
    broker_kind: BrokerKind, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A small demo that ran to its end, and its report."""
    directory = tmp_path_factory.mktemp("demo")
    report = directory / "report"
    report.mkdir()
    (report / "notes.txt").write_text("mine")
    (report / "model.onnx").write_text("an earlier one")
    processes = ["--processes"] if broker_kind == "mosquitto" else []
    done = subprocess.run(
        [
            *COVEY,
            *SMALL,
            "--split",
            "iid",
            "--broker",
            broker_kind,
            *processes,
            "--report",
            "report",
        ],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done, report


def test_the_transcript(finished: Any, broker_kind: BrokerKind) -> None:
    done, _ = finished
    assert done.stderr == ""
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert re.fullmatch(
        rf"4 devices, .*, on {broker_kind} [\d.]+; secure aggregation always on", lines[0]
    )
    assert lines[1] == "mlp with 4,810 parameters; 1,438 digits spread iid, 359 held out"
    for number, line in enumerate(lines[2:5], 1):
        assert re.match(rf"round {number}/3  sum of [34] devices +\d+\.\d% right +\d+\.\d s", line)
        assert re.search(r"lost pi-\d (before|after|in)", line)
    assert lines[-4:] == [
        "report/accuracy.png",
        "report/model.onnx",
        "report/metrics.jsonl",
        "report/summary.json",
    ]
    text = " ".join(lines[5:-4])
    assert "What was learned: in 3 rounds the fleet's model went from" in text
    assert "All 3 sums equal, in every value, the sum of the devices' plaintext" in text
    assert "3 times a device vanished without a word" in text
    assert "No round was abandoned for it." in text


def test_the_summary(finished: Any, broker_kind: BrokerKind) -> None:
    _, report = finished
    summary = json.loads((report / "summary.json").read_text())
    expected = {
        "rounds_requested": 3,
        "rounds_completed": 3,
        "rounds_abandoned": 0,
        "abandoned_reasons": {},
        "devices": 4,
        "dropout": 0.25,
        "dropouts_injected": 3,
        "sums_checked": 3,
        "sum_mismatches": 0,
        "parameters": 4810,
        "model": "mlp",
        "split": "iid",
        "processes": broker_kind == "mosquitto",
        "seed": 2,
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["broker"].startswith(f"{broker_kind} ")
    assert sum(summary["dropouts_by_moment"].values()) == 3
    assert 0.0 < summary["initial_accuracy"] < 0.3 < summary["accuracy"] <= 1.0
    assert 0.3 < summary["baseline_accuracy"] <= 1.0
    assert summary["examples"] in range(9 * 20 * 32, 12 * 20 * 64 + 1)
    # 18 bits a parameter, and then the messages of the protocol.
    assert 4812 * 18 / 8 * 0.7 < summary["bytes_up_per_device_round"] < 20_000
    assert 19_240 * 0.5 < summary["bytes_down_per_device_round"] < 60_000
    assert 0.0 < summary["seconds_per_round"] < summary["seconds"]
    assert abs(summary["masked_update_correlation"]) < 0.1


def test_the_files(finished: Any) -> None:
    _, report = finished
    summary = json.loads((report / "summary.json").read_text())
    assert sorted(path.name for path in report.iterdir()) == [
        "accuracy.png",
        "metrics.jsonl",
        "model.onnx",
        "notes.txt",
        "summary.json",
    ]
    assert (report / "notes.txt").read_text() == "mine"
    assert (report / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = [json.loads(line) for line in (report / "metrics.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [1, 2, 3]
    assert lines[-1]["test_accuracy"] == pytest.approx(summary["accuracy"], abs=1e-4)
    # Anything that runs ONNX gets the accuracy that was reported, from the file alone.
    _, test = digits.hold_out(digits.load(), np.random.default_rng(2))
    model = onnxruntime.InferenceSession(str(report / "model.onnx"))
    [name] = [node.name for node in model.get_inputs()]
    [scores] = model.run(None, {name: test.features})
    right = float(np.mean(scores.argmax(1) == test.labels))
    assert right == pytest.approx(summary["accuracy"], abs=1e-4)


def test_a_broker_that_somebody_else_runs(broker: RunningBroker, tmp_path: Path) -> None:
    url = f"mqtt://{USER}:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{broker.port}"
    result = ask(
        *("--devices", "3", "--rounds", "1", "--dropout", "0", "--broker", url),
        *("--report", str(tmp_path), "--verbose"),
    )
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["broker"] == f"mqtt://127.0.0.1:{broker.port}"
    assert summary["rounds_completed"] == 1
    assert PASSWORD not in result.output
    assert "horse" not in (tmp_path / "summary.json").read_text()
    assert str(tmp_path / "demo.log") in result.output
    assert "phase unmask" in (tmp_path / "demo.log").read_text()

    async def nothing_is_left() -> None:
        transport = MqttTransport(broker.url, "after", username=USER, password=PASSWORD)
        async with Listener(transport) as listener:
            await listener.transport.subscribe("covey/#")
            await listener.transport.publish("covey/end", b"")
            await listener.until_messages(1)
            assert listener.topics == ["covey/end"]

    run(nothing_is_left())


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--devices", "2"], "2 is not in the range 3<=x<=128"),
        (["--devices", "129"], "129 is not in the range"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--dropout", "1.5"], "1.5 is not in the range"),
        (["--dropout", "nan"], "--dropout"),
        (["--split", "even"], "'even' is no split; use iid, labels or dirichlet:ALPHA"),
        (["--split", "dirichlet:0"], "alpha is a number from 0.001"),
        (["--model", "resnet"], "'resnet' is not one of 'mlp', 'cnn'"),
        (["--broker", "rabbit"], "auto, embedded, mosquitto, or the URL of a broker"),
        (["--broker", "http://there"], "it starts with mqtt://"),
        (["--seed", "-1"], "-1 is not in the range"),
        (["--colour"], "No such option"),
    ],
)
def test_options_that_make_no_sense(options: list[str], words: str) -> None:
    result = ask(*options)
    assert result.exit_code == 2
    assert words in re.sub(r"\s+", " ", result.output)


def test_a_broker_that_is_not_there(tmp_path: Path) -> None:
    result = ask("--broker", "mqtt://127.0.0.1:1", "--report", str(tmp_path))
    assert result.exit_code == 1
    assert (
        result.output
        == "covey demo: no broker at 127.0.0.1:1: connection refused; is it running?\n"
    )


def test_a_wrong_password(broker: RunningBroker, tmp_path: Path) -> None:
    result = ask(
        "--broker", f"mqtt://{USER}:wrong@127.0.0.1:{broker.port}", "--report", str(tmp_path)
    )
    assert result.exit_code == 1
    assert "refuses user 'covey'" in result.output
    assert "wrong" not in result.output


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = ask("--report", str(tmp_path / "file" / "below"))
    assert result.exit_code == 1
    assert "cannot write the report to" in result.output
    assert "choose another --report" in result.output


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "amqtt"])
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else find(name)
    )
    result = ask("--broker", "embedded", "--report", str(tmp_path))
    assert result.exit_code == 1
    assert f"needs {package}" in result.output
    assert "pip install 'covey[demo]'" in result.output


def test_a_sum_that_is_not_exact_fails_the_demo(
    one_kind: BrokerKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Witness, "mismatches", lambda self, round_id, completed: 5)
    result = ask(
        *("--devices", "3", "--rounds", "1", "--dropout", "0", "--split", "iid"),
        *("--broker", one_kind, "--report", str(tmp_path)),
    )
    assert result.exit_code == 1
    assert "ERROR: 5 coordinates of the revealed sums differ" in " ".join(result.output.split())
    assert json.loads((tmp_path / "summary.json").read_text())["sum_mismatches"] == 5


def test_nothing_learned_is_a_failure_that_says_why(one_kind: BrokerKind, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("an earlier one")
    result = ask(
        *("--devices", "3", "--rounds", "1", "--dropout", "1", "--split", "iid"),
        *("--broker", one_kind, "--report", str(tmp_path)),
    )
    assert result.exit_code == 1
    text = " ".join(result.output.split())
    assert "Nothing was learned: none of 1 round was completed." in text
    assert "1 round abandoned: " in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy.png",
        "metrics.jsonl",
        "summary.json",
    ]


# -- endings --------------------------------------------------------------------------------------


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary directory with a short name: sockets of the fork server go into it."""
    with tempfile.TemporaryDirectory(prefix="cv-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_is_stopped_nothing_is_left_running(
    number: signal.Signals, scratch: Path, tmp_path: Path
) -> None:
    processes = [] if number is signal.SIGTERM else ["--processes"]
    temporary, report = scratch / "t", tmp_path / "report"
    temporary.mkdir()
    process = subprocess.Popen(
        [*COVEY, *processes, "--devices", "3", "--rounds", "50", "--report", str(report)],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[2].startswith("round  1/50")
    family = psutil.Process(process.pid).children(recursive=True)
    # A broker; with processes a fork server and three devices besides.
    assert len(family) >= (5 if processes else 1)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: all of them get it
    else:
        process.send_signal(number)
    rest = process.communicate(timeout=30)[0]
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    if number is signal.SIGKILL:
        return
    assert process.returncode == INTERRUPTED
    assert rest.splitlines()[-1] == (
        "covey demo: stopped; nothing is left running, no report was written"
    )
    assert "Traceback" not in rest
    assert list(report.iterdir()) == []
    deadline = time.monotonic() + 10  # the fork server's own directory goes with it
    while list(temporary.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(temporary.iterdir()) == []
