"""Spreads scikit-learn's digits (1797 real handwritten ones, bundled with it) over three devices.

Writes pi-1.npz, pi-2.npz and pi-3.npz, and test.npz for the coordinator, beside this file.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

HERE = Path(__file__).parent

images, labels = load_digits(return_X_y=True)
features = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
labels = labels.astype(np.int64)
order = np.random.default_rng(7).permutation(len(labels))
test, *parts = np.split(order, [360, 840, 1320])

np.savez(HERE / "test.npz", features=features[test], labels=labels[test])
for number, part in enumerate(parts, start=1):
    np.savez(HERE / f"pi-{number}.npz", features=features[part], labels=labels[part])
    print(f"pi-{number}.npz: {len(part)} digits")
