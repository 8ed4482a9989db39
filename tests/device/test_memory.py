"""How much memory a device process takes, measured in processes of their own."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

MB = 1_000_000
TESTS = str(Path(__file__).parents[1])
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])

PRELUDE = """
import json, sys
def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def measured(code, *arguments):
    """Run code in a fresh interpreter; the JSON that it prints last.

    `peak()` is there for it: the process's own peak of resident memory in bytes. Not ru_maxrss,
    which a child inherits from the process that forked it.
    """
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([TESTS, *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LARGER_THAN_MEMORY = """
import resource, time
from pathlib import Path
import numpy as np
from covey_device.budget import resident_bytes
from covey_device.data import NpyData, open_source
from covey_device.trainer import Trainer, Work
from device_support import LinearStep, make_header

header = make_header(("float32", (1000,)), slots={
    "weight": ((1000, 1), "parameter"), "bias": ((1,), "parameter")})
folder, allowed = Path(sys.argv[1]), int(sys.argv[2])
start = resident_bytes()
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, used + allowed))
try:
    np.load(folder / "x.npy")
except MemoryError:
    fits = False
else:
    fits = True

source = open_source(NpyData(features="x.npy", labels="y.npy"), header, base=folder)
trainer = Trainer(LinearStep(header), source, header)
work = Work(batches=300, batch_size=64, max_seconds=100.0, max_resident_bytes=start + allowed)
result = trainer.train(np.zeros(header.n_params, np.float32), work, clock=time.monotonic,
                       rng=np.random.default_rng(0))
print(json.dumps({"fits": fits, "stopped_by": result.stopped_by, "examples": result.examples,
                  "grown": peak() - start}))
"""


def test_mapped_data_may_be_larger_than_the_memory(tmp_path):
    # Sparse on the disk, 200 MB to read; the process may take 40 MB for everything.
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (50_000, 1000))
    np.save(tmp_path / "y.npy", np.ones((50_000, 1), np.float32))
    found = measured(LARGER_THAN_MEMORY, tmp_path, 40 * MB)
    assert not found["fits"]  # so the bound is a real one
    assert (found["stopped_by"], found["examples"]) == ("batches", 300 * 64)
    assert found["grown"] <= 40 * MB


# In a process of its own, because torch takes more memory than all that is measured here.
COMPILE_CNN = """
import sys
from pathlib import Path
import numpy as np
import torch
from covey_coordinator.plans.bundle import write
from covey_coordinator.plans.compile import compile_plan
from covey_fleet.models import cnn_28x28

torch.manual_seed(0)
torch.set_num_threads(1)
images = np.random.default_rng(0).random((8, 1, 28, 28), np.float32)
plan = compile_plan(cnn_28x28(), images, np.arange(8), loss="cross_entropy", name="cnn")
write(plan, Path(sys.argv[1]))
"""

TRAIN_CNN = """
import time
from pathlib import Path
import numpy as np
from covey_device.data import NpyData
from covey_device.trainer import Work, load_trainer
from covey_shared.plan import decode_header

plan, folder = Path(sys.argv[1]), Path(sys.argv[2])
header = decode_header((plan / "plan.json").read_bytes())
parameters = np.frombuffer((plan / "initial.bin").read_bytes(), np.float32)
data = NpyData(features="x.npy", labels="y.npy")
trainer = load_trainer(header, (plan / "train.onnx").read_bytes(), data, folder)
work = Work(batches=20, batch_size=32, max_seconds=100.0, max_resident_bytes=120_000_000)
result = trainer.train(parameters, work, clock=time.monotonic, rng=np.random.default_rng(0))
heavy = {"torch", "onnx", "onnxscript", "sklearn", "matplotlib", "rich", "amqtt"}
print(json.dumps({"peak": peak(), "batches": result.batches, "examples": result.examples,
                  "loss": result.loss, "stopped_by": result.stopped_by,
                  "moved": float(np.abs(result.delta).max()), "seconds": result.seconds,
                  "heavy": sorted(heavy & set(sys.modules))}))
"""


@pytest.fixture(scope="session")
def cnn_plan(tmp_path_factory):
    """The 20/50-channel 5x5 CNN with fully connected 500-10, as the coordinator writes it."""
    folder = tmp_path_factory.mktemp("cnn") / "plan"
    subprocess.run([sys.executable, "-c", COMPILE_CNN, folder], check=True, timeout=200)
    return folder


def test_training_the_cnn_peaks_at_120_mb(cnn_plan, tmp_path):
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 10, 2000)
    images = rng.random((2000, 1, 28, 28), np.float32)
    images[np.arange(2000), 0, classes, :] = 1  # the class is a bright line: it can be learned
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", classes)
    found = measured(TRAIN_CNN, cnn_plan, tmp_path)
    assert found["peak"] <= 120 * MB
    assert (found["batches"], found["examples"]) == (20, 640)
    assert found["stopped_by"] == "batches"
    assert found["moved"] > 0
    assert found["loss"] < 3
    assert found["heavy"] == []


