"""What the service holds in a round, apart from what the round's plan and model take.

``python -m covey_device.doctor.loaded`` does what the service does: it loads everything, gives back to the
system what it can, and then uses all of it, on the known answers and the tiny plan. It says how many bytes
it holds after that, less what the tiny plan made it grow by: how much another does, its trial says.
"""

import importlib
import sys

MODULES = (
    "covey_device.assembly",
    "covey_device.trainer",
    "covey_shared.mqtt.client",
    "covey_shared.runtime",
)


def main() -> None:
    """Say it."""
    from covey_device.footprint import give_back, keep_small

    keep_small()
    for module in MODULES:
        importlib.import_module(module)
    from covey_device.budget import resident_bytes
    from covey_device.doctor.first_step import train
    from covey_device.doctor.known_answers import known_answers

    before = resident_bytes()
    train()
    grown = resident_bytes() - before
    give_back()
    known_answers()
    train()
    sys.stdout.write(f"{resident_bytes() - grown}\n")


if __name__ == "__main__":
    main()
