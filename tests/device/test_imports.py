"""A device loads nothing heavy: no torch, no onnx, nothing of the coordinator's or the demo's."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

MLP = Path(str(files("covey_fleet"))) / "plans" / "mlp"

# One step of the plan that is shipped, on data of its shape.
ONE_STEP = """
import json, sys
import covey_device.data
import covey_device.trainer
from pathlib import Path
import numpy as np
from covey_device.data import source_of_arrays
from covey_device.trainer import Trainer, Work
from covey_shared.plan import decode_header
from covey_shared.runtime import TrainStep

plan = Path(sys.argv[1])
header = decode_header((plan / "plan.json").read_bytes())
source = source_of_arrays(np.ones((8, *header.features.shape), np.float32),
                          np.arange(8) % header.classes, header)
trainer = Trainer(TrainStep(header, (plan / "train.onnx").read_bytes()), source, header)
work = Work(batches=1, batch_size=8, max_seconds=60.0, max_resident_bytes=10**9)
initial = np.frombuffer((plan / "initial.bin").read_bytes(), "<f4")
result = trainer.train(initial, work, clock=lambda: 0.0, rng=np.random.default_rng(0))
print(json.dumps({"modules": sorted({name.partition(".")[0] for name in sys.modules}),
                  "examples": result.examples, "moved": float(abs(result.delta).max())}))
"""


def test_training_the_shipped_plan_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", ONE_STEP, MLP],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    heavy = {"torch", "onnx", "onnxscript", "sklearn", "scipy", "matplotlib", "rich", "amqtt"}
    assert heavy & set(found["modules"]) == set()
    assert {"covey_coordinator", "covey_fleet"} & set(found["modules"]) == set()
    assert "onnxruntime" in found["modules"]  # so the plan really ran
    assert found["examples"] == 8
    assert found["moved"] > 0
