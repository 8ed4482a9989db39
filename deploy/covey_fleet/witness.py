"""What only a simulation can know: every device's plaintext. It proves each revealed sum exact.

Devices leave the encoding of their update, before it is masked, in a private directory; nothing of
it goes through the broker or to the coordinator. When a sum is revealed, the encodings of the very
devices in it are added up in the clear and compared, coordinate by coordinate.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from covey_coordinator.round import Completed
from covey_shared.fixedpoint import to_signed
from covey_shared.masking import Ring
from covey_shared.messages import DeviceId


class Witness:
    """Encoded updates in files: devices may be processes of their own. directory: exists."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def of(self, device: DeviceId) -> Callable[[int, Ring], None]:
        """What a device's session tells its encoded updates to."""

        def record(round_id: int, ring: Ring) -> None:
            path = self._path(round_id, device)
            fresh = path.with_suffix(".new")
            with fresh.open("wb") as file:
                np.save(file, ring)
            fresh.replace(path)

        return record

    def encoded(self, round_id: int, device: DeviceId) -> Ring | None:
        """What a device encoded in a round; None if it recorded nothing."""
        try:
            ring: Ring = np.load(self._path(round_id, device))
        except FileNotFoundError:
            return None
        return ring

    def mismatches(self, round_id: int, completed: Completed) -> int:
        """Coordinates in which the revealed sum is not the survivors' sum, mod 2^bits.

        A survivor without a record makes all of them wrong.
        """
        bits = completed.encoding.bits
        revealed = to_signed(completed.ring_sum, bits)
        total: NDArray[np.int64] = np.zeros_like(revealed)
        for device in completed.survivors:
            ring = self.encoded(round_id, device)
            if ring is None or ring.shape != total.shape:
                return total.size
            total += to_signed(ring, bits)
        return int(np.count_nonzero((total - revealed) % (1 << bits)))

    def forget(self, round_id: int) -> None:
        """Remove a round's records."""
        for path in self._directory.glob(f"{round_id}-*"):
            path.unlink(missing_ok=True)

    def _path(self, round_id: int, device: DeviceId) -> Path:
        return self._directory / f"{round_id}-{device}.npy"
