"""A small model for 8x8 grey images of digits. `covey plan compile model:build ...` calls `build`."""

from torch import nn


def build() -> nn.Module:
    """Images [batch, 1, 8, 8] in 0..1 -> logits [batch, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )
