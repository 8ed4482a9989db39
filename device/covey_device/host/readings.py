"""What the machine says of itself: heat, voltage, memory, pressure, power, network.

Read from below a root directory, `/` in the field. Nothing here raises: a sensor that is absent, unreadable
or talks nonsense is unknown, which is a fact like any other and not an illness. What follows from readings
is `eligibility`'s business.

Sources: the kernel's documentation of thermal zones, hwmon, power_supply, PSI and /proc/net; Raspberry
Pi's of `get_throttled`.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

MAX_FILE_BYTES = 1 << 16
MAX_ENTRIES = 256
"""Of a directory that are looked at."""

_CPU_ZONES = ("cpu", "soc", "x86_pkg_temp", "core", "k10temp", "zenpower", "package", "tctl")
_OTHER_ZONES = ("wifi", "iwl", "wlan", "bat", "nvme", "ssd", "int3400", "charger", "modem")
"""Parts of names. Of zones that measure a processor the hottest counts; where there is none, the hottest of
the rest, without those that say nothing of the machine's load."""

MIN_C, MAX_C = -40.0, 150.0
"""Beyond these a sensor is broken or absent, whatever it says."""

UNDER_VOLTAGE, CAPPED, THROTTLED, SOFT_LIMIT = 1, 2, 4, 8
"""Bits of `get_throttled` that tell of now; sixteen higher they tell of the time since the start. The soft
limit is a Pi 3B+'s ordinary way of staying near 60 C."""

METERED_NAMES = ("wwan*", "wwp*", "ppp*", "rmnet*", "cdc-wdm*")
METERED_DRIVERS = frozenset(
    {
        "qmi_wwan",
        "cdc_mbim",
        "huawei_cdc_ncm",
        "sierra_net",
        "rndis_host",
        "ipheth",
        "mhi_net",
        "wwan",
    }
)
"""Modems, and telephones on USB. A Pi as a USB gadget has its usb0 by none of these drivers."""

# Flags of routes, from <linux/route.h>.
_RTF_UP = 1
_RTF_REJECT = 0x200


@dataclass(frozen=True, slots=True)
class Pressure:
    """Per cent of the last ten seconds in which something waited, and in which everything did."""

    some: float
    full: float | None = None


@dataclass(frozen=True, slots=True)
class Readings:
    """One look at the machine. None: unknown.

    temperature_c: of the processor. throttle_bits: as the firmware has them. under_voltage: now.
    memory_bytes: available without swapping. on_battery: whether it drains one. interface: of the default
    route. metered: whether traffic by it is known to cost; False says no more than that nothing tells of it.
    """

    temperature_c: float | None = None
    throttle_bits: int | None = None
    under_voltage: bool | None = None
    memory_bytes: int | None = None
    cpu: Pressure | None = None
    memory: Pressure | None = None
    io: Pressure | None = None
    on_battery: bool | None = None
    interface: str | None = None
    metered: bool | None = None

    @property
    def throttled(self) -> bool | None:
        """Whether the processor is held back now, by heat or voltage."""
        bits = self.throttle_bits
        return None if bits is None else bool(bits & (CAPPED | THROTTLED))

    @property
    def under_voltage_since_start(self) -> bool | None:
        """Whether the voltage was too low at some time since the machine started."""
        bits = self.throttle_bits
        return None if bits is None else bool(bits & (UNDER_VOLTAGE << 16))


def read(root: Path = Path("/"), metered_interfaces: tuple[str, ...] = ()) -> Readings:
    """Look at everything once. metered_interfaces: names or patterns besides the known ones."""
    machine = _Machine(os.fspath(root))
    bits = machine.throttle_bits()
    interface, metered = machine.network((*METERED_NAMES, *metered_interfaces))
    return Readings(
        temperature_c=machine.temperature_c(),
        throttle_bits=bits,
        under_voltage=machine.under_voltage(bits),
        memory_bytes=machine.memory_bytes(),
        cpu=machine.pressure("cpu"),
        memory=machine.pressure("memory"),
        io=machine.pressure("io"),
        on_battery=machine.on_battery(),
        interface=interface,
        metered=metered,
    )


