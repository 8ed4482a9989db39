"""`covey-device doctor` on machines of every kind: trees of files that look like theirs."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from covey_device.doctor import disk as disks
from covey_device.doctor import machine as machines
from covey_device.doctor import unit
from covey_device.doctor.disk import Space, disk
from covey_device.doctor.findings import Finding, combined, guarded, worst
from covey_device.doctor.machine import Machine
from covey_device.host.config import HostConfig
from doctor_roots import NO_SWAP, NOW, PI_4, PI_5, ZERO_2_W, machine, meminfo, plant


def all_of(here: Machine, max_memory_mb: int = 400) -> dict[str, Finding]:
    found = [
        machines.architecture(here),
        machines.python(here),
        machines.processor(here),
        machines.memory(here, max_memory_mb),
        machines.memory_controller(here),
        machines.swap(here),
        machines.clock(here),
        unit.sensors(here),
    ]
    return {finding.check: finding for finding in found}


def verdicts(found: dict[str, Finding]) -> dict[str, str]:
    return {check: finding.verdict for check, finding in found.items()}


# -- whole machines ------------------------------------------------------------------------------


def test_a_pi_4_with_bookworm(tmp_path: Path):
    found = all_of(machine(plant(tmp_path, PI_4)))
    assert verdicts(found) == {
        "architecture": "ok",
        "python": "ok",
        "processor": "note",
        "memory": "ok",
        "memory-controller": "note",
        "swap": "note",
        "clock": "note",
        "sensors": "ok",
    }
    assert found["architecture"].says == (
        "aarch64, 64-bit programs, glibc 2.36, Debian GNU/Linux 12 (bookworm)"
    )
    assert found["processor"].says.startswith("no AES instructions (Pis before the Pi 5 have none)")
    assert "Raspberry Pi 4 Model B Rev 1.5, 4 cores, asimd" in found["processor"].says
    assert found["memory"].says == "3,977 MB, 3,379 MB available"
    assert found["memory-controller"].fix == (
        "add cgroup_enable=memory cgroup_memory=1 to the end of the one line of "
        "/boot/firmware/cmdline.txt, and restart"
    )
    assert "/var/swap" in found["swap"].says
    assert "no clock that runs without power" in found["clock"].says
    assert found["sensors"].says.startswith("temperature 48 C, throttling not throttled")


def test_a_pi_5_has_nothing_to_note(tmp_path: Path):
    found = all_of(machine(plant(tmp_path, PI_5), python=(3, 13, 5)))
    assert set(verdicts(found).values()) == {"ok"}, found
    assert re.fullmatch(r"2026-11-\d\d \d\d:\d\d UTC, synchronised", found["clock"].says)
    assert found["swap"].says == "/dev/zram0, not on a memory card"


def test_a_zero_2_w(tmp_path: Path):
    found = all_of(machine(plant(tmp_path, ZERO_2_W)))
    assert found["memory"].verdict == "note"
    assert found["memory"].says.startswith("the policy lets a round take 400 MB, more than")
    assert found["memory"].says.endswith("436 MB, 215 MB available")
    assert found["memory"].fix == "set limits.max_memory_mb in policy.toml to 210"
    assert machines.memory(machine(tmp_path), 210).verdict == "ok"
    # Under-voltage and throttling since the start, not now.
    assert found["sensors"].verdict == "note"
    assert "the voltage was too low since the start" in found["sensors"].says
    assert "power supply" in found["sensors"].fix


def test_an_empty_root_is_unknown_not_ill(tmp_path: Path):
    found = all_of(machine(tmp_path, synchronised=lambda: None))
    assert verdicts(found) == {
        "architecture": "ok",
        "python": "ok",
        "processor": "unknown",
        "memory": "unknown",
        "memory-controller": "unknown",
        "swap": "unknown",
        "clock": "note",
        "sensors": "ok",
    }
    assert "the kernel does not say whether it is set" in found["clock"].says


def test_this_machine_is_looked_at_without_a_word_of_what_is_wrong_with_the_look():
    for finding in all_of(Machine()).values():
        assert finding.verdict in ("ok", "note", "unknown", "problem")
        assert "Error" not in finding.says


# -- one fact at a time --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "says", "fix"),
    [
        (
            {"word_bits": 32},
            "a 64-bit kernel with 32-bit programs (armhf)",
            "install the 64-bit Raspberry Pi OS anew: a setting like arm_64bit=1",
        ),
        ({"kernel": "armv7l", "word_bits": 32}, "a 32-bit system (armv7l)", "it needs a Pi 3"),
        ({"kernel": "armv6l", "word_bits": 32}, "a 32-bit system (armv6l)", "it needs a Pi 3"),
        ({"kernel": "i686", "word_bits": 32}, "a 32-bit system (i686)", "install the 64-bit"),
        ({"glibc": None}, "aarch64 without glibc", "use a system with glibc 2.28"),
        ({"glibc": (2, 24)}, "glibc 2.24; the wheels need 2.28", "use a newer system"),
    ],
)
def test_systems_without_wheels(tmp_path: Path, facts: dict[str, object], says: str, fix: str):
    found = machines.architecture(machine(tmp_path, **facts))
    assert found.verdict == "problem"
    assert found.says.startswith(says)
    assert fix in found.fix


def test_another_processor_is_noted(tmp_path: Path):
    assert machines.architecture(machine(tmp_path, kernel="riscv64")).verdict == "note"


def test_an_old_python(tmp_path: Path):
    found = machines.python(machine(tmp_path, python=(3, 9, 2)))
    assert (found.verdict, found.says) == ("problem", "Python 3.9.2; covey needs 3.11 or later")
    assert "bookworm" in found.fix


@pytest.mark.parametrize(
    ("flags", "verdict", "says"),
    [
        ("fpu sse4_2 aes avx2", "ok", "Some Xeon, 1 core, sse4_2"),
        ("fpu sse4_2 avx2", "note", "no AES instructions: TLS costs a little more"),
        ("fpu sse4_2 aes", "note", "no AVX2: training is slower"),
        ("fpu sse2", "problem", "Some Xeon, 1 core, without sse4_2"),
    ],
)
def test_x86_processors(tmp_path: Path, flags: str, verdict: str, says: str):
    text = f"processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: {flags}\n"
    found = machines.processor(machine(plant(tmp_path, {"proc/cpuinfo": text}), kernel="x86_64"))
    assert found.verdict == verdict
    assert found.says.startswith(says)


def test_an_arm_without_neon(tmp_path: Path):
    text = "processor\t: 0\nFeatures\t: fp crc32\n"
    found = machines.processor(machine(plant(tmp_path, {"proc/cpuinfo": text})))
    assert found.verdict == "problem"
    assert "without asimd" in found.says


def test_under_emulation_the_file_is_anothers(tmp_path: Path):
    text = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu sse4_2\n"
    found = machines.processor(machine(plant(tmp_path, {"proc/cpuinfo": text})))
    assert found == Finding("processor", "unknown", "/proc/cpuinfo does not say what it can")


@pytest.mark.parametrize(
    ("total", "available", "verdict", "says"),
    [
        (260_000, 200_000, "problem", "a device needs a machine of 512 MB"),
        (900_000, 100_000, "problem", "a round can take 150 MB"),
        (900_000, 200_000, "ok", "921 MB, 204 MB available"),
    ],
)
def test_memory(tmp_path: Path, total: int, available: int, verdict: str, says: str):
    plant(tmp_path, {"proc/meminfo": meminfo(total, available)})
    found = machines.memory(machine(tmp_path))
    assert found.verdict == verdict
    assert says in found.says
    assert bool(found.fix) == (verdict == "problem")


OFF = {"sys/fs/cgroup/cgroup.controllers": "cpu io pids\n"}


@pytest.mark.parametrize(
    ("files", "verdict", "says", "fix"),
    [
        ({"sys/fs/cgroup/cgroup.controllers": "cpu memory pids"}, "ok", "on: systemd's", ""),
        ({"proc/cgroups": "cpu\t1\t9\t1\nmemory\t5\t9\t1\n"}, "ok", "on, in the old", ""),
        (
            {"proc/cgroups": "memory\t0\t9\t0\n"},
            "note",
            "off: MemoryMax=",
            "the kernel's command line",
        ),
        (OFF, "note", "off: MemoryMax=", "the kernel's command line"),
        (OFF | {"boot/cmdline.txt": "a b\n"}, "note", "off: MemoryMax=", "of /boot/cmdline.txt,"),
        (
            OFF | {"boot/firmware/cmdline.txt": "a cgroup_enable=memory cgroup_memory=1\n"},
            "note",
            "off: MemoryMax= of the service has no effect, LimitDATA= alone bounds it; "
            "/boot/firmware/cmdline.txt switches it on",
            "restart: sudo reboot",
        ),
    ],
)
def test_the_memory_controller(
    tmp_path: Path, files: dict[str, str], verdict: str, says: str, fix: str
):
    found = machines.memory_controller(machine(plant(tmp_path, files)))
    assert found.verdict == verdict
    assert found.says.startswith(says)
    assert fix in found.fix


@pytest.mark.parametrize(
    ("files", "verdict"),
    [
        ({"proc/swaps": NO_SWAP}, "ok"),
        ({"proc/swaps": NO_SWAP + "/dev/zram0 partition 1 0 100\n"}, "ok"),
        ({"proc/swaps": NO_SWAP + "/dev/mmcblk0p3 partition 1 0 -2\n"}, "note"),
        (
            {
                "proc/swaps": NO_SWAP + "/var/swap file 1 0 -2\n",
                "proc/mounts": "/dev/sda1 / ext4 rw 0 0\n",
            },
            "ok",
        ),
        (
            {
                "proc/swaps": NO_SWAP + "/data/swap file 1 0 -2\n",
                "proc/mounts": "/dev/mmcblk0p2 / ext4 rw 0 0\n/dev/sda1 /data ext4 rw 0 0\n",
            },
            "ok",
        ),
        (
            {
                "proc/swaps": NO_SWAP + "/var/swap file 1 0 -2\n",
                "proc/mounts": "/dev/root / ext4 rw 0 0\n",
                "proc/cmdline": "root=/dev/mmcblk0p2 rw\n",
            },
            "note",
        ),
    ],
)
def test_swap_on_a_memory_card(tmp_path: Path, files: dict[str, str], verdict: str):
    found = machines.swap(machine(plant(tmp_path, files)))
    assert found.verdict == verdict
    assert ("zram" in found.fix) == (verdict == "note")


def test_swap_on_a_partition_that_the_kernel_knows_by_number(tmp_path: Path):
    plant(
        tmp_path,
        {
            "proc/swaps": NO_SWAP + "/var/swap file 1 0 -2\n",
            "proc/mounts": "/dev/root / ext4 rw 0 0\n",
            "proc/cmdline": "root=PARTUUID=4e639091-02 rw\n",
        },
    )
    assert machines.swap(machine(tmp_path)).verdict == "ok"
    links = tmp_path / "dev/disk/by-partuuid"
    links.mkdir(parents=True)
    (links / "4e639091-02").symlink_to("../../mmcblk0p2")
    assert machines.swap(machine(tmp_path)).verdict == "note"


@pytest.mark.parametrize(
    ("now", "signed", "state", "verdict", "says"),
    [
        (NOW, 0.0, True, "ok", "synchronised"),
        (NOW, 0.0, False, "note", "not synchronised"),
        (0.0, 0.0, True, "problem", "it says 1970-01-01 00:00 UTC, which is long over"),
        (NOW, NOW + 2 * 86_400, True, "problem", "which is long over"),
        (NOW, NOW + 3600, True, "ok", "synchronised"),
        (NOW + 10**9, NOW, True, "problem", "years after the coordinator's last word"),
        (NOW + 10**9, 0.0, True, "ok", "synchronised"),
    ],
)
def test_clocks(tmp_path: Path, now: float, signed: float, state: bool, verdict: str, says: str):
    plant(tmp_path, {"sys/class/rtc/rtc0/name": "x"})
    here = machine(tmp_path, clock=lambda: now, synchronised=lambda: state)
    found = machines.clock(here, signed)
    assert found.verdict == verdict
    assert says in found.says
    assert bool(found.fix) == (verdict != "ok")


def test_the_kernels_own_word_on_its_clock_is_read_and_nothing_set():
    assert machines._synchronised() in (True, False, None)


@pytest.mark.parametrize(
    ("bits", "temperature", "verdict", "says"),
    [
        ("0", "45000", "ok", "voltage in order"),
        ("1", "45000", "problem", "the voltage is too low"),
        ("4", "45000", "note", "the processor is held back"),
        ("0", "85000", "note", "too hot to train"),
        ("10000", "45000", "note", "the voltage was too low since the start"),
    ],
)
def test_sensors(tmp_path: Path, bits: str, temperature: str, verdict: str, says: str):
    plant(
        tmp_path,
        PI_5
        | {
            "sys/devices/platform/soc/soc:firmware/get_throttled": bits,
            "sys/class/thermal/thermal_zone0/temp": temperature,
        },
    )
    found = unit.sensors(machine(tmp_path))
    assert found.verdict == verdict
    assert says in found.says
    assert bool(found.fix) == (verdict != "ok")


@pytest.mark.parametrize(
    ("conditions", "verdict", "says"),
    [
        (HostConfig(), "ok", "temperature 48 C"),
        (HostConfig(require=("power",)), "problem", "power is unknown here, and host.require"),
        (HostConfig(require=("temperature",)), "ok", "temperature 48 C"),
        (HostConfig(start_below_c=40.0), "note", "would not train now: 48.3 C, not until below 40"),
        (HostConfig(quiet_hours=("00:00-23:59",)), "note", "within 00:00-23:59"),
        (HostConfig(metered_interfaces=("wlan*",)), "note", "wlan0 is metered"),
        (HostConfig(cpu_pressure=1.0), "ok", "temperature 48 C"),  # it may be ours
    ],
)
def test_the_owners_conditions(tmp_path: Path, conditions: HostConfig, verdict: str, says: str):
    route = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
    route += "wlan0 00000000 0101A8C0 0003 0 0 600 00000000 0 0 0\n"
    found = unit.sensors(machine(plant(tmp_path, PI_5 | {"proc/net/route": route})), conditions)
    assert found.verdict == verdict, found
    assert says in found.says
    assert bool(found.fix) == (verdict != "ok")


# -- the disk ------------------------------------------------------------------------------------

ROOMY = Space(10**10, 10**6, False)


def test_a_sound_disk_is_left_as_it_was(tmp_path: Path):
    (tmp_path / "there").write_text("x")
    found = disk(tmp_path / "state" / "of" / "a" / "device")
    assert found.verdict == "ok"
    assert re.fullmatch(
        rf"[\d,]+ MB free at {tmp_path}, 1 MB written and synced in \d+\.\d\d s", found.says
    )
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("number", "serves", "verdict", "says"),
    [
        (errno.ENOSPC, False, "problem", "is full: 1 MB could not be written"),
        (errno.EDQUOT, False, "problem", "is full: 1 MB could not be written"),
        (errno.EROFS, False, "problem", "is read-only"),
        (errno.EIO, False, "problem", "Input/output error"),
        (errno.EACCES, False, "unknown", "this user may not write to"),
        (errno.EACCES, True, "problem", "the service's user may not write to"),
    ],
)
@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_disk_that_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    serves: bool,
    verdict: str,
    says: str,
):
    real = os.open

    def fail(*arguments: object) -> int:
        if call == "open" and not arguments[1] & os.O_CREAT:  # type: ignore[operator]
            return real(*arguments)  # type: ignore[arg-type]
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(disks.os, call, fail)
        found = disk(tmp_path, space=lambda path: ROOMY, serves=serves)
    assert found.verdict == verdict
    assert says in found.says
    assert found.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("space", "seconds", "verdict", "says"),
    [
        (ROOMY, 0.1, "ok", "1 MB written and synced in 0.10 s"),
        (Space(20_000_000, None, False), 0.1, "problem", "less than 50 MB is free"),
        (Space(200_000_000, 5000, False), 0.1, "note", "little is free"),
        (Space(10**10, 5, False), 0.1, "problem", "only 5 files more can be made"),
        (Space(10**10, 5000, True), 0.1, "problem", "is read-only"),
        (ROOMY, 3.0, "note", "that is slow"),
    ],
)
def test_what_is_left_of_a_disk(
    tmp_path: Path, space: Space, seconds: float, verdict: str, says: str
):
    moments = iter((0.0, seconds))
    found = disk(
        tmp_path, space=lambda path: space, write=lambda path: None, clock=lambda: next(moments)
    )
    assert found.verdict == verdict
    assert says in found.says
    assert bool(found.fix) == (verdict != "ok")


MOUNTED = """
import subprocess, sys
from pathlib import Path
place = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", sys.argv[2], "none", place], check=True)
if sys.argv[3] == "full":
    (place / "filler").write_bytes(bytes(3_900_000))
    before = sorted(place.iterdir())
