"""What time it is, as far as a device can know.

Its own clock may be wrong by years. What the coordinator signs in the manifest of a round that this device
is in, is the present by the coordinator's clock; but that one may be wrong too, and a device that was
switched off has only the last such word. Nothing is held to have passed unless both say so.
"""

import time
from collections.abc import Callable


class Present:
    """signed_unix: the latest time that the coordinator had signed when this process began; 0: none.

    clock: seconds since 1970 by this device. steady: seconds of a clock that nobody sets.
    """

    def __init__(
        self,
        signed_unix: float = 0.0,
        *,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._signed_unix = signed_unix
        self._clock, self._steady = clock, steady
        self._at_s: float | None = None  # when it was signed, if in this process

    def told(self, issued_unix: float) -> None:
        """The coordinator signed this time just now."""
        self._signed_unix = max(issued_unix, self.signed_unix)
        self._at_s = self._steady()

    @property
    def signed_unix(self) -> float:
        """The time by the coordinator's clock; it may be later, if none was signed in this process."""
        passed = 0.0 if self._at_s is None else self._steady() - self._at_s
        return self._signed_unix + passed

    @property
    def is_told(self) -> bool:
        """Whether the coordinator signed a time in this process, which goes on since."""
        return self._at_s is not None

    @property
    def surely_unix(self) -> float:
        """A moment that has passed by both clocks: what ended before it has ended."""
        return min(self._clock(), self.signed_unix)
