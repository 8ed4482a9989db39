"""A program of your own that uses the fleet's model, and goes on with the new one when there is one.

    python local_model.py /var/lib/covey-device/model < readings.csv

Each line on its standard input is one example, as many numbers as the model wants with commas in between.
It needs onnxruntime and numpy, and nothing of covey.
"""

import os
import sys
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported
import numpy as np
import onnxruntime

current, folder = Path(sys.argv[1]) / "current", None
for line in sys.stdin:
    if folder != (newest := current.resolve()):  # the model and all that belongs to it, together
        folder, model = newest, onnxruntime.InferenceSession(newest / "model.onnx")
        print(f"model {folder.name}", flush=True)
    shape = [1, *model.get_inputs()[0].shape[1:]]
    reading = np.array(line.split(","), np.float32).reshape(shape)
    print(model.run(["predictions"], {"features": reading})[0][0].round(3).tolist(), flush=True)
