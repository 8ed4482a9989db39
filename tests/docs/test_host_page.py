"""docs/host.md says what the code does: defaults, sentences, bounds, requests and lines."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec

from covey_device.config import PolicyConfig
from covey_device.host import eligibility, port, waits
from covey_device.host.care import POLL_S
from covey_device.host.config import HostConfig
from covey_device.host.decisions import MAX_DECISIONS, Decision
from covey_device.host.readings import Pressure, Readings, read
from covey_device.host.words import decision_lines, status_lines
from covey_shared.config import parse

PAGE = (Path(__file__).parents[2] / "docs" / "host.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())
SOURCE = (Path(eligibility.__file__)).read_text(encoding="utf-8")


def test_the_example_is_valid():
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert parse(example, PolicyConfig, file="policy.toml").host.pause_c == 72


def row(what: str) -> list[str]:
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {what} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_the_defaults_are_the_code_s():
    host = HostConfig()
    assert row("temperature") == [
        f"below {host.start_below_c:g} C", f"from {host.pause_c:g} C on", f"from {host.stop_c:g} C on"
    ]  # fmt: skip
    assert row("throttling, low voltage")[0] == f"{eligibility.SETTLE_S:g} s without"
    assert row("memory") == [
        f"{host.min_memory_mb} MB and what the plan needs", "", f"below {host.min_memory_mb} MB"
    ]  # fmt: skip
    for what, bound in (
        ("memory", host.memory_pressure),
        ("disks", host.io_pressure),
    ):
        assert row(f"waiting for {what}")[:2] == [f"below {bound / 2:g}%", f"from {bound:g}% on"]
    assert host.cpu_pressure == 0
    assert "0, the default: not looked at" in row("waiting for a processor")[1]
    assert host.max_pause_s == 120
    assert "`max_pause_s`, two minutes" in TEXT
    assert POLL_S == 2
    assert "looks again every two seconds" in TEXT


def test_every_sentence_for_the_coordinator_is_listed():
    section = PAGE.split("## What the coordinator is told")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\* (.*)$", section, re.MULTILINE))
    said = set(re.findall(r'"(it(?:s| is) (?:host|owner)[^"{]*)"', SOURCE))
    assert listed == said
    assert len(listed) == 11


def test_every_request_is_listed_and_understood():
    requests = re.findall(r"^\| `(\{.*\})` \|", PAGE, re.MULTILINE)
    decoded = [msgspec.json.decode(text, type=port.Request) for text in requests]
    assert {request.ask for request in decoded} == {"wait", "go on", "status", "explain"}


def test_the_bounds_are_the_code_s():
    assert f"At most {port.MAX_CLIENTS} programs" in TEXT
    assert f"{waits.MAX_WAITS} waits stand" in TEXT
    assert waits.MAX_WAIT_S == 86_400
    assert f"at most {port.MAX_LINE_BYTES:,} bytes and its `why` {waits.MAX_WHY_CHARS} char" in TEXT
    assert f"for {port.IDLE_S:g} seconds, unless" in TEXT
    assert f"for {port.ANSWER_S:g}, is hung up on" in TEXT
    assert f"the last {MAX_DECISIONS} are kept" in TEXT


def test_the_lines_shown_are_those_that_come():
    explained, shown = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    lines = explained.splitlines()
    moment = eligibility.Moment(0.0)
    going = eligibility.Standing(going=True)
    hot = eligibility.judge(HostConfig(), Readings(temperature_c=76.2), moment, going)[0]
    battery = eligibility.judge(HostConfig(), Readings(on_battery=True), moment, going)[0]
    decisions = [
        Decision(0.0, "paused", hot.line, 7),
        Decision(0.0, "resumed", "after 51 s", 7),
        Decision(0.0, "took part", "its update is in the sum", 7),
        Decision(0.0, "declined", battery.line, 8),
    ]
    stamp = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
    assert [stamp.sub("", line) for line in lines[:4]] == [
        stamp.sub("", line) for line in decision_lines(decisions)
    ]
    assert lines[4] == f"now: would decline: {battery.line}"
    facts = {
        "device": "pi-1", "fleet": "home", "running": True, "since_unix": 0.0, "connected": True,
        "line": "waiting for a round", "called": 8, "contributed": 7, "batches": 140,
        "last": {
            "round": 8, "outcome": f"declined: {battery.public}", "contributed": False,
            "at_unix": 10_800.0,
        },
        "host": {
            "state": "pause", "why": [battery.line], "temperature_c": 51.5, "throttled": False,
            "under_voltage": False, "under_voltage_since_start": False, "memory_available_mb": 3100,
            "cpu_pressure": 2.0, "memory_pressure": 0.0, "io_pressure": 0.0, "on_battery": True,
            "interface": "wlan0", "metered": False, "waits": [], "quiet_hours": ["22:00-07:00"],
            "quiet_in_minutes": 7 * 60 + 48,
        },
    }  # fmt: skip
    assert status_lines(facts, now_unix=10_920.0) == shown.splitlines()


def test_facts_are_what_is_shown(tmp_path: Path):
    """The screen asks for nothing that a device does not tell."""
    from covey_device.host.care import Care
    from covey_device.host.decisions import Decisions
    from covey_device.host.words import host_lines

    looked = replace(read(tmp_path), cpu=Pressure(1.0))
    care = Care(lambda: HostConfig(quiet_hours=("22:00-07:00",)), Decisions(None), lambda _: looked)
    assert len(host_lines(care.facts(training=False))) >= 8
