"""``python -m covey_fleet`` is ``covey demo``."""

from covey_fleet.command import demo

if __name__ == "__main__":
    demo(prog_name="covey demo")
