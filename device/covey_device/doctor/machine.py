"""The machine: what it is, what it can, and what Raspberry Pis are known for.

Files of the system are read below a root that tests replace by a tree of their own; what is no file is a
field of `Machine`.
"""

import ctypes
import grp
import os
import pwd
import re
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from covey_device.doctor.findings import Finding, combined

PYTHON = (3, 11)
GLIBC = (2, 28)
"""Of the wheels: manylinux_2_28."""

LEAST_TOTAL_MB = 350
"""A Zero 2 W, with 512 MB of which the graphics take some, shows 416 to 464."""

LEAST_AVAILABLE_MB = 150
"""A service in a round of a model with 430,000 parameters holds up to 130 MB."""

BEGAN_UNIX = 1_767_225_600
"""2026-01-01: no covey was installed before."""

PI_OS = "install the 64-bit Raspberry Pi OS"

UNIT = "covey-device.service"
UNIT_DIRECTORIES = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")

_SD = re.compile(r"mmcblk\d+")
_MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the system, with all groups."""

    name: str
    uid: int
    gids: frozenset[int]


def account_named(name: str) -> Account | None:
    """None if there is no such user."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return Account(name, entry.pw_uid, frozenset(os.getgrouplist(name, entry.pw_gid)))


def account_of(uid: int) -> Account:
    """The user with this number, named or not."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return Account(str(uid), uid, frozenset())
    found = account_named(entry.pw_name)
    return found if found is not None else Account(entry.pw_name, uid, frozenset({entry.pw_gid}))


def group_name(gid: int) -> str:
    """A group's name, or its number."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _glibc() -> tuple[int, ...] | None:
    try:
        told = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return None
    return tuple(map(int, re.findall(r"\d+", told))) or None


def _synchronised() -> bool | None:
    """What the kernel was told of its clock; None if it does not say. Sets nothing: `modes` is zero."""
    timex = ctypes.create_string_buffer(512)
    try:
        state = ctypes.CDLL(None).adjtimex(timex)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != 5  # TIME_ERROR of <sys/timex.h>


@dataclass(frozen=True, slots=True)
class Machine:
    """root: where the system's files are read. kernel: as `uname -m` says. word_bits: of programs.
    glibc: its version; None without. synchronised: what the kernel knows of its clock."""

    root: Path = Path("/")
    kernel: str = field(default_factory=lambda: os.uname().machine)
    word_bits: int = struct.calcsize("P") * 8
    glibc: tuple[int, ...] | None = field(default_factory=_glibc)
    python: tuple[int, ...] = sys.version_info[:3]
    clock: Callable[[], float] = time.time
    synchronised: Callable[[], bool | None] = _synchronised
    account: Callable[[str], Account | None] = account_named
    uid: int = field(default_factory=os.geteuid)

    def text(self, path: str) -> str | None:
        """A file's content, without the zero bytes of a device tree; None if it cannot be read."""
        try:
            data = (self.root / path).read_bytes()
        except OSError:
            return None
        return data.decode("utf-8", "replace").replace("\x00", "")

    @property
    def is_pi(self) -> bool:
        """Whether it calls itself a Raspberry Pi."""
        return "Raspberry Pi" in (self.text("proc/device-tree/model") or "")


def unit_file(machine: Machine) -> str | None:
    """The text of the service's unit; None if none is installed."""
    texts = (machine.text(f"{place}/{UNIT}") for place in UNIT_DIRECTORIES)
    return next((text for text in texts if text is not None), None)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def architecture(machine: Machine) -> Finding:
    """64 bits, of the kernel and of programs, and a glibc that the wheels are for."""
    check, kernel = "architecture", machine.kernel
    if kernel == "aarch64" and machine.word_bits == 32:
        return Finding(
            check, "problem",
            "a 64-bit kernel with 32-bit programs (armhf), for which there are no wheels",
            f"{PI_OS} anew: a setting like arm_64bit=1 changes the kernel alone",
        )  # fmt: skip
    if kernel.startswith("arm") or machine.word_bits == 32:
        return Finding(
            check, "problem",
            f"a 32-bit system ({kernel}), for which there are no wheels",
            f"{PI_OS}; it needs a Pi 3, a Zero 2 W or a later one",
        )  # fmt: skip
    if kernel not in ("aarch64", "x86_64"):
        return Finding(
            check, "note", f"{kernel}, for which no wheels are published",
            "have onnxruntime built for it, or use another machine",
        )  # fmt: skip
    if machine.glibc is None:
        return Finding(
            check, "problem", f"{kernel} without glibc, for which onnxruntime has no wheels",
            f"use a system with glibc {_dotted(GLIBC)} or later; on a Pi, {PI_OS}",
        )  # fmt: skip
    if machine.glibc[:2] < GLIBC:
        return Finding(
            check, "problem",
            f"glibc {_dotted(machine.glibc)}; the wheels need {_dotted(GLIBC)} or later",
            f"use a newer system; on a Pi, {PI_OS} (bookworm or trixie)",
        )  # fmt: skip
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', machine.text("etc/os-release") or "", re.M)
    name = f", {found[1]}" if found else ""
    return Finding(check, "ok", f"{kernel}, 64-bit programs, glibc {_dotted(machine.glibc)}{name}")


