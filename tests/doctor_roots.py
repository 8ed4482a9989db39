"""Trees of files that look like the root of a machine, for tests of `covey-device doctor`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from covey_device.doctor.machine import Account, Machine

NOW = 1_795_000_000.0  # November 2026

CORTEX_A72 = "fp asimd evtstrm crc32 cpuid"
CORTEX_A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimddp"


def cpuinfo(features: str, cores: int = 4, model: str = "") -> str:
    """As an aarch64 kernel writes it."""
    core = "processor\t: {}\nBogoMIPS\t: 108.00\nFeatures\t: {}\nCPU part\t: 0xd08\n\n"
    text = "".join(core.format(n, features) for n in range(cores))
    return text + (f"Revision\t: c03115\nModel\t\t: {model}\n" if model else "")


def meminfo(total_kb: int, available_kb: int) -> str:
    return (
        f"MemTotal:{total_kb:>16} kB\nMemFree:{available_kb // 2:>16} kB\n"
        f"MemAvailable:{available_kb:>16} kB\nSwapTotal:             0 kB\n"
    )


NO_SWAP = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"

PI_4: dict[str, str] = {
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\n',
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.5\x00",
    "proc/cpuinfo": cpuinfo(CORTEX_A72, 4, "Raspberry Pi 4 Model B Rev 1.5"),
    "proc/meminfo": meminfo(3_884_000, 3_300_000),
    "proc/cgroups": "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t60\t1\nmemory\t0\t60\t0\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n",
    "boot/firmware/cmdline.txt": "console=tty1 root=PARTUUID=4e639091-02 rootfstype=ext4 rootwait\n",
    "proc/cmdline": "root=PARTUUID=4e639091-02 cgroup_disable=memory\n",
    "proc/swaps": NO_SWAP + "/var/swap                               file\t\t524284\t\t0\t\t-2\n",
    "proc/mounts": "/dev/mmcblk0p2 / ext4 rw,noatime 0 0\ntmpfs /run tmpfs rw 0 0\n",
    "run/systemd/system/x": "",
    "run/systemd/timesync/synchronized": "",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48312\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "0\n",
    "proc/pressure/cpu": "some avg10=1.50 avg60=0.00 avg300=0.00 total=0\n",
}

ZERO_2_W: dict[str, str] = PI_4 | {
    "proc/device-tree/model": "Raspberry Pi Zero 2 W Rev 1.0\x00",
    "proc/cpuinfo": cpuinfo("fp asimd evtstrm crc32 cpuid", 4),
    "proc/meminfo": meminfo(426_000, 210_000),
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n",
    "sys/class/thermal/thermal_zone0/temp": "61000\n",
}

PI_5: dict[str, str] = PI_4 | {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\x00",
    "proc/cpuinfo": cpuinfo(CORTEX_A76, 4),
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
    "proc/swaps": NO_SWAP
    + "/dev/zram0                              partition\t2097136\t\t0\t\t100\n",
    "sys/class/rtc/rtc0/name": "rpi-rtc\n",
}


def plant(root: Path, files: Mapping[str, str | None]) -> Path:
    """Make the tree. None leaves a file out."""
    for name, text in files.items():
        path = root / name
        if text is None:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def machine(root: Path, **facts: Any) -> Machine:
    """A Pi with 64-bit bookworm, but for these facts."""
    clock: Callable[[], float] = lambda: NOW  # noqa: E731
    known: dict[str, Any] = {
        "kernel": "aarch64",
        "word_bits": 64,
        "glibc": (2, 36),
        "python": (3, 11, 2),
        "clock": clock,
        "synchronised": lambda: True,
        "account": lambda name: None,
    }
    return Machine(root=root, **(known | facts))


def account(name: str, uid: int, *gids: int) -> Callable[[str], Account | None]:
    """A system that knows one user."""
    return lambda asked: Account(name, uid, frozenset(gids)) if asked == name else None
