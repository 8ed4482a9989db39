"""The services of both sides in one process, under a clock, a network and disks that are made up.

See docs/simulation.md. `python -m simulation --seed N --trace`, from the folder `tests`, plays one seed.
"""
