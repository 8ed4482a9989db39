"""docs/doctor.md has every check, in the order they are made, each with what to do."""

import re
from pathlib import Path

import pytest

from covey_device.doctor.checkup import DEVICE_CHECKS, MACHINE_CHECKS
from covey_device.doctor.estimate import PHASES, SLICE
from covey_device.doctor.known_answers import PRIMITIVES
from covey_device.doctor.machine import ENABLE_MEMORY

PAGE = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[tuple[str, str, str]]:
    """The table below a heading."""
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None
    return re.findall(r"^\| `([a-z-]+)` \| (.+?) \| (.+?) \|$", section[1], re.MULTILINE)


@pytest.mark.parametrize(
    ("heading", "checks"), [("The machine", MACHINE_CHECKS), ("The device", DEVICE_CHECKS)]
)
def test_every_check_is_there_in_its_order_with_its_fix(heading: str, checks: tuple[str, ...]):
    found = rows(heading)
    assert tuple(name for name, _, _ in found) == checks
    for name, looks_at, fix in found:
        assert looks_at.endswith("."), name
        assert fix.endswith("."), name


def test_every_primitive_and_phase_is_named():
    answers = next(looks_at for name, looks_at, _ in rows("The machine") if name == "known-answers")
    named = {"mask keys": "the keys of masks", "messages": "the encoding of messages"}
    for primitive in PRIMITIVES:
        assert named.get(primitive, primitive) in answers
    for words in PHASES.values():
        assert f"\n  {words}" in PAGE
    assert ENABLE_MEMORY in PAGE
    assert f"{SLICE:,}" in PAGE
