"""What docs/raspberry-pi.md says of names, places and numbers is what the files and the code say."""

import re
from pathlib import Path

import pytest

import sandboxed
from covey_device.ceiling import CONTROLLER_FIX, data_ceiling
from covey_device.cli import main
from covey_device.config import LimitsConfig
from covey_device.installation import service
from fake_machine import analyze

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/raspberry-pi.md").read_text(encoding="utf-8")
UNIT = ROOT / "device/covey_device/systemd/covey-device.service"
SETTINGS = dict(sandboxed.settings(UNIT))
STEPS = dict(sandboxed.settings(UNIT.with_name("restart-steps.conf")))


def test_every_command_of_the_device_is_one():
    named = set(re.findall(r"(?:^|[`o] ?)covey-device ([a-z][a-z-]+)", PAGE, re.MULTILINE))
    assert named <= set(main.commands), named - set(main.commands)
    assert {"join", "uninstall", "status", "explain", "doctor"} <= named


def test_places_are_those_of_the_installation():
    for place in (
        service.PREFIX, str(service.CONFIG), service.STATE, service.RUNTIME, service.OWN_UNIT,
    ):  # fmt: skip
        assert f"`{place}`" in PAGE, place


@pytest.mark.parametrize("key", ["CPUSchedulingPolicy", "Nice", "CPUWeight", "IOWeight"])
def test_priorities_are_the_units(key: str):
    assert f"`{key}={SETTINGS[key]}`" in PAGE


@pytest.mark.parametrize("key", ["MemoryHigh", "MemoryMax", "OOMScoreAdjust"])
def test_bounds_on_memory_are_the_units(key: str):
    assert re.search(rf"`{key}={SETTINGS[key]}`", PAGE)


def test_times_are_the_units():
    assert SETTINGS["WatchdogSec"] == "15min"
    assert "after 15 minutes (`WatchdogSec=`)" in PAGE
    assert (SETTINGS["RestartSec"], STEPS["RestartSec"]) == ("30s", "10s")
    assert STEPS["RestartMaxDelaySec"] == "10min"
    assert "after 30 seconds, without end; from systemd 254 on (trixie) after 10\nseconds" in PAGE
    assert "after up to 10 minutes" in PAGE
    assert service.STEPS_SINCE == 254


def test_the_exposure_is_what_systemd_finds(tmp_path: Path):
    unit = tmp_path / "covey-device.service"

    def exposure(text: str) -> float:
        unit.write_text(text)
        shown = analyze("security", "--offline=yes", "--no-pager", str(unit)).stdout
        found = re.search(r"exposure level for \S+: ([\d.]+)", shown)
        assert found is not None
        return float(found[1])

    text = UNIT.read_text()
    (whole,) = re.findall(r"gives the unit an exposure of ([\d.]+)", PAGE)
    (closed,) = re.findall(r"brings the exposure to ([\d.]+)", PAGE)
    (drop_in,) = re.findall(r"```ini\n\[Service\]\n(.*?)```", PAGE, re.DOTALL)
    # Releases of systemd count a tenth more or less.
    assert abs(exposure(text) - float(whole)) <= 0.11
    assert abs(exposure(text.replace("[Install]", f"{drop_in}\n[Install]")) - float(closed)) <= 0.11


def test_the_bound_on_data_is_what_the_code_comes_to():
    default = LimitsConfig().max_memory_mb
    rows = re.findall(r"^\| .*? \| about (\d+) MB \| about (\d+) MB \|$", PAGE, re.MULTILINE)
    assert len(rows) == 2
    for machine, bound in rows:
        found = data_ceiling(default, int(machine) * 1_000_000) / 1e6
        assert abs(found - int(bound)) < 10
    (most,) = re.findall(r"^\| Pi 4 or 5.* \| (\d+) MB \|$", PAGE, re.MULTILINE)
    assert int(most) == round(data_ceiling(default, 1_900_000_000) / 1e6)


def test_the_fix_for_the_memory_controller_is_the_services():
    (block,) = re.findall(r"```text\n(cgroup.*)\n```", PAGE)
    assert f"`{block}`" in CONTROLLER_FIX
    assert "/boot/firmware/cmdline.txt" in CONTROLLER_FIX


def test_what_join_prints_is_what_it_prints():
    (shown,) = re.findall(r"```text\n(joined fleet.*?)```", PAGE, re.DOTALL)
    source = (ROOT / "device/covey_device/installation/commands.py").read_text()
    for line in shown.splitlines():
        words = line.split(":")[0].split(" ")[0]
        assert words in source, words
    assert (
        "see it with: systemctl status covey-device; its log: journalctl -u covey-device" in shown
    )
