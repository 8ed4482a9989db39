"""One distribution: what it contains, and what a bare `pip install covey` brings along."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def closure(name: str, seen: set[str]) -> set[str]:
    """The distributions that installing `name` without extras brings, itself included."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in seen:
        return seen
    seen.add(name)
    for line in requires(name) or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            closure(requirement.name, seen)
    return seen


def test_a_device_installs_few_distributions_and_no_heavy_one() -> None:
    found = closure("covey", set())
    heavy = {"torch", "onnx", "onnxscript", "scikit-learn", "scipy", "matplotlib", "rich", "amqtt"}
    assert not found & heavy
    assert {"onnxruntime", "numpy", "paho-mqtt", "pycryptodome", "psutil"} <= found
    assert len(found) <= 16, sorted(found)


def test_the_demo_brings_no_torch() -> None:
    found: set[str] = set()
    for line in requires("covey") or ():
        requirement = Requirement(line)
        extras = ("demo", "coordinator")
        if any(
            requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            for extra in extras
        ):
            closure(requirement.name, found)
    assert {"scikit-learn", "amqtt", "rich"} <= found
    assert not found & {"torch", "onnx", "onnxscript"}


def test_torch_is_pinned_in_one_place() -> None:
    """Only pyproject.toml names a release of torch; it says which one compiled plans are held to."""
    tracked = subprocess.run(
        ["git", "ls-files", "*.toml", "*.txt", "*.cfg", "Makefile", ".ci/*", "*.yml"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    pins = [name for name in tracked if re.search(r"torch==", (ROOT / name).read_text())]
    assert pins == ["pyproject.toml"]
    assert (ROOT / "pyproject.toml").read_text().count("torch==") == 1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (path,) = directory.glob("covey-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_four_packages_and_the_demos_plans(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    packages = {"covey_shared", "covey_device", "covey_coordinator", "covey_fleet"}
    assert tops == packages
    for package in packages:
        assert f"{package}/py.typed" in names
    for model in ("mlp", "cnn"):
        for file in ("plan.json", "train.onnx", "eval.onnx", "infer.onnx", "initial.bin"):
            assert f"covey_fleet/plans/{model}/{file}" in names
    for file in ("plan.json", "train.onnx", "initial.bin", "expected.json"):
        assert f"covey_device/doctor/plan/{file}" in names


def test_the_wheel_holds_every_migration(wheel: zipfile.ZipFile) -> None:
    here = ROOT / "coordinator"
    files = {str(p.relative_to(here)) for p in here.glob("covey_coordinator/migrations/**/*.py")}
    assert "covey_coordinator/migrations/env.py" in files
    assert files <= set(wheel.namelist())


def test_the_wheel_installs_both_commands(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert "covey = covey_coordinator.cli:main" in text
    assert "covey-device = covey_device.cli:main" in text
    assert "demo = covey_fleet.command:demo" in text