class _Machine:
    """Files below a root, read without ever raising."""

    def __init__(self, root: str) -> None:
        self._root = root

    # -- sensors ----------------------------------------------------------------------------------

    def temperature_c(self) -> float | None:
        cpu: list[float] = []
        other: list[float] = []
        for zone in self._entries("sys/class/thermal", "thermal_zone"):
            kind = self._text(f"{zone}/type").lower()
            value = _celsius(self._number(f"{zone}/temp"))
            if value is not None and not any(part in kind for part in _OTHER_ZONES):
                (cpu if any(part in kind for part in _CPU_ZONES) else other).append(value)
        if not cpu:
            cpu += self._hwmon_c()
        return max(cpu or other, default=None)

    def _hwmon_c(self) -> list[float]:
        found = []
        for chip in self._entries("sys/class/hwmon", "hwmon"):
            name = self._text(f"{chip}/name").lower()
            if any(part in name for part in _CPU_ZONES):
                for sensor in self._entries(chip, "temp"):
                    if sensor.endswith("_input"):
                        value = _celsius(self._number(sensor))
                        found += [] if value is None else [value]
        return found

    def throttle_bits(self) -> int | None:
        # Called soc, or soc@ and an address, on all Pis so far.
        places = sorted(
            self._entries("sys/devices/platform", ""), key=lambda path: "/soc" not in path
        )
        for place in places:
            for part in self._entries(place, ""):
                if part.endswith(":firmware"):
                    bits = _whole(self._text(f"{part}/get_throttled"), 16)
                    if bits is not None and 0 <= bits < 1 << 32:
                        return bits
        return None

    def under_voltage(self, throttle_bits: int | None) -> bool | None:
        seen = None if throttle_bits is None else bool(throttle_bits & UNDER_VOLTAGE)
        for chip in self._entries("sys/class/hwmon", "hwmon"):
            if self._text(f"{chip}/name") == "rpi_volt":
                alarm = self._number(f"{chip}/in0_lcrit_alarm")
                if alarm in (0, 1):
                    seen = bool(seen) or alarm == 1
        return seen

    def memory_bytes(self) -> int | None:
        for line in self._text("proc/meminfo").splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] == "MemAvailable:":
                kilobytes = _whole(words[1])
                return None if kilobytes is None or kilobytes < 0 else kilobytes * 1024
        return None

    def pressure(self, of: str) -> Pressure | None:
        shares: dict[str, float] = {}
        for line in self._text(f"proc/pressure/{of}").splitlines():
            kind, *facts = line.split() or [""]
            for fact in facts:
                name, _, value = fact.partition("=")
                if name == "avg10" and (share := _share(value)) is not None:
                    shares[kind] = share
        return Pressure(shares["some"], shares.get("full")) if "some" in shares else None

    def on_battery(self) -> bool | None:
        mains, states = [], []
        for supply in self._entries("sys/class/power_supply", ""):
            kind = self._text(f"{supply}/type")
            if self._text(f"{supply}/scope") == "Device":
                continue  # a mouse's, say
            if kind in ("Battery", "UPS"):
                states.append(self._text(f"{supply}/status"))
            elif kind:
                mains.append(self._number(f"{supply}/online"))
        if any(online is not None and online >= 1 for online in mains):
            return False
        if "Discharging" in states:
            return True
        # An absent plug alone proves nothing: a Pi with a PoE HAT may be fed over USB.
        return False if {"Charging", "Full", "Not charging"} & {*states} else None

    def network(self, patterns: tuple[str, ...]) -> tuple[str | None, bool | None]:
        """-> the interface of the default route, and whether it is one of those. Where IPv4 and IPv6 go
        different ways, one that costs goes before."""
        found = [name for routes in (self._routes4(), self._routes6()) if (name := _best(routes))]
        if not found:
            return None, None
        for name in found:
            if self._metered(name, patterns):
                return name, True
        return found[0], False

    def _metered(self, name: str, patterns: tuple[str, ...]) -> bool:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return True
        if "/" in name or name in (".", ".."):
            return False
        with contextlib.suppress(OSError, ValueError):
            driver = Path(self._root, "sys/class/net", name, "device/driver")
            return driver.readlink().name in METERED_DRIVERS
        return False

    def _routes4(self) -> Iterator[tuple[int, str]]:
        for line in self._text("proc/net/route").splitlines()[1:]:
            words = line.split()
            if len(words) >= 8 and words[1] == words[7] == "00000000":
                flags, metric = _whole(words[3], 16), _whole(words[6])
                if (
                    flags is not None
                    and metric is not None
                    and flags & _RTF_UP
                    and not flags & _RTF_REJECT
                ):
                    yield metric, words[0]

    def _routes6(self) -> Iterator[tuple[int, str]]:
        for line in self._text("proc/net/ipv6_route").splitlines():
            words = line.split()
            if len(words) >= 10 and words[0] == "0" * 32 and words[1] == "00" and words[9] != "lo":
                flags, metric = _whole(words[8], 16), _whole(words[5], 16)
                if (
                    flags is not None
                    and metric is not None
                    and flags & _RTF_UP
                    and not flags & _RTF_REJECT
                ):
                    yield metric, words[9]

    # -- files ------------------------------------------------------------------------------------

    def _entries(self, directory: str, prefix: str) -> list[str]:
        """Paths of what a directory holds, below the root, in a fixed order."""
        try:
            names = sorted(os.listdir(f"{self._root}/{directory}"))  # noqa: PTH208
        except (OSError, ValueError):
            return []
        return [f"{directory}/{name}" for name in names if name.startswith(prefix)][:MAX_ENTRIES]

    def _text(self, path: str) -> str:
        """A file's first bytes as text; empty if it cannot be read."""
        try:
            # Not to wait for whoever would write into a pipe.
            fd = os.open(f"{self._root}/{path}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError):
            return ""
        data = bytearray()
        try:
            # /proc gives no more than a page at a time.
            while len(data) < MAX_FILE_BYTES and (part := os.read(fd, MAX_FILE_BYTES)):
                data += part
        except OSError:
            return ""
        finally:
            os.close(fd)
        return data.decode("ascii", "replace").replace("\0", "").strip()

    def _number(self, path: str) -> int | None:
        return _whole(self._text(path))


def _whole(text: str, base: int = 10) -> int | None:
    """A whole number that a kernel could have written."""
    if len(text) > 20:
        return None
    try:
        return int(text, base)
    except ValueError:
        return None


def _celsius(thousandths: int | None) -> float | None:
    if thousandths is None or not MIN_C <= thousandths / 1000 <= MAX_C:
        return None
    return thousandths / 1000


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0.0 <= share <= 100.0 else None


def _best(routes: Iterator[tuple[int, str]]) -> str | None:
    return min(routes, default=(0, None))[1]