def python(machine: Machine) -> Finding:
    """The interpreter's version."""
    if machine.python[:2] < PYTHON:
        return Finding(
            "python", "problem",
            f"Python {_dotted(machine.python)}; covey needs {_dotted(PYTHON)} or later",
            "use Raspberry Pi OS bookworm (3.11) or trixie (3.13), or another newer system",
        )  # fmt: skip
    return Finding("python", "ok", f"Python {_dotted(machine.python)}")


def processor(machine: Machine) -> Finding:
    """What it is, and the instructions that matter."""
    check, text = "processor", machine.text("proc/cpuinfo")
    arm = machine.kernel == "aarch64"
    # Under emulation the file is that of the other architecture, which says nothing of this one.
    found = re.search(rf"^{'Features' if arm else 'flags'}\s*:(.*)$", text or "", re.M)
    if text is None or found is None:
        return Finding(check, "unknown", "/proc/cpuinfo does not say what it can")
    flags = set(found[1].split())
    model = machine.text("proc/device-tree/model")
    named = re.search(r"^(?:Model|model name)\s*:\s*(.+)$", text, re.M)
    cores = len(re.findall(r"^processor\s*:", text, re.M))
    what = (model or (named[1] if named else machine.kernel)).strip()
    what = f"{what}, {cores} core{'s' if cores != 1 else ''}"
    needed, aes = ("asimd", {"aes", "pmull"}) if arm else ("sse4_2", {"aes"})
    if needed not in flags:
        return Finding(
            check, "problem",
            f"{what}, without {needed}, which numpy and onnxruntime are built for",
            "use another machine: this one cannot train",
        )  # fmt: skip
    parts = [Finding(check, "ok", f"{what}, {needed}")]
    if not aes <= flags:
        of_pis = " (Pis before the Pi 5 have none)" if arm else ""
        parts.append(
            Finding(
                check, "note",
                f"no AES instructions{of_pis}: TLS costs a little more; masks are made with "
                "ChaCha20 and do not need them",
            )
        )  # fmt: skip
    if not arm and "avx2" not in flags:
        parts.append(Finding(check, "note", "no AVX2: training is slower than it could be"))
    return combined(check, parts)


def meminfo(machine: Machine) -> dict[str, int]:
    """Of /proc/meminfo, in bytes; empty without."""
    pairs = re.findall(r"^(\w+):\s+(\d+) kB", machine.text("proc/meminfo") or "", re.M)
    return {name: int(kib) * 1024 for name, kib in pairs}


def memory(machine: Machine, max_memory_mb: int | None = None) -> Finding:
    """Total and available. max_memory_mb: what the owner's policy gives, if there is one."""
    check, found = "memory", meminfo(machine)
    if "MemTotal" not in found:
        return Finding(check, "unknown", "/proc/meminfo does not say how much there is")
    total = found["MemTotal"] // _MB
    free = found.get("MemAvailable", found.get("MemFree", 0)) // _MB
    says = f"{total:,} MB, {free:,} MB available"
    parts = [Finding(check, "ok", says)]
    if total < LEAST_TOTAL_MB:
        parts = [
            Finding(
                check, "problem", f"{says}; a device needs a machine of 512 MB",
                "use a Zero 2 W or a larger one",
            )
        ]  # fmt: skip
    elif free < LEAST_AVAILABLE_MB:
        parts = [
            Finding(
                check, "problem", f"{says}; a round can take {LEAST_AVAILABLE_MB} MB",
                "stop what else runs; on a Pi with a desktop, boot to the console (sudo raspi-config, "
                "System Options)",
            )
        ]  # fmt: skip
    if max_memory_mb is not None and max_memory_mb > total - 100:
        parts.append(
            Finding(
                check, "note",
                f"the policy lets a round take {max_memory_mb:,} MB, more than this machine can spare",
                f"set limits.max_memory_mb in policy.toml to {max(150, (total // 2) // 10 * 10)}",
            )
        )  # fmt: skip
    return combined(check, parts)


