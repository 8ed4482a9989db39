"""The service's bound on its own memory: what it comes to on which machine, and that it holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from covey_device.ceiling import (
    CONTROLLER_FIX,
    LEAST_BYTES,
    data_ceiling,
    in_words,
    machine_bytes,
    memory_controller,
)

ZERO_2_W = 427 << 20
PI_4 = 3792 << 20


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_policy_decides_on_a_large_machine_and_the_machine_on_a_small_one():
    assert data_ceiling(400, PI_4) == 2 * 400_000_000 + (64 << 20)
    assert data_ceiling(400, ZERO_2_W) == int(ZERO_2_W * 0.75)
    assert data_ceiling(400, None) == 2 * 400_000_000 + (64 << 20)
    assert data_ceiling(5, PI_4) == LEAST_BYTES
    assert data_ceiling(400, 64 << 20) == LEAST_BYTES


def test_the_units_own_figure_is_the_default_policys():
    from covey_device.config import LimitsConfig

    unit = Path(__file__).parents[2] / "device/covey_device/systemd/covey-device.service"
    (line,) = [x for x in unit.read_text().splitlines() if x.startswith("LimitDATA=")]
    soft, hard = line.removeprefix("LimitDATA=").split(":")
    default = data_ceiling(LimitsConfig().max_memory_mb, None)
    assert abs(int(soft.removesuffix("M")) * (1 << 20) - default) < 40 << 20
    assert hard == "infinity"  # the service may raise it, when policy.toml allows more


@pytest.mark.parametrize(
    ("controllers", "on"),
    [("cpuset cpu io memory pids\n", True), ("cpuset cpu io pids\n", False), (None, None)],
)
def test_the_memory_controller_is_looked_for(tmp_path: Path, controllers: str | None, on):
    if controllers is not None:
        tree(tmp_path, {"sys/fs/cgroup/cgroup.controllers": controllers})
    assert memory_controller(tmp_path) is on
    words = in_words(400_000_000, on)
    assert "at most 400 MB of data (LimitDATA)" in words
    assert (CONTROLLER_FIX in words) == (on is False)
    assert ("and MemoryMax" in words) == (on is True)


def test_the_machines_memory_is_what_its_kernel_counts(tmp_path: Path):
    assert machine_bytes(tree(tmp_path, {"proc/meminfo": "MemTotal:  437124 kB\n"})) == 437124 << 10
    assert machine_bytes(tree(tmp_path, {"proc/meminfo": "MemTotal: many kB\n"})) is None
    assert machine_bytes(tmp_path / "nothing") is None


def child(program: str) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return ended.stdout.split()


def test_an_allocation_beyond_the_bound_is_a_memory_error_and_no_more():
    assert child(
        """
from covey_device.confine import bound_data
bound_data(256 << 20)
kept = bytearray(64 << 20)
try:
    bytearray(512 << 20)
except MemoryError:
    print("refused")
bound_data(1 << 30)
bytearray(512 << 20)
print("allowed")
"""
    ) == ["refused", "allowed"]


def test_a_bound_that_comes_during_a_round_holds_from_its_end_on():
    assert child(
        """
import resource
from covey_device.confine import bound_data, bounded_data
def soft(): return resource.getrlimit(resource.RLIMIT_DATA)[0]
bound_data(900 << 20)
with bounded_data(10 << 20):
    tight = soft()
    bound_data(800 << 20)
    print(soft() == tight < 800 << 20)
print(soft() == 800 << 20)
"""
    ) == ["True", "True"]


def test_a_lower_hard_limit_stays():
    assert child(
        """
import resource
from covey_device.confine import bound_data
resource.setrlimit(resource.RLIMIT_DATA, (300 << 20, 300 << 20))
print(bound_data(900 << 20) >> 20)
print(resource.getrlimit(resource.RLIMIT_DATA)[0] >> 20)
"""
    ) == ["300", "300"]
