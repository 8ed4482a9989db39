"""The targets, by name. Each is a module, imported when asked for: the child imports it instrumented."""

import importlib

from fuzz.harness import Target

NAMES = (
    "wire",
    "keys",
    "chunks",
    "header",
    "graph",
    "joining",
    "desk",
    "carried",
    "config",
    "transcript",
    "session",
    "round",
)


def target(name: str) -> Target:
    """One of NAMES."""
    found: Target = importlib.import_module(f"fuzz.targets.{name}").TARGET
    return found