CMDLINES = ("boot/firmware/cmdline.txt", "boot/cmdline.txt")
ENABLE_MEMORY = "cgroup_enable=memory cgroup_memory=1"


def memory_controller(machine: Machine) -> Finding:
    """Whether the kernel can bound a service's memory: Raspberry Pi OS has that switched off."""
    check = "memory-controller"
    unified = machine.text("sys/fs/cgroup/cgroup.controllers")
    if unified is not None and "memory" in unified.split():
        return Finding(check, "ok", "on: systemd's memory limits work")
    table = machine.text("proc/cgroups") or ""
    listed = re.search(r"^memory\s+\d+\s+\d+\s+(\d)", table, re.M)
    if unified is None:
        if listed is not None and listed[1] == "1":
            return Finding(check, "ok", "on, in the old hierarchy of control groups")
        if listed is None:
            return Finding(check, "unknown", "this system shows no control groups")
    path = next((p for p in CMDLINES if (machine.root / p).exists()), None)
    off = "off: MemoryMax= of the service has no effect, LimitDATA= alone bounds it"
    if path is None:
        return Finding(
            check, "note", off, f"add {ENABLE_MEMORY} to the kernel's command line and restart"
        )
    if "cgroup_enable=memory" in (machine.text(path) or "").split():
        return Finding(check, "note", f"{off}; /{path} switches it on", "restart: sudo reboot")
    return Finding(
        check, "note", off,
        f"add {ENABLE_MEMORY} to the end of the one line of /{path}, and restart",
    )  # fmt: skip


def swap(machine: Machine) -> Finding:
    """Swap on a memory card wears it, and is as slow as it."""
    check, text = "swap", machine.text("proc/swaps")
    if text is None:
        return Finding(check, "unknown", "/proc/swaps cannot be read")
    names = [line.split()[0] for line in text.splitlines()[1:] if line.split()]
    on_card = [name for name in names if _SD.search(_device_of(machine, name))]
    if on_card:
        return Finding(
            check, "note", f"on the memory card ({', '.join(on_card)}), which it wears",
            "swap to compressed memory instead (apt install systemd-zram-generator), then sudo "
            "systemctl disable --now dphys-swapfile",
        )  # fmt: skip
    return Finding(check, "ok", f"{', '.join(names)}, not on a memory card" if names else "none")


def _device_of(machine: Machine, name: str) -> str:
    """The device that a swap partition is, or that a swap file lies on."""
    if name.startswith("/dev/"):
        return name
    mounts = [line.split() for line in (machine.text("proc/mounts") or "").splitlines()]
    holding = [m for m in mounts if len(m) > 1 and Path(name).is_relative_to(m[1])]
    device = max(holding, key=lambda m: len(m[1]), default=[""])[0]
    if device == "/dev/root":  # as a kernel without an initial file system names it
        found = re.search(r"\broot=(\S+)", machine.text("proc/cmdline") or "")
        device = found[1] if found else device
        link = re.fullmatch(r"PARTUUID=(\S+)", device)
        if link:
            try:
                device = (machine.root / "dev/disk/by-partuuid" / link[1]).readlink().name
            except OSError:
                return device
    return device


def clock(machine: Machine, signed_unix: float = 0.0) -> Finding:
    """What time it is, who says so, and what becomes of it without power. signed_unix: the latest time
    that the coordinator signed."""
    check, now = "clock", machine.clock()
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    sync = "sudo timedatectl set-ntp true, and a network that lets NTP through"
    if now < max(BEGAN_UNIX, signed_unix - 86_400):
        return Finding(
            check, "problem", f"it says {shown}, which is long over: no certificate can be judged",
            f"set it: {sync}",
        )  # fmt: skip
    if signed_unix and now > signed_unix + 5 * 365 * 86_400:
        return Finding(
            check, "problem",
            f"it says {shown}, years after the coordinator's last word: certificates seem to have ended",
            f"set it: {sync}",
        )  # fmt: skip
    parts = []
    state = machine.synchronised()
    if state is None and (machine.root / "run/systemd/timesync/synchronized").exists():
        state = True
    if state is None:
        parts.append(
            Finding(check, "unknown", f"{shown}; the kernel does not say whether it is set")
        )
    elif state:
        parts.append(Finding(check, "ok", f"{shown}, synchronised"))
    else:
        parts.append(Finding(check, "note", f"{shown}, not synchronised", sync))
    if not (machine.root / "sys/class/rtc/rtc0").exists():
        parts.append(
            Finding(
                check, "note",
                "no clock that runs without power: after a power cut it is behind until the network "
                "sets it, which covey can live with",
            )
        )  # fmt: skip
    return combined(check, parts)
