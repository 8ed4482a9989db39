"""`covey-device predict` and `covey-device model`, as typed; and the example program beside them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from covey_coordinator.config import BrokerConfig
from covey_coordinator.fleet import FleetDirectory
from covey_device.assembly import DeviceParts, load_device
from covey_device.cli import main
from covey_device.home.files import ModelDirectory, Sidecar, Vouched, sidecar_of
from covey_shared import messages, wire
from covey_shared.layout import Flat
from covey_shared.messages import DeviceId, ManifestDigest, RoundCall, RunId
from covey_shared.plan import decode_header, plan_hash
from covey_shared.runtime import LocalModel, export_model

PLAN = Path(str(files("covey_fleet"))) / "plans" / "mlp"
HEADER_BYTES = (PLAN / "plan.json").read_bytes()
HEADER = decode_header(HEADER_BYTES)
INITIAL = np.frombuffer((PLAN / "initial.bin").read_bytes(), "<f4").astype(np.float32)
EXAMPLE = Path(__file__).parents[2] / "examples" / "local_model.py"
IMAGES = np.random.default_rng(3).random((6, 1, 8, 8), dtype=np.float32)
LABELS = np.array([3, 1, 4, 1, 5, 9])


def keep(fleet: FleetDirectory, parts: DeviceParts, round_id: int, parameters: Flat) -> bytes:
    """A model as `Home` keeps it, signed by this fleet's coordinator. Returns the file's bytes."""
    model = export_model(HEADER, (PLAN / "infer.onnx").read_bytes(), parameters)
    key, fields = (
        fleet.coordinator_key(),
        {"fleet": "farm", "run": RunId(b"\x5a" * 16), "round": round_id},
    )
    call = RoundCall(
        plan=plan_hash(HEADER_BYTES), plan_bytes=len(HEADER_BYTES), model=bytes(32),
        model_bytes=parameters.nbytes, revision=0, n_min=3, plan_signatures=(), gather_s=1.0, chance=1.0,
        spread_s=0.0, reconnect_s=0.0, **fields,
    )  # fmt: skip
    result = messages.Result(
        h=ManifestDigest(bytes(32)), u3=b"\x07", votes=(), ring_sum=bytes(32),
        next_model=bytes([round_id]) * 32, **fields,
    )  # fmt: skip
    source = Vouched(wire.sign(call, key), wire.sign(result, key))

    def describe(onnx: str, before: str | None) -> Sidecar:
        return sidecar_of(
            source, HEADER, (10,), device=DeviceId("pi-1"), onnx=onnx, size=len(model),
            written_unix=1_795_290_000 + round_id, before=before,
        ).signed(parts.identity)  # fmt: skip

    fd = os.memfd_create("model")
    os.write(fd, model)
    directory = ModelDirectory(parts.config.model_directory(parts.base), reserve_bytes=0)
    directory.put(fd, len(model), HEADER_BYTES, f"{round_id:08}", describe)
    os.close(fd)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FleetDirectory]:
    path = tmp_path_factory.mktemp("model")
    fleet = FleetDirectory.create(path / "fleet", "farm", BrokerConfig())
    np.savez(path / "own.npz", features=IMAGES, labels=LABELS)
    home = fleet.add_device("pi-1", days=30, data=path / "own.npz")
    text = (home / "device.toml").read_text()
    (home / "device.toml").write_text(re.sub(r'url = ".*"', 'url = "mqtt://127.0.0.1"', text))
    return home, fleet


@pytest.fixture
def home(
    made: tuple[Path, FleetDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A device that has kept the models of two rounds."""
    monkeypatch.setattr("covey_device.cli.os.umask", lambda mask: 0)
    original, fleet = made
    shutil.copytree(original, tmp_path / "pi-1")
    monkeypatch.chdir(tmp_path)
    parts = load_device(tmp_path / "pi-1" / "device.toml")
    keep(fleet, parts, 1, INITIAL)
    keep(fleet, parts, 2, INITIAL + np.float32(0.01))
    return tmp_path / "pi-1"


def run(*arguments: str, config: bool = True) -> Result:
    given = ["--config", "pi-1/device.toml"] if config else []
    return CliRunner().invoke(main, [*arguments, *given])


def expected(home: Path, images: Any = IMAGES) -> Any:
    return LocalModel((home / "model" / "current.onnx").read_bytes(), "it").predict(images)


# -- predict ---------------------------------------------------------------------------------------


