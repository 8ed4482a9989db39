"""What the service holds with everything loaded that it uses: ``python -m covey_device.doctor.loaded`` loads
that, and says how many bytes it then has."""

import importlib
import sys

from covey_device.footprint import keep_small

MODULES = (
    "covey_device.assembly",
    "covey_device.trainer",
    "covey_shared.mqtt.client",
    "covey_shared.runtime",
)

if __name__ == "__main__":
    keep_small()
    for module in MODULES:
        importlib.import_module(module)
    from covey_device.budget import resident_bytes

    sys.stdout.write(f"{resident_bytes()}\n")
