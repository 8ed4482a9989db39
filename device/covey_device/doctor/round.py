"""The round that is estimated. Apart from `estimate`, which loads numpy and pycryptodome."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Round:
    """What is asked of this machine. Megabits are those of the link's own figures: 10^6 bits a second."""

    batches: int = 10
    batch_size: int = 32
    peers: int = 100
    uplink_mbit: float = 10.0
    downlink_mbit: float = 10.0