# `covey-device run` as it is, and at its end what it took and what it imported.
WATCHED_DEVICE = """
import atexit
from pathlib import Path

def at_end():
    heavy = {"torch", "onnx", "onnxscript", "sklearn", "matplotlib", "rich", "amqtt", "scipy"}
    found = {"peak": peak(), "heavy": sorted(heavy & set(sys.modules))}
    Path(report).write_text(json.dumps(found))

report = sys.argv.pop(1)
atexit.register(at_end)
from covey_device.cli import main
main()
"""


def test_a_device_process_peaks_at_120_mb_over_whole_rounds(cnn_plan, tmp_path):
    """Download, training, masks, shares, upload and committee duties, in the real service."""
    covey = [sys.executable, "-c", "from covey_coordinator.cli import main; main()"]
    fleet = tmp_path / "fleet"
    port = str(free_port())
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.random((640, 1, 28, 28), np.float32))
    np.save(tmp_path / "y.npy", rng.integers(0, 10, 640))
    kind = "mosquitto" if shutil.which("mosquitto", path=SBIN) else "embedded"
    run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=120)
    run([*covey, "init", fleet, "--fleet", "memory", "--port", port, "--broker", kind])
    children = []
    try:
        for number in range(3):
            run([*covey, "device", "add", f"pi-{number}", "--fleet-dir", fleet])
            config = fleet / "devices" / f"pi-{number}" / "device.toml"
            text = config.read_text().split("[data]")[0]
            text += f'[data]\nkind = "npy"\nfeatures = "{tmp_path}/x.npy"\nlabels = "{tmp_path}/y.npy"\n'
            config.write_text(text)
        children.append(subprocess.Popen([*covey, "up", "--fleet-dir", fleet]))
        for number in range(3):
            config = fleet / "devices" / f"pi-{number}" / "device.toml"
            watched = [sys.executable, "-c", PRELUDE + WATCHED_DEVICE, tmp_path / f"{number}.json"]
            children.append(subprocess.Popen([*watched, "run", "--config", config]))
        options = ["--rounds", "3", "--goal", "3", "--batch-size", "32"]
        run([*covey, "run", cnn_plan, *options, "--name", "memory", "--fleet-dir", fleet])
        idle = [resting(child.pid) for child in children[1:]]
    finally:
        for child in reversed(children):
            child.terminate()
        for child in children:
            child.wait(20)
    lines = (fleet / "runs" / "memory" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["survivors"] for line in lines] == [3, 3, 3]
    for number in range(3):
        found = json.loads((tmp_path / f"{number}.json").read_text())
        assert found["heavy"] == []
        assert found["peak"] <= 120 * MB
    assert max(idle) <= 60 * MB


def resting(pid):
    """Resident memory of a process once it is below 60 MB, or after the time that it has to rest."""
    ends = time.monotonic() + 20
    while True:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident = 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
        if resident <= 60 * MB or time.monotonic() > ends:
            return resident
        time.sleep(0.1)