from covey_device.doctor.disk import disk
print(disk(place / "state").line())
assert sys.argv[3] != "full" or sorted(place.iterdir()) == before
"""


def may_mount() -> bool:
    """Whether this machine lets us mount a small disk. What it does to a check, the errors above do too."""
    tried = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(tried, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("options", "state", "says"),
    [
        ("size=4m", "full", "is full: 1 MB could not be written. Fix: free some space there"),
        ("ro,size=4m", "empty", "is read-only. Fix: look for errors of the card"),
    ]
    if may_mount()
    else [],
)
def test_a_real_file_system_that_is_full_or_read_only(
    tmp_path: Path, options: str, state: str, says: str
):
    done = subprocess.run(
        ["unshare", "-Urm", sys.executable, "-c", MOUNTED, tmp_path, options, state],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("problem  disk: ")
    assert says in done.stdout


# -- systemd -------------------------------------------------------------------------------------

INSTALLED = {
    "run/systemd/system/x": "",
    "etc/systemd/system/covey-device.service": "[Service]\nUser=covey-device\n",
}
SOUND = {
    "LoadState": "loaded", "UnitFileState": "enabled", "ActiveState": "active", "MainPID": "42",
    "NRestarts": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "verdict", "says"),
    [
        ({}, "ok", "enabled, running"),
        ({"ActiveState": "failed", "Result": "watchdog"}, "problem", "it failed (watchdog)"),
        ({"ActiveState": "inactive"}, "problem", "it does not run (inactive)"),
        ({"UnitFileState": "disabled"}, "problem", "it does not start with the machine"),
        ({"UnitFileState": "masked"}, "problem", "is masked"),
        ({"LoadState": "error"}, "problem", "is error"),
        ({"NRestarts": "12"}, "note", "it was restarted 12 times"),
        ({"ActiveState": "activating", "SubState": "auto-restart"}, "note", "auto-restart"),
    ],
)
def test_the_service(tmp_path: Path, changes: dict[str, str], verdict: str, says: str):
    here = machine(plant(tmp_path, INSTALLED))
    found, pid = unit.service(here, "stopped", lambda: SOUND | changes)
    assert found.verdict == verdict
    assert says in found.says
    assert bool(found.fix) == (verdict != "ok")
    assert pid == 42


@pytest.mark.parametrize(
    ("files", "running", "verdict", "says"),
    [
        ({}, "stopped", "note", "does not run systemd"),
        ({}, "running", "note", "does not run systemd; a covey-device runs without it"),
        ({"run/systemd/system/x": ""}, "stopped", "note", "covey-device.service is not installed"),
        (INSTALLED, "stopped", "unknown", "systemctl does not answer"),
    ],
)
def test_no_service(
    tmp_path: Path, files: dict[str, str], running: unit.Running, verdict: str, says: str
):
    found, pid = unit.service(machine(plant(tmp_path, files)), running, lambda: None)
    assert (found.verdict, pid) == (verdict, None)
    assert says in found.says


LIMITS = "Limit  Soft Limit  Hard Limit  Units\nMax data size   864000000   unlimited   bytes\n"


@pytest.mark.parametrize(
    ("files", "verdict", "says"),
    [
        (
            {
                "proc/42/cgroup": "0::/system.slice/covey-device.service\n",
                "sys/fs/cgroup/system.slice/covey-device.service/memory.max": "700000000\n",
                "sys/fs/cgroup/system.slice/covey-device.service/memory.high": "600000000\n",
                "sys/fs/cgroup/system.slice/memory.max": "max\n",
                "proc/42/limits": LIMITS,
            },
            "ok",
            "600 MB by its control group and 864 MB of data (LimitDATA)",
        ),
        (
            {
                "proc/42/cgroup": "0::/system.slice/covey-device.service\n",
                "sys/fs/cgroup/system.slice/memory.max": "300000000\n",
                "proc/42/limits": LIMITS,
            },
            "note",
            "the policy lets a round take 400 MB, more than that",
        ),
        (
            {"proc/42/cgroup": "0::/system.slice/covey-device.service\n", "proc/42/limits": LIMITS},
            "ok",
            "memory of the service: 864 MB of data (LimitDATA)",
        ),
        (
            {
                "proc/42/cgroup": "4:memory:/box\n0::/\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "500000000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            "ok",
            "500 MB by its control group",
        ),
        ({"proc/42/cgroup": "0::/\n"}, "note", "nothing bounds the memory of the service"),
        ({}, "unknown", "/proc/42 does not show them"),
    ],
)
def test_what_bounds_the_service(tmp_path: Path, files: dict[str, str], verdict: str, says: str):
    found = unit.limits(machine(plant(tmp_path, files)), 42, 400)
    assert found.verdict == verdict
    assert says in found.says


# -- findings ------------------------------------------------------------------------------------


def test_a_finding_is_one_line_with_its_fix():
    assert Finding("disk", "problem", "it is full", "free some").line() == (
        "problem  disk: it is full. Fix: free some"
    )
    assert Finding("disk", "ok", "2 MB").line() == "ok       disk: 2 MB"


def test_the_gravest_of_several_is_what_a_check_says():
    assert worst([]) == "ok"
    assert worst(["ok", "unknown"]) == "unknown"
    both = combined(
        "x",
        [
            Finding("x", "ok", "a"),
            Finding("x", "problem", "b", "f"),
            Finding("x", "note", "c", "f"),
        ],
    )
    assert both == Finding("x", "problem", "b; c; a", "f")


def test_a_check_that_fails_itself_is_unknown():
    def look() -> Finding:
        raise KeyError("gone")

    (found,) = guarded("swap", look)
    assert (found.check, found.verdict) == ("swap", "unknown")
    assert "KeyError" in found.says
