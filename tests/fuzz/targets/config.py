"""Configuration: device.toml, policy.toml, covey.toml and run.toml, read from files as the programs do.

The first byte of an input chooses the file, the rest is what stands in it.
"""

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from config_walk import keys_of
from covey_coordinator import config as coordinator_config
from covey_coordinator.config import FleetConfig, RunConfig
from covey_device import config as device_config
from covey_device.config import DeviceConfig, PolicyConfig
from covey_device.enrol import toml
from covey_shared.config import parse
from covey_shared.errors import ConfigError
from fuzz.harness import Mutate, Run, Target, expect

_KEY = "ab" * 32
_DEVICE = f"""fleet = "lab"
device = "pi-1"
state = "state"
[broker]
url = "mqtts://coordinator.lan:8883"
ca_file = "broker.ca"
cert_file = "broker.pem"
key_file = "broker.pem"
keepalive_s = 30
[trust]
fleet_ca = "{_KEY}"
coordinator = "{_KEY}"
[enrol]
host = "coordinator.lan"
port = 8884
[data]
"""
_SEEDS = (
    b"d" + _DEVICE.encode() + b'kind = "npz"\nfile = "data.npz"\n',
    b"d" + _DEVICE.encode() + b'kind = "csv"\nfile = "data.csv"\nlabel = "y"\n',
    b'dfleet = "lab"\ndevice = "a"\nbroker.url = "mqtt://u:p@[::1]:1883"\ntrust = {}\ndata.kind = "npy"\n',
    f'pmin_cohort = 5\nrounds_per_day = 3\nplans = ["{_KEY}"]\nowners = ["{_KEY}"]\n[limits]\n'.encode()
    + b"max_batches = 100\nmax_seconds = 1.5\nmax_memory_mb = 0x40\nthreads = 2\n",
    b'cfleet = "lab"\naddress = ["10.0.0.1", "coordinator.lan", "fe80::1"]\n[broker]\nkind = "external"\n'
    b'url = "mqtts://broker:8883"\nusername = "c"\npassword_file = "p"\nca_file = "ca"\n[enrol]\ndays = 9\n',
    b'cfleet = "lab"\n[broker]\nkind = "mosquitto"\nport = 1884\nmax_connections = 100\n',
    b'rplan = "plans/mlp"\nrounds = 3\n[cohort]\ngoal = 9\nminimum = 3\nover_selection = 0.3\n[work]\n'
    b"batches = 3\nhyper = { lr = 0.1, momentum = 1e-3 }\n[encoding]\nvalue_bits = 12\nclip = 0.5\n"
    b'[transcripts]\nkeep = "signatures"\n[evaluation]\nfile = "test.npz"\n',
    b"p# dates and deep things\nmin_cohort = 1979-05-27T07:32:00Z\nlimits = [[[[1]]]]\na.b.c.d = 1_000\n",
    b"p\"quoted \\u00e9 key\" = '''\nmany\nlines'''\n[[limits]]\n[[limits]]\nx = inf\n",
)


def _device(path: Path) -> None:
    device = device_config.load(path)
    # What `covey-device join --force` would write of it is the same configuration.
    again = parse(toml(msgspec.to_builtins(device)), DeviceConfig, file="again")
    expect(again == device, "device.toml written anew says something else")


def _policy(path: Path) -> None:
    policy = device_config.load_policy(path)
    expect(all(policy.in_words()) and bool(policy.facts()), "a policy in words")
    expect(policy.policy.max_weight >= 1, "a policy")


def _fleet(path: Path) -> None:
    fleet = coordinator_config.load_fleet(path.parent)
    expect(0 < fleet.broker_port < 65536, "a port")
    for host in fleet.addresses:
        normal = coordinator_config.normal_host(host)
        expect(coordinator_config.normal_host(normal) == normal, "one spelling of a host")


def _run(path: Path) -> None:
    run = coordinator_config.load(path, RunConfig, hint="write one")
    coordinator_config.check_run(run, file=str(path))


_FILES: dict[bytes, tuple[str, Callable[[Path], None]]] = {
    b"d": ("device.toml", _device),
    b"p": ("policy.toml", _policy),
    b"c": ("covey.toml", _fleet),
    b"r": ("run.toml", _run),
}


@contextlib.contextmanager
def ready() -> Iterator[Run]:
    """A folder in memory, where there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:

        def read(data: bytes) -> list[str]:
            if data[:1] not in _FILES:
                return []
            name, load = _FILES[data[:1]]
            path = Path(folder) / name
            path.write_bytes(data[1:])
            try:
                load(path)
            except ConfigError as error:
                words = str(error)
                expect(name in words, "an error that does not name the file")
                return [f"{name} {words.replace(folder, '')}"]
            return [f"a sound {name}"]

        yield read


def _mutate(data: bytes, longest: int, chance: random.Random, mutate: Mutate) -> bytes:
    """A line changed, left out, doubled; a key that exists, with a value that may be another's."""
    lines = data[1:].split(b"\n")
    at = chance.randrange(len(lines))
    match chance.randrange(6):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, chance.choice(lines))
        case 2:
            lines[at] = mutate(lines[at], min(longest, 2 * len(lines[at]) + 40))
        case 3:
            key, _, _ = lines[at].partition(b"=")
            lines[at] = key + b"= " + chance.choice(_VALUES)
        case 4:
            name = chance.choice(_KEYS)
            lines.insert(0 if b"." in name else at, name + b" = " + chance.choice(_VALUES))
        case _:
            return data[:1] + mutate(data[1:], longest - 1)
    return (data[:1] + b"\n".join(lines))[:longest]


_KEYS = tuple(
    sorted(
        {
            key.name.encode()
            for kind in (DeviceConfig, PolicyConfig, FleetConfig, RunConfig)
            for key in keys_of(kind)
        }
    )
)
_VALUES: tuple[bytes, ...] = (
    b"0", b"1", b"-1", b"3", b"65536", b"9" * 30, b"9" * 5000, b"0x" + b"f" * 5000, b"1e999", b"nan",
    b"0.5", b"true",
    b'""', b'"a"', b'"mqtts://h"', b'"mqtt://h:1"', b'"external"', b'"auto"', b'"npy"', b'"idx"', b"[]",
    b'[""]', b"{}", b"{ a = 1 }", b"1979-05-27", b"07:32:00", b"1979-05-27T07:32:00",
    b'"\\u0000"', b'"a\\nb"',
    b"a" + b".a" * 1200 + b" = 1", b"[" * 300 + b"]" * 300, b'"' + _KEY.encode() + b'"', b'"::1"',
    b'"[::1]"',
)  # fmt: skip


def _seeds() -> Iterator[bytes]:
    yield from _SEEDS
    for value in _VALUES:
        yield b"pmin_cohort = " + value
        yield b"dfleet = " + value
    yield b"pa" + b".a" * 1200 + b" = 1"


def _memory(n: int) -> int:
    # tomllib makes a copy or two of the text and an object of every few characters; an explanation walks the
    # types of all keys. For a dotted key it keeps every beginning of it, which is quadratic: the file is its
    # owner's own, so that is let be.
    return 1024 * 1024 + 400 * n + 5 * n * n


TARGET = Target(
    "config",
    ready,
    memory=_memory,
    seeds=_seeds,
    mutate=_mutate,
    words=(*_KEYS, *(value for value in _VALUES if len(value) < 30)),
    allowed=(ConfigError,),
    longest=6000,
)
