"""What a machine says of itself: real-looking trees, and everything that may be wrong with files."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covey_device.host.readings import MAX_C, Pressure, Readings, read
from fake_host import FakeHost, container, laptop_on_battery, pi_4, pi_5, zero_2_w

NOTHING = Readings()


def test_a_pi_4_that_is_throttled(tmp_path: Path):
    readings = read(pi_4(tmp_path, celsius=82.3, bits=0x50005).root)
    assert readings == Readings(
        temperature_c=82.3,
        throttle_bits=0x50005,
        under_voltage=True,
        memory_bytes=readings.memory_bytes,
        cpu=Pressure(0.5, 0.0),
        memory=Pressure(0.5, 0.0),
        io=Pressure(0.5, 0.0),
        on_battery=None,
        interface="eth0",
        metered=False,
    )
    assert readings.memory_bytes == pytest.approx(3.1e9, rel=1e-6)
    assert readings.throttled is True
    assert readings.under_voltage_since_start is True


def test_a_pi_5(tmp_path: Path):
    readings = read(pi_5(tmp_path).root)
    assert readings.temperature_c == 48.7  # not the RP1's 91
    assert (readings.throttle_bits, readings.throttled) == (0, False)
    assert readings.under_voltage is readings.under_voltage_since_start is False
    assert readings.cpu is readings.memory is readings.io is None
    assert (readings.interface, readings.metered) == ("wlan0", False)


def test_a_zero_2_w_whose_voltage_was_low_before(tmp_path: Path):
    readings = read(zero_2_w(tmp_path).root)
    assert (readings.throttled, readings.under_voltage) == (False, False)
    assert readings.under_voltage_since_start is True
    assert readings.memory_bytes == pytest.approx(210e6, rel=1e-4)


def test_a_laptop_on_battery_behind_a_telephone(tmp_path: Path):
    readings = read(laptop_on_battery(tmp_path).root)
    assert readings.temperature_c == 61.0  # the package; not the mainboard, the Wi-Fi or a constant
    assert readings.on_battery is True
    assert (readings.interface, readings.metered) == ("enx0", True)
    assert readings.throttled is readings.under_voltage is None


def test_a_container_with_nothing(tmp_path: Path):
    readings = read(container(tmp_path).root)
    assert replace(readings, memory_bytes=None) == NOTHING
    assert read(tmp_path / "not there") == NOTHING


def test_the_soft_limit_of_a_pi_3_is_not_throttling(tmp_path: Path):
    assert read(FakeHost(tmp_path).throttled(0x80008).root).throttled is False
    assert read(FakeHost(tmp_path).throttled(0x2).root).throttled is True


def test_hwmon_where_there_is_no_zone(tmp_path: Path):
    host = FakeHost(tmp_path).hwmon(0, "nvme", temp1_input=80_000)
    assert read(host.root).temperature_c is None
    host.hwmon(1, "k10temp", temp1_input=55_250, temp3_input=57_000, temp1_max=95_000)
    assert read(host.root).temperature_c == 57.0


def test_zones_of_unknown_kind_count_where_there_is_nothing_better(tmp_path: Path):
    host = FakeHost(tmp_path).zone(41.0, "acpitz", 0).zone(90.0, "BAT0", 1)
    assert read(host.root).temperature_c == 41.0


@pytest.mark.parametrize("celsius", [-41.0, MAX_C + 1, 32_767.0])
def test_what_no_processor_has_is_unknown(tmp_path: Path, celsius: float):
    assert read(FakeHost(tmp_path).zone(celsius).root).temperature_c is None


def test_voltage_by_the_other_sensor_alone(tmp_path: Path):
    host = FakeHost(tmp_path).hwmon(0, "rpi_volt", in0_lcrit_alarm=1)
    assert (read(host.root).under_voltage, read(host.root).throttled) == (True, None)
    host.hwmon(0, "rpi_volt", in0_lcrit_alarm="maybe")
    assert read(host.root).under_voltage is None


@pytest.mark.parametrize(
    ("supplies", "on_battery"),
    [
        ({"AC": ("Mains", {"online": 1}), "BAT0": ("Battery", {"status": "Discharging"})}, False),
        ({"AC": ("Mains", {"online": 0}), "BAT0": ("Battery", {"status": "Discharging"})}, True),
        ({"BAT0": ("Battery", {"status": "Discharging"})}, True),
        ({"BAT0": ("Battery", {"status": "Full"})}, False),
        ({"BAT0": ("Battery", {"status": "Unknown"})}, None),
        ({"poe": ("Mains", {"online": 0})}, None),
        ({"usb": ("USB", {"online": 1}), "BAT0": ("Battery", {"status": "Charging"})}, False),
        ({"ups": ("UPS", {"status": "Discharging"})}, True),
        ({"mouse": ("Battery", {"status": "Discharging", "scope": "Device"})}, None),
        ({}, None),
    ],
)
def test_power(tmp_path: Path, supplies: dict[str, tuple[str, dict[str, object]]], on_battery):
    host = FakeHost(tmp_path)
    for name, (kind, files) in supplies.items():
        host.supply(name, kind, **files)
    assert read(host.root).on_battery is on_battery


@pytest.mark.parametrize(
    ("routes", "more", "expected"),
    [
        (("eth0",), (), ("eth0", False)),
        (("wwan0", "eth0"), (), ("wwan0", True)),
        (("eth0", "wwan0"), (), ("eth0", False)),
        (("ppp0",), (), ("ppp0", True)),
        (("wlan1",), ("wlan1",), ("wlan1", True)),
        (("wlan1",), ("wlan*",), ("wlan1", True)),
        (("wlan1",), ("wlan0",), ("wlan1", False)),
        (("usb0",), (), ("usb0", False)),  # a Pi as a USB gadget
    ],
)
def test_the_network(tmp_path: Path, routes, more, expected):
    readings = read(FakeHost(tmp_path).route(*routes).root, more)
    assert (readings.interface, readings.metered) == expected


def test_a_telephone_is_known_by_its_driver(tmp_path: Path):
    host = FakeHost(tmp_path).route("usb0").driver("usb0", "rndis_host")
    assert read(host.root).metered is True


def test_ipv6_goes_its_own_way(tmp_path: Path):
    host = FakeHost(tmp_path).route6("wwan0")
    assert (read(host.root).interface, read(host.root).metered) == ("wwan0", True)
    host.route("eth0")
    assert (read(host.root).interface, read(host.root).metered) == ("wwan0", True)
    host.route6("eth0")
    assert (read(host.root).interface, read(host.root).metered) == ("eth0", False)


def test_many_routes_do_not_hide_the_default_one(tmp_path: Path):
    host = FakeHost(tmp_path).route("eth0")
    table = (host.root / "proc/net/route").read_text()
    other = "".join(f"eth1\t{i:08X}\t0\t0001\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n" for i in range(1, 500))
    head, _, rest = table.partition("\n")
    host.write("proc/net/route", f"{head}\n{other}{rest}")
    assert read(host.root).interface == "eth0"


def all_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def machines(root: Path) -> list[FakeHost]:
    return [
        make(root / make.__name__) for make in (pi_4, pi_5, zero_2_w, laptop_on_battery, container)
    ]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_garbage_in_any_file_is_read_as_something_sane(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    root = tmp_path_factory.mktemp("host")
    host = data.draw(st.sampled_from([pi_4, laptop_on_battery]))(root)
    host.route6("eth0")
    numbers = st.one_of(
        st.integers(-(10**30), 10**30).map(str), st.floats().map(str), st.text(max_size=20)
    )
    garbage = st.one_of(
        st.binary(max_size=200),
        numbers.map(lambda t: t.encode("utf-8", "surrogatepass")),
        st.lists(numbers, max_size=12).map(lambda ws: " ".join(ws).encode("utf-8", "replace")),
        numbers.map(
            lambda n: f"some avg10={n} avg60=1\nMemAvailable: {n} kB".encode("utf-8", "replace")
        ),
    )
    for path in data.draw(st.lists(st.sampled_from(all_files(root)), max_size=4)):
        path.write_bytes(data.draw(garbage))
    readings = read(root)
    if readings.temperature_c is not None:
        assert -40 <= readings.temperature_c <= MAX_C
    if readings.memory_bytes is not None:
        assert readings.memory_bytes >= 0
    for pressure in (readings.cpu, readings.memory, readings.io):
        if pressure is not None:
            assert 0 <= pressure.some <= 100
    assert readings.throttle_bits is None or 0 <= readings.throttle_bits < 1 << 32


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_files_may_be_gone_forbidden_or_something_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    root = tmp_path_factory.mktemp("host")
    machines(root)
    places = sorted(path for path in root.rglob("*") if not path.is_symlink())
    for path in data.draw(st.lists(st.sampled_from(places), max_size=5)):
        if not path.exists():
            continue
        become = data.draw(st.sampled_from(["gone", "forbidden", "directory", "pipe", "loop"]))
        if become == "forbidden":
            path.chmod(0)
            continue
        FakeHost(path.parent).remove(path.name)
        if become == "directory":
            path.mkdir()
        elif become == "pipe":
            os.mkfifo(path)
        elif become == "loop":
            path.symlink_to(path.name)
    for machine in ("pi_4", "pi_5", "zero_2_w", "laptop_on_battery", "container"):
        read(root / machine)
    for path in root.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o700)


def test_errors_at_every_call_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    host = pi_4(tmp_path)
    whole = read(host.root)

    for function in ("open", "read", "listdir"):

        def fail(*_: object, **__: object) -> object:
            raise PermissionError(13, "no")

        with monkeypatch.context() as patch:
            patch.setattr(f"covey_device.host.readings.os.{function}", fail)
            readings = read(host.root)
        assert readings.temperature_c is None
        assert readings.throttle_bits is None
    assert read(host.root) == whole


def test_a_file_without_end_is_left_alone(tmp_path: Path):
    host = pi_4(tmp_path)
    (host.root / "proc/meminfo").unlink()
    (host.root / "proc/meminfo").symlink_to("/dev/zero")
    assert read(host.root).memory_bytes is None
