"""docs/reliability.md: the tests, commands, files and bounds that it names are there."""

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest

from covey_coordinator import blobs, inbox, registry
from covey_coordinator.broker import running
from covey_coordinator.enrolment import desk, listener
from covey_coordinator.store import database
from covey_device import audit, memory, policy, service, trials
from covey_shared.mqtt.client import WINDOW
from covey_shared.secagg import rules

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


@functools.cache
def names_in(path: str) -> set[str]:
    """Test functions at the top of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


def test_the_tests_that_it_names_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 20
    assert [f"{path}::{name}" for path, name in named if name not in names_in(path)] == []
    assert PAGE.count("::") == len(named)  # none is named in a way that this would miss


def test_every_row_of_what_survives_what_names_one() -> None:
    part = PAGE.split("## What survives what")[1].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 20
    assert all("::" in row or row.endswith("| shown by |") for row in rows)


def test_its_commands_are_there() -> None:
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = set(re.findall(r"make ([a-z-]+)", PAGE))
    assert {"soak", "simulate"} <= told <= made
    scripts = re.findall(r"`((?:benchmarks|tests)/[\w/]+\.py)`", PAGE)
    assert [path for path in scripts if not (ROOT / path).is_file()] == []


def test_its_links_lead_somewhere() -> None:
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
               for h in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}  # fmt: skip
    for file, anchor in re.findall(r"\]\(([\w.]*\.md)?(?:#([\w-]+))?\)", PAGE):
        assert not file or (ROOT / "docs" / file).is_file(), file
        assert file or not anchor or anchor in anchors, anchor


@pytest.mark.parametrize(
    ("row", "figures"),
    [
        ("devices that are online", [registry.MAX_PRESENT]),
        ("messages of the open round", [inbox.MAX_PER_DEVICE, inbox.MAX_BYTES >> 20]),
        ("word that waits", [inbox.MAX_PRESENCES]),
        ("chunks that came", [blobs.MAX_EARLY_PER_DEVICE, blobs.MAX_EARLY_CHUNKS]),
        ("certificates that were verified", [rules._certificate.cache_info().maxsize]),
        ("chunks and messages on their way", [WINDOW]),
        ("addresses that showed", [desk.MAX_ADDRESSES]),
        ("connections at the enrolment", [listener.MAX_CONNECTIONS, listener.MAX_PER_NETWORK]),
        ("messages that wait to be heard", [service.MAX_INBOX_BYTES >> 20]),
        ("answers that wait", [service.MAX_OUTBOX]),
        ("models that it contributed", [memory.MAX_CONTRIBUTIONS]),
        ("models that it contributed", [database.MAX_REMEMBERED_MODELS]),
        ("votes that it signed", [memory.MAX_VOTES]),
        ("check-ins of a day", [policy.MAX_ROUNDS_PER_DAY]),
        ("plans that were tried", [trials.MAX_REMEMBERED]),
        ("a device's `state/audit", [audit.SEGMENT_BYTES * audit.SEGMENTS // 10**6]),
        ("`broker/run/broker.log`", [running.MAX_LOG_BYTES // 10**6]),
    ],
)
def test_its_bounds_are_the_code_s(row: str, figures: list[Any]) -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row}")]
    bound = line.split("|")[2]
    for figure in figures:
        assert re.search(rf"\b{figure:,}\b", bound), (figure, bound)
