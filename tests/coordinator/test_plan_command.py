"""`covey plan compile` and `covey plan show`, as typed."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import plan_support  # noqa: F401  quietens torch under pytest
from covey_coordinator.cli import main
from covey_coordinator.plans.bundle import load_bundle
from covey_coordinator.plans.sample import MAX_EXAMPLES, load_sample, parse_model
from covey_fleet.models import PLANS
from covey_shared.errors import CompileError, ConfigError, DataError

MODEL = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 3)

    def forward(self, x):
        return self.dense(x)

def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def broken():
    return nn.Linear("4", 3)

answer = 42
"""
SHAPES = "features=float32[32,4],labels=int64[32]:3"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a module of models of its own name, so that none is cached."""
    monkeypatch.chdir(tmp_path)
    name = f"model_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    return name


def covey(*arguments):
    return CliRunner().invoke(main, ["plan", *arguments])


def compile_(model, *more, sample=SHAPES, loss="cross_entropy", output="plan"):
    return covey(
        "compile", model, "--loss", loss, "--sample-batch", sample, "-o", output, *more
    )  # fmt: skip


def test_compile_writes_a_plan_and_says_what_it_checked(folder):
    done = compile_(f"{folder}:build", "--momentum", "0.9", "--weight-decay", "1e-4", "--lr", "0.3")
    assert done.exit_code == 0, done.output
    plan = load_bundle_of("plan")
    assert plan.header.name == "plan"
    assert plan.header.optimizer == "sgd(momentum=0.9, weight_decay=0.0001)"
    assert plan.header.hyperparameters[0].default == 0.3
    assert plan.header.n_params == 4 * 8 + 8 + 8 * 3 + 3
    assert re.fullmatch(
        rf"plan: 67 parameters, plan {plan.hash.hex()[:12]}\n"
        r"verified: 5 steps in batches of 1, 16 and 32 agree with torch to \de-\d\d, "
        r"evaluation and prediction to \de[-+]\d\d\n",
        done.output,
    )


def load_bundle_of(name):
    return load_bundle(Path(name))


def test_the_seed_decides_the_initial_values(folder):
    for output, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert (
            compile_(f"{folder}:Net", "--seed", seed, "--name", "n", output=output).exit_code == 0
        )
    a, b, c = map(load_bundle_of, "abc")
    assert a.header_bytes == b.header_bytes
    assert np.array_equal(a.initial, b.initial)
    assert not np.array_equal(a.initial, c.initial)
    assert a.header_bytes == c.header_bytes  # the initial values are no part of the plan


def test_an_existing_plan_is_replaced_only_by_force(folder):
    assert compile_(f"{folder}:Net").exit_code == 0
    done = compile_(f"{folder}:build")
    assert done.exit_code == 1
    assert done.stderr == "covey: plan exists already; choose another name or pass --force\n"
    assert compile_(f"{folder}:build", "--force").exit_code == 0
    assert load_bundle_of("plan").header.n_params == 67


def test_a_failed_compile_writes_nothing(folder, tmp_path):
    done = compile_(f"{folder}:Net", sample="features=float32[32,5],labels=int64[32]:3")
    assert done.exit_code == 1
    assert f"{folder}.py:10: the model fails on the sample batch" in done.stderr
    assert not (tmp_path / "plan").exists()


def test_a_real_batch_from_a_file(folder):
    rng = np.random.default_rng(0)
    np.savez("data.npz", features=rng.normal(size=(100, 4)), labels=np.arange(100) % 3)
    done = compile_(f"{folder}:Net", sample="data.npz")
    assert done.exit_code == 0, done.output
    assert load_bundle_of("plan").header.features.dtype == "float32"


def test_losses_on_real_labels(folder):
    sample = "features=float32[8,4]:-1..1,labels=float32[8,3]"
    assert compile_(f"{folder}:Net", loss="bce_with_logits", sample=sample).exit_code == 0
    assert load_bundle_of("plan").header.metrics == ("loss_sum", "examples")


def test_without_torch_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    done = compile_(f"{folder}:Net")
    assert done.exit_code == 1
    assert done.stderr == (
        "covey: compiling a plan needs torch, which is not installed: "
        "pip install 'covey[compile]'\n"
    )


def test_show_prints_slots_and_hashes():
    plan = load_bundle(PLANS / "cnn")
    done = covey("show", str(PLANS / "cnn"))
    assert done.exit_code == 0
    text = re.sub(r"\s", "", done.output)
    for expected in (
        plan.hash.hex(),
        "digits-cnn",
        "float32[batch,1,8,8]",
        "int64[batch],classes0to9",
        "sgd(momentum=0.9)",
        "0.weight16x1x3x3parameter1440",
        "6,090(24,360bytes)",
        *(plan.ref(name).sha256 for name in plan.graphs),
    ):
        assert expected in text, expected


def test_show_of_no_plan_names_the_file(tmp_path):
    done = covey("show", str(tmp_path))
    assert done.exit_code == 1
    assert "plan.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_showing_needs_no_torch():
    program = (
        "import sys\nfrom covey_coordinator.cli import main\n"
        f"try:\n    main(['plan', 'show', {str(PLANS / 'mlp')!r}])\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 False"


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("build", ConfigError, "names no model; write MODULE:CALLABLE"),
        ("no_such_module:build", ConfigError, "no module 'no_such_module' in "),
        ("{}:missing", ConfigError, r"has no callable 'missing'; it has Net, build, broken"),
        ("{}:answer", ConfigError, "has no callable 'answer'"),
    ],
)
def test_a_model_that_is_not_there(folder, model, error, message):
    with pytest.raises(error, match=message):
        parse_model(model.format(folder))


def test_a_model_file_that_fails_is_named_with_its_line(folder, tmp_path):
    for number, (text, message) in enumerate(
        [
            ("import torch\nx = 1 / 0\n", r":2: importing .*ZeroDivisionError"),
            ("def build(:\n", r":1: importing .*SyntaxError"),
            ("import not_installed_either\n", r":1: importing .*'not_installed_either'"),
        ]
    ):
        name = f"{folder}_{number}"
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(CompileError, match=rf"{name}\.py{message}"):
            parse_model(f"{name}:build")
    done = compile_(f"{folder}:broken")
    assert done.exit_code == 1
    assert re.search(rf"{folder}\.py:16: calling {folder}:broken: TypeError", done.stderr)
    assert str(tmp_path) not in sys.path


def test_descriptions_draw_what_they_say():
    sample = load_sample("labels=int64[7]:3,features=float32[7,2,5]:-2..-1", seed=1)
    assert sample.features.shape == (7, 2, 5)
    assert sample.features.dtype == np.float32
    assert -2 <= sample.features.min() < sample.features.max() <= -1
    assert sample.labels.shape == (7,)
    assert sample.labels.dtype == np.int64
    assert set(sample.labels) <= {0, 1, 2}
    again = load_sample("labels=int64[7]:3,features=float32[7,2,5]:-2..-1", seed=1)
    assert np.array_equal(again.features, sample.features)
    words = load_sample("features=uint8[4,9],labels=float32[4]")
    assert words.features.dtype == np.uint8
    assert 0 <= words.labels.min() <= words.labels.max() <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "describes no features"),
        ("features=float32[4,2]", "describes no labels"),
        ("features=float32[4,2],labels=int64[4]", "how many values"),
        ("features=float32[4,2],labels=int64[4]:0", "how many values"),
        ("features=float32[4,2],labels=float16[4]", "cannot read it from 'labels=float16"),
        ("features=float32[4,2],features=float32[4,2]", "cannot read it from 'features="),
        ("features=float32[4,2]:red,labels=int64[4]:3", "'red' is no range"),
        ("features=float32[],labels=int64[4]:3", "cannot read it from 'features"),
    ],
)
def test_descriptions_that_say_nothing_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        load_sample(text)


def test_sample_files(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    np.savez(path, features=rng.normal(size=(90, 2)), labels=np.arange(90, dtype=np.int8))
    sample = load_sample(str(path))
    assert (len(sample.features), sample.features.dtype) == (MAX_EXAMPLES, np.float32)
    assert (len(sample.labels), sample.labels.dtype) == (MAX_EXAMPLES, np.int64)
    np.savez(path, features=np.zeros((9, 2), np.uint8), labels=np.zeros(9, bool))
    sample = load_sample(str(path))
    assert (sample.features.dtype, sample.labels.dtype) == (np.uint8, np.int64)

    np.savez(path, images=np.zeros((9, 2)), labels=np.zeros(9))
    with pytest.raises(DataError, match=r"no array 'features', it has \['images', 'labels'\]"):
        load_sample(str(path))
    np.savez(path, features=np.zeros((9, 2)), labels=np.zeros(8))
    with pytest.raises(DataError, match="not arrays of equally many examples"):
        load_sample(str(path))
    path.write_bytes(b"not a zip file")
    with pytest.raises(DataError, match=r"data\.npz is no readable"):
        load_sample(str(path))
    np.savez(path, features=np.array([object()]), labels=np.zeros(1))
    with pytest.raises(DataError, match="no readable"):
        load_sample(str(path))
    with pytest.raises(DataError, match="no file"):
        load_sample(str(tmp_path / "other.npz"))