def test_predict_on_files_of_each_kind_says_the_same(home: Path, monkeypatch: pytest.MonkeyPatch):
    def nowhere(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a prediction needs no network")

    monkeypatch.setattr(socket, "socket", nowhere)
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    np.savez("new.npz", features=IMAGES)
    np.save("new.npy", IMAGES)
    table = "\n".join(",".join(f"{v!r}" for v in row) for row in IMAGES.reshape(6, 64).tolist())
    Path("new.csv").write_text(",".join(f"p{i}" for i in range(64)) + "\n" + table + "\n")
    logits = expected(home).astype(float)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    told = set()
    for name in ("new.npz", "new.npy", "new.csv"):
        result = run("predict", name)
        assert result.exit_code == 0, result.output
        told.add(result.stdout)
        as_json = [json.loads(line) for line in run("predict", name, "--json").stdout.splitlines()]
        assert [line["example"] for line in as_json] == list(range(6))
        assert [line["class"] for line in as_json] == logits.argmax(axis=1).tolist()
        found = np.array([line["probabilities"] for line in as_json])
        assert np.allclose(found, probabilities, atol=1e-6)
    (text,) = told
    best = probabilities.argmax(axis=1)
    assert text.splitlines() == [
        f"{i}: class {best[i]} ({probabilities[i, best[i]]:.3f})" for i in range(6)
    ]


def test_predict_on_its_own_data_tells_how_right_it_is(home: Path):
    result = run("predict", "--own")
    assert result.exit_code == 0, result.output
    right = (expected(home).argmax(axis=1) == LABELS).mean()
    assert result.stderr == (
        f"accuracy on 6 examples of this device's own: {right:.4g}; it stays on this device\n"
    )
    assert [line.rpartition(" ")[2] for line in result.stdout.splitlines()] == list(
        map(str, LABELS)
    )


def test_predict_reads_as_the_data_table_says(home: Path):
    text = (home / "device.toml").read_text()
    (home / "device.toml").write_text(
        re.sub(r"(?s)\[data\].*?(?=\n\[|\Z)", "", text)
        + '\n[data]\nkind = "npz"\nfile = "x.npz"\nfeatures = "pictures"\nscale = "1/255"\n'
    )
    bytes_ = (IMAGES * 255).astype(np.uint8)
    np.savez("raw.npz", pictures=bytes_, labels=LABELS)
    result = run("predict", "raw.npz", "--json")
    assert result.exit_code == 0, result.output
    best = expected(home, bytes_.astype(np.float32) * np.float32(1 / 255)).argmax(axis=1)
    assert [json.loads(line)["class"] for line in result.stdout.splitlines()] == best.tolist()


def test_predict_with_another_model_needs_no_configuration(home: Path):
    (Path("other.onnx")).write_bytes((home / "model" / "previous.onnx").read_bytes())
    np.save("new.npy", IMAGES)
    result = run("predict", "new.npy", "--model", "other.onnx", "--json", config=False)
    assert result.exit_code == 0, result.output
    found = np.array([json.loads(line)["prediction"] for line in result.stdout.splitlines()])
    other = LocalModel(Path("other.onnx").read_bytes(), "it").predict(IMAGES)
    assert np.allclose(found, other, atol=1e-6)
    assert not np.allclose(found, expected(home))


@pytest.mark.parametrize(
    ("make", "arguments", "problem"),
    [
        (lambda: None, ("predict",), "give a FILE, or --own"),
        (lambda: np.save("x.npy", IMAGES), ("predict", "x.npy", "--own"), "give a FILE, or --own"),
        (lambda: Path("x.txt").write_text("1"), ("predict", "x.txt"), "none of .npz, .npy and .csv"),
        (lambda: np.savez("x.npz", other=IMAGES), ("predict", "x.npz"), "no array 'features', it has"),
        (lambda: Path("x.npz").write_text("no"), ("predict", "x.npz"), "damaged, or no npz file"),
        (lambda: np.save("x.npy", IMAGES[:, :, :4]), ("predict", "x.npy"), "x.npy"),
        (lambda: np.save("x.npy", IMAGES[:0]), ("predict", "x.npy"), "has no examples"),
        (lambda: np.save("x.npy", IMAGES * np.nan), ("predict", "x.npy"), "only finite numbers"),
        (lambda: Path("x.csv").write_text("a,b\n1,2\n"), ("predict", "x.csv"), "has 2 columns of features"),
        (lambda: Path("x.csv").write_text(""), ("predict", "x.csv"), "has 0 columns of features"),
        (
            lambda: Path("x.csv").write_text(",".join(f"p{i}" for i in range(64)) + "\n1,2\n"),
            ("predict", "x.csv"), "row 2 has 2 columns",
        ),
        (
            lambda: Path("x.csv").write_text(",".join(f"p{i}" for i in range(64)) + "\n" + "1," * 63 + "x\n"),
            ("predict", "x.csv"), "row 2: could not convert",
        ),
        (lambda: Path("x.npz").write_bytes(b"PK"), ("predict", "x.npz", "--model", "x.npz"), "cannot load"),
    ],
)  # fmt: skip
def test_predict_refuses_with_one_clear_line(home: Path, make: Any, arguments: Any, problem: str):
    make()
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert problem in result.stderr
    assert "Traceback" not in result.output


def test_predict_does_not_use_a_damaged_model(home: Path):
    file = home / "model" / "current.onnx"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    np.save("new.npy", IMAGES)
    result = run("predict", "new.npy")
    assert result.exit_code == 1
    assert "is damaged: its hash is not the one in model.json" in result.stderr


# -- model -----------------------------------------------------------------------------------------


def test_model_show_verify_and_rollback(home: Path):
    shown = run("model", "show")
    assert shown.exit_code == 0, shown.output
    sizes = [(home / "model" / f"{link}.onnx").stat().st_size for link in ("current", "previous")]
    text = re.sub(r"sha256 [0-9a-f]{16}", "sha256 HASH", shown.stdout)
    plan = plan_hash(HEADER_BYTES).hex()[:12]
    assert text == (
        "current: the result of round 2, run 5a5a5a5a, written 2026-11-21 19:40 UTC\n"
        f"  plan {HEADER.name}, {plan}: features float32[batch, 1, 8, 8] -> predictions "
        "float32[batch, 10], 10 classes\n"
        f"  pi-1/model/current.onnx, {sizes[0]:,} bytes, sha256 HASH...\n"
        "previous: the result of round 1, run 5a5a5a5a, written 2026-11-21 19:40 UTC\n"
        f"  plan {HEADER.name}, {plan}: features float32[batch, 1, 8, 8] -> predictions "
        "float32[batch, 10], 10 classes\n"
        f"  pi-1/model/previous.onnx, {sizes[1]:,} bytes, sha256 HASH...\n"
    )
    facts = json.loads(run("model", "show", "--json").stdout)
    assert (facts["current"]["round"], facts["previous"]["round"]) == (2, 1)
    assert facts["current"]["input"] == {"name": "features", "type": "float32", "shape": [1, 8, 8]}
    checked = run("model", "verify")
    assert checked.exit_code == 0, checked.output
    lines = checked.stdout.splitlines()
    assert [line.partition(", sha256")[0] for line in lines] == [
        f"{link}: round {round_id}, plan {HEADER.name}: the coordinator signed its call and result, "
        "this device the file"
        for link, round_id in (("current", 2), ("previous", 1))
    ]
    back = run("model", "rollback")
    assert back.stdout == (
        "the model of round 1 is the current one again, until the next round's comes; to stay with it, "
        "set `model.keep = false` and restart covey-device\n"
    )
    assert json.loads(run("model", "show", "--json").stdout)["current"]["round"] == 1
    assert run("model", "verify").exit_code == 0


def test_model_verify_finds_what_was_changed(home: Path):
    sidecar = home / "model" / "current.json"
    sidecar.write_text(sidecar.read_text().replace('"round": 2', '"round": 3'))
    result = run("model", "verify")
    assert result.exit_code == 1
    assert "pi-1/model/current cannot be trusted: " in result.stderr


def test_without_a_model_it_says_when_there_will_be_one(home: Path):
    shutil.rmtree(home / "model")
    for arguments in (
        ("model", "show"),
        ("model", "verify"),
        ("model", "rollback"),
        ("predict", "--own"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.stderr == (
            "covey-device: there is no model in pi-1/model yet: it comes with a round that `covey-device "
            "run` hears of\n"
        )
    with (home / "device.toml").open("a") as file:
        file.write("\n[model]\nkeep = false\n")
    assert "`model.keep` is false in device.toml" in run("model", "show").stderr


# -- the example -----------------------------------------------------------------------------------


def test_the_example_uses_the_model_and_notices_a_new_one(
    home: Path, made: tuple[Path, FleetDirectory]
):
    assert len(EXAMPLE.read_text().split('"""')[2].strip().splitlines()) <= 18
    environment = {"PATH": os.environ["PATH"], "COLUMNS": "200"}
    program = subprocess.Popen(
        [sys.executable, EXAMPLE, home / "model"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=environment,
    )  # fmt: skip
    assert program.stdin is not None
    assert program.stdout is not None
    line = ",".join(map(str, IMAGES[0].reshape(-1).tolist())) + "\n"

    def answers(count: int) -> list[str]:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write(line)
        program.stdin.flush()
        return [program.stdout.readline().strip() for _ in range(count)]

    try:
        name, first = answers(2)
        assert name == "model 00000002"
        assert np.allclose(json.loads(first), expected(home)[0], atol=1e-3)
        assert answers(1) == [first]
        parts = load_device(home / "device.toml")
        keep(made[1], parts, 3, INITIAL - np.float32(0.02))
        name, second = answers(2)
        assert name == "model 00000003"
        assert second != first
        assert np.allclose(json.loads(second), expected(home)[0], atol=1e-3)
    finally:
        program.kill()
        program.communicate()
