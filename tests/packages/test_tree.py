"""What would lie in /opt/covey: whole, for the right machine, knowing nothing of this one, and working."""

import base64
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from covey_device import trim
from covey_packaging.target import MACHINES, ROOT, TARGETS, target
from prerequisites import missing

ELF_MACHINES = {"arm64": 183, "amd64": 62}  # e_machine, from the ELF specification
DEVICES = [target("bookworm", "arm64"), target("trixie", "arm64")]


def digest(data: bytes) -> str:
    """As a RECORD has it."""
    made = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return "sha256=" + made.decode().rstrip("=")


@pytest.mark.parametrize("wanted", DEVICES, ids=lambda wanted: wanted.name)
class TestEveryTree:
    def test_it_holds_what_its_records_say_and_no_more(self, tree_of, wanted):
        tree = tree_of(wanted)
        listed = set()
        # Nothing in it knows where it was made.
        places = [str(place).encode() for place in (ROOT, tree.path.parent, sys.prefix)]
        for record in tree.site_packages.glob("*.dist-info/RECORD"):
            for name, sha256, size in trim.rows_of(record):
                path = Path(os.path.normpath(tree.site_packages / name))
                data = path.read_bytes()
                assert not [place for place in places if place in data], name
                listed.add(path)
                if path != record:
                    assert (sha256, int(size)) == (digest(data), len(data)), name
        there = {path for path in tree.path.rglob("*") if path.is_file() and not path.is_symlink()}
        assert there - listed == {tree.path / "pyvenv.cfg"}
        assert "direct_url.json" not in {path.name for path in there}

    def test_it_is_a_venv_of_the_releases_own_python(self, tree_of, wanted):
        tree = tree_of(wanted)
        python = f"python{wanted.release.python}"
        programs = {path.name for path in (tree.path / "bin").iterdir()}
        assert programs == {"covey-device", "python", "python3", python}
        assert (tree.path / "bin" / python).readlink() == Path("/usr/bin") / python
        assert (tree.path / "bin" / "python").readlink() == Path(python)
        script = (tree.path / "bin" / "covey-device").read_text()
        assert script.splitlines()[0] == "#!/opt/covey/bin/python"
        assert "home = /usr/bin\n" in (tree.path / "pyvenv.cfg").read_text()

    def test_all_of_it_is_for_that_machine(self, tree_of, wanted):
        machines = {}
        for path in tree_of(wanted).path.rglob("*"):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    head = file.read(20)
                if head.startswith(b"\x7fELF"):
                    machines[path.name] = int.from_bytes(head[18:20], "little")
        assert len(machines) > 50  # numpy's, pycryptodome's, onnxruntime's
        assert set(machines.values()) == {ELF_MACHINES[wanted.arch]}

    def test_anyone_may_read_it_and_nobody_write_it(self, tree_of, wanted):
        tree = tree_of(wanted)
        modes: dict[int, set[Path]] = {}
        for path in [tree.path, *tree.path.rglob("*")]:
            if not path.is_symlink():
                modes.setdefault(path.stat().st_mode & 0o7777, set()).add(path)
        assert set(modes) == {0o755, 0o644}
        assert {path.name for path in modes[0o755] if path.is_file()} == {"covey-device"}

    def test_licences_stay(self, tree_of, wanted):
        tree = tree_of(wanted)
        without = []
        for metadata in tree.site_packages.glob("*.dist-info"):
            names = [path.name.lower() for path in metadata.rglob("*")]
            words = ("licen", "copying", "notice", "authors")
            if not any(word in name for name in names for word in words):
                without.append(metadata.name.partition("-")[0])
        # onnxruntime's lies in its package; flatbuffers' wheel has none, and says Apache-2.0.
        assert set(without) == {"onnxruntime", "flatbuffers"}
        assert (tree.site_packages / "onnxruntime" / "LICENSE").is_file()


# Every module that a device has, and one step of the plan that is shipped.
WORKS = """
import importlib, json, pkgutil, sys
from pathlib import Path
place, plan = sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, place)
sys.dont_write_bytecode = True

import covey_device, covey_shared
for package in (covey_device, covey_shared):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

import numpy as np
from covey_device.data import source_of_arrays
from covey_device.trainer import Trainer, Work
from covey_shared.plan import decode_header
from covey_shared.runtime import TrainStep

header = decode_header((plan / "plan.json").read_bytes())
source = source_of_arrays(np.ones((8, *header.features.shape), np.float32),
                          np.arange(8) % header.classes, header)
trainer = Trainer(TrainStep(header, (plan / "train.onnx").read_bytes()), source, header)
work = Work(batches=1, batch_size=8, max_seconds=60.0, max_resident_bytes=10**9)
initial = np.frombuffer((plan / "initial.bin").read_bytes(), "<f4")
result = trainer.train(initial, work, clock=lambda: 0.0, rng=np.random.default_rng(0))
elsewhere = sorted(name for name, module in sys.modules.items()
                   if "site-packages" in (getattr(module, "__file__", None) or "")
                   and not module.__file__.startswith(place))
print(json.dumps({"examples": result.examples, "moved": float(abs(result.delta).max()),
                  "elsewhere": elsewhere}))
"""


def here():
    """The target whose tree runs on this machine's Python, if there is one."""
    version = ".".join(platform.python_version_tuple()[:2])
    for candidate in TARGETS:
        if (candidate.release.python, candidate.machine) == (version, platform.machine()):
            return candidate
    return missing(f"no tree is for Python {version} on {platform.machine()}")


def test_what_was_left_out_is_not_needed(tree_of):
    tree = tree_of(here())
    plan = Path(str(files("covey_fleet"))) / "plans" / "mlp"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", WORKS, tree.site_packages, plan],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["elsewhere"] == []
    assert found["examples"] == 8
    assert found["moved"] > 0
    assert not (tree.site_packages / "covey_coordinator").exists()


def test_wheels_name_every_architecture_there_is():
    assert {wanted.arch for wanted in TARGETS} == set(MACHINES) == set(ELF_MACHINES)
