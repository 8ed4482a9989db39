"""Other devices of a fleet, as far as the one that is measured can tell: the real services, made-up training.

    python benchmarks/_companions.py DEVICE.TOML ...

Connects them all, and serves until it is told to stop.
"""

import asyncio
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from covey_device.assembly import assemble, load_device
from covey_device.trainer import TrainResult
from covey_shared.plan import PlanHeader


class _MadeUp:
    """Moves every parameter a little, in no time."""

    def refresh(self) -> None:
        """Its data do not grow."""

    def train(self, parameters: Any, work: Any, **_: Any) -> TrainResult:
        delta = np.full(len(parameters), 1e-3, np.float32)
        return TrainResult(delta, 10, work.batches, 0.5, "batches", 0.0)


def _trainer(header: PlanHeader, graph: bytes) -> Any:
    return _MadeUp()


async def serve(configs: list[Path]) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    # Shared by all: a thread for each would be too many.
    pool, training = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    services = []
    for path in configs:
        service = assemble(load_device(path))
        service._pool, service._train_pool = pool, training
        service.preparation._pool = training
        service.preparation.make_trainer = _trainer
        service._audit = service._cache = service._blobs._cache = None
        service.care = service.port = None  # no device minds how busy it makes the machine
        await service.start()
        services.append(service)
    await stop.wait()
    await asyncio.gather(*(service.close(graceful=False) for service in services))


if __name__ == "__main__":
    asyncio.run(serve([Path(name) for name in sys.argv[1:]]))
