"""Fixtures of the live attacks: one mosquitto for all of them, a fleet of its own for each.

In CI nothing skips, so mosquitto must be there; elsewhere the live attacks are skipped without it.
"""

import asyncio
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from covey_coordinator.broker import RunningBroker, mosquitto, start_broker
from live_fleet import PASSWORD, USER, LiveFleet
from memory_fleet import hasten
from prerequisites import missing

Stage = Callable[..., LiveFleet]


@pytest.fixture(scope="session")
def real_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """mosquitto, for the whole session."""
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")
    directory = tmp_path_factory.mktemp("attacks-broker")
    running = asyncio.run(start_broker("mosquitto", directory, users={USER: PASSWORD}))
    yield running
    asyncio.run(running.stop())


_numbers = itertools.count(1)


@pytest.fixture
def stage(real_broker: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Makes a fleet of its own on the real broker: stage(n, coordinator=..., devices_url=...)."""
    hasten(monkeypatch)

    def make(n: int = 4, **more: Any) -> LiveFleet:
        number = next(_numbers)
        url = more.pop("url", real_broker.url)
        return LiveFleet(tmp_path / f"fleet-{number}", f"f{number}", url, n, **more)

    return make


@pytest.fixture
def outcome(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says what became of an attack, for `make attacks`."""
    return lambda text: record_property("outcome", text)


# -- the list of `make attacks` -------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--listing", action="store_true", help="list each attack and what became of it"
    )


@pytest.fixture(autouse=True)
def _titled(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    name, _, case = request.node.name.removeprefix("test_").partition("[")
    words = name.replace("_", " ")
    # Cases that are whole sentences or objects are no titles.
    case = case.removesuffix("]")
    record_property("title", f"{words} [{case}]" if re.fullmatch(r"[\w. -]{1,24}", case) else words)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line for each: whether it was resisted, what was tried, what came of it."""
    if not config.getoption("--listing", default=False):
        return
    by_file: dict[str, list[str]] = {}
    for verdict, word in (("passed", "ok"), ("failed", "NOT RESISTED"), ("error", "ERROR")):
        for report in terminalreporter.stats.get(verdict, ()):
            said = dict(report.user_properties)
            came = f": {said['outcome']}" if "outcome" in said else ""
            line = f"{word:3} {said.get('title', report.nodeid)}{came}"
            by_file.setdefault(report.nodeid.partition("::")[0], []).append(line)
    for path, lines in sorted(by_file.items()):
        terminalreporter.write_line("")
        terminalreporter.write_line(path, bold=True)
        for line in lines:
            terminalreporter.write_line(f"  {line}", red=not line.startswith("ok"))
