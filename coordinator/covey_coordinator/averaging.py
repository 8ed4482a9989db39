"""Decoded sum -> next parameters.

FedAvg (McMahan et al. 2017, algorithm 1): the weighted average of the devices' differences is added
to the model. Weights are the devices' example counts, which only their sum is known of.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from covey_shared.errors import TrainingError
from covey_shared.fixedpoint import DecodedSum
from covey_shared.layout import Flat

FEDAVG = "fedavg"
"""What transcripts call it."""


class Strategy(Protocol):
    """How a round's average becomes the next model. Called once per completed round, in order."""

    def step(self, parameters: Flat, total: DecodedSum) -> Flat:
        """parameters: float32[n_params], left as they are. Returns the next ones, a new array."""
        ...


@dataclass(frozen=True, slots=True)
class FedAvg:
    """parameters + server_lr * average difference. server_lr = 1 is plain federated averaging."""

    server_lr: float = 1.0

    def step(self, parameters: Flat, total: DecodedSum) -> Flat:
        """Raises TrainingError if the result is not finite; the round is then not used."""
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below
            following = (parameters + np.float32(self.server_lr) * total.average).astype(np.float32)
        if not np.isfinite(following).all():
            raise TrainingError(
                "the averaged model is not finite: lower the learning rate or the server's"
            )
        return following
