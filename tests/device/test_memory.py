"""How much memory a device process takes, measured in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

MB = 1_000_000
TESTS = str(Path(__file__).parents[1])


def measured(code, *arguments):
    """Run code in a fresh interpreter; the JSON that it prints last.

    `peak()` is there for it: the process's own peak of resident memory in bytes. Not ru_maxrss,
    which a child inherits from the process that forked it.
    """
    prelude = """
import json, sys
def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", prelude + code, *map(str, arguments)],
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
