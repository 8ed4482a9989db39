"""Machines as their files in /sys and /proc show them: what a kernel would say, written into a directory."""

import shutil
from pathlib import Path
from typing import Any

ROUTE_HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"


class FakeHost:
    """A root directory. Without anything it is a machine of which nothing is known."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def write(self, path: str, text: str | bytes) -> Path:
        """A whole file in place of what is there, as a reader sees sysfs: never half of one."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(file.name + "~")
        fresh.write_bytes(text if isinstance(text, bytes) else text.encode())
        fresh.replace(file)
        return file

    def remove(self, path: str) -> None:
        at = self.root / path
        if at.is_dir() and not at.is_symlink():
            shutil.rmtree(at)
        else:
            at.unlink(missing_ok=True)

    def zone(self, celsius: float, kind: str = "cpu-thermal", number: int = 0) -> "FakeHost":
        at = f"sys/class/thermal/thermal_zone{number}"
        self.write(f"{at}/type", f"{kind}\n")
        self.write(f"{at}/temp", f"{round(celsius * 1000)}\n")
        return self

    def hwmon(self, number: int, name: str, **files: Any) -> "FakeHost":
        self.write(f"sys/class/hwmon/hwmon{number}/name", f"{name}\n")
        for file, value in files.items():
            self.write(f"sys/class/hwmon/hwmon{number}/{file}", f"{value}\n")
        return self

    def throttled(self, bits: int, soc: str = "soc") -> "FakeHost":
        self.write(f"sys/devices/platform/{soc}/{soc}:firmware/get_throttled", f"{bits:x}\n")
        return self

    def memory(self, available_mb: float, total_mb: float = 4000) -> "FakeHost":
        total, available = round(total_mb * 1000), round(available_mb * 1e6 / 1024)
        self.write(
            "proc/meminfo",
            f"MemTotal: {total:>14} kB\nMemFree: {available // 2:>14} kB\nMemAvailable: {available:>10} kB\n",
        )
        return self

    def pressure(self, of: str, some: float, full: float = 0.0) -> "FakeHost":
        self.write(
            f"proc/pressure/{of}",
            f"some avg10={some:.2f} avg60=0.00 avg300=0.00 total=0\n"
            f"full avg10={full:.2f} avg60=0.00 avg300=0.00 total=0\n",
        )
        return self

    def supply(self, name: str, kind: str, **files: Any) -> "FakeHost":
        self.write(f"sys/class/power_supply/{name}/type", f"{kind}\n")
        for file, value in files.items():
            self.write(f"sys/class/power_supply/{name}/{file}", f"{value}\n")
        return self

    def route(self, *interfaces: str) -> "FakeHost":
        """Default routes, the first the preferred one."""
        lines = [
            f"{name}\t00000000\t0101A8C0\t0003\t0\t0\t{100 * rank}\t00000000\t0\t0\t0\n"
            f"{name}\t0001A8C0\t00000000\t0001\t0\t0\t{100 * rank}\t00FFFFFF\t0\t0\t0\n"
            for rank, name in enumerate(interfaces, 1)
        ]
        self.write("proc/net/route", ROUTE_HEAD + "".join(reversed(lines)))
        return self

    def route6(self, interface: str, metric: int = 0x400) -> "FakeHost":
        zero = "0" * 32
        self.write(
            "proc/net/ipv6_route",
            f"{zero} 00 {zero} 00 fe80{'0' * 27}1 {metric:08x} 00000001 00000000 00000003 {interface:>8}\n"
            f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo\n",
        )
        return self

    def driver(self, interface: str, name: str) -> "FakeHost":
        device = self.root / "sys/class/net" / interface / "device"
        device.mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(f"../../../../../../bus/usb/drivers/{name}")
        return self


def pi_4(root: Path, *, celsius: float = 55.0, bits: int = 0) -> FakeHost:
    """Raspberry Pi OS bookworm, wired."""
    host = FakeHost(root).zone(celsius).throttled(bits).memory(3100).route("eth0", "wlan0")
    host.hwmon(0, "cpu_thermal", temp1_input=round(celsius * 1000))
    host.hwmon(1, "rpi_volt", in0_lcrit_alarm=bits & 1)
    for of in ("cpu", "memory", "io"):
        host.pressure(of, 0.5)
    return host


def pi_5(root: Path) -> FakeHost:
    """With its fan, the RP1's own sensor, and pressure that its kernel does not report."""
    host = (
        FakeHost(root).zone(48.7).throttled(0, "soc@107c000000").memory(7400, 8000).route("wlan0")
    )
    host.hwmon(0, "cpu_thermal", temp1_input=48_700).hwmon(1, "rp1_adc", temp1_input=91_000)
    return host.hwmon(2, "pwmfan", fan1_input=2400).hwmon(3, "rpi_volt", in0_lcrit_alarm=0)


def zero_2_w(root: Path) -> FakeHost:
    """512 MB, most of it in use; on Wi-Fi."""
    host = FakeHost(root).zone(51.5).throttled(0x50000).memory(210, 427).route("wlan0")
    return host.hwmon(0, "rpi_volt", in0_lcrit_alarm=0)


def laptop_on_battery(root: Path) -> FakeHost:
    """Unplugged, with a wireless mouse of its own battery, online by a telephone on USB."""
    host = FakeHost(root).zone(20.0, "INT3400 Thermal", 0).zone(61.0, "x86_pkg_temp", 1)
    host.zone(27.8, "acpitz", 2).zone(64.0, "iwlwifi_1", 3).memory(9000, 16000)
    host.supply("AC", "Mains", online=0).supply(
        "BAT0", "Battery", status="Discharging", capacity=61
    )
    host.supply("hidpp_battery_0", "Battery", status="Full", scope="Device")
    return host.route("enx0", "wlan0").driver("enx0", "rndis_host")


def container(root: Path) -> FakeHost:
    """No /sys and hardly a /proc."""
    return FakeHost(root).memory(24_000, 32_000)
