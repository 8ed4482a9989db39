"""device.toml: every key, what it refuses, and how it says so."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from config_walk import Key, drop, keys_of, put, wrong_values
from covey_device import config
from covey_device.config import DeviceConfig
from covey_shared.errors import ConfigError

BASE: dict[str, Any] = {
    "fleet": "farm",
    "device": "pi-1",
    "broker": {"url": "mqtt://10.0.0.1"},
    "trust": {"fleet_ca": "a" * 64, "coordinator": "b" * 64},
}
DATA: dict[str | None, dict[str, Any]] = {
    None: {"kind": "npz", "file": "data.npz"},
    "npz": {"kind": "npz", "file": "data.npz"},
    "npy": {"kind": "npy", "features": "x.npy", "labels": "y.npy"},
    "csv": {"kind": "csv", "file": "data.csv", "labels": "label"},
    "idx": {"kind": "idx", "features": "x.idx", "labels": "y.idx"},
    "python": {"kind": "python", "function": "mine:data"},
    "shards": {"kind": "shards", "directory": "data"},
}
KEYS = keys_of(DeviceConfig)


def name_of(key: Key) -> str:
    return f"{key.name}-{key.tag}" if key.tag else key.name


ENROLLED: dict[str, Any] = {
    "broker": {"url": "mqtts://h", "ca_file": "ca", "cert_file": "own", "key_file": "own"},
    "enrol": {"host": "h"},
}


def table_for(key: Key) -> dict[str, Any]:
    enrolled = ENROLLED if key.name.startswith("enrol.") else {}
    return BASE | enrolled | {"data": DATA[key.tag]}


def load(tmp_path: Path, table: dict[str, Any] | str) -> DeviceConfig:
    path = tmp_path / "device.toml"
    path.write_text(table if isinstance(table, str) else tomli_w.dumps(table))
    return config.load(path)


def told(tmp_path: Path, table: dict[str, Any] | str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, table)
    assert str(caught.value).startswith(f"{tmp_path / 'device.toml'}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_kind_of_data_loads(tmp_path: Path):
    for tag, data in DATA.items():
        assert load(tmp_path, BASE | {"data": data}).data.__class__.__struct_config__.tag == (
            tag or "npz"
        )


@pytest.mark.parametrize("key", KEYS, ids=name_of)
def test_each_key_refuses_what_it_cannot_be(tmp_path: Path, key: Key):
    values = wrong_values(key.kind)
    assert values
    for value in values:
        message = told(tmp_path, put(table_for(key), key.name, value))
        assert f"key `{key.name}" in message, value
        assert "must be" in message


@pytest.mark.parametrize("key", KEYS, ids=name_of)
def test_each_key_is_found_by_a_near_miss(tmp_path: Path, key: Key):
    table = table_for(key)
    value = "x"
    message = told(tmp_path, put(table, key.name + "x", value))
    assert f"unknown key `{key.name}x`; did you mean `{key.name}`?" in message


@pytest.mark.parametrize("key", [key for key in KEYS if key.required], ids=name_of)
def test_each_required_key_is_missed(tmp_path: Path, key: Key):
    message = told(tmp_path, drop(table_for(key), key.name))
    assert f"key `{key.name}` is missing; give " in message


@pytest.mark.parametrize("table", ["broker", "trust", "data"])
def test_each_required_table_is_missed(tmp_path: Path, table: str):
    message = told(tmp_path, drop(BASE | {"data": DATA["npz"]}, table))
    assert f"key `{table}` is missing; give a table" in message


def test_a_key_of_another_kind_of_data_is_unknown(tmp_path: Path):
    message = told(tmp_path, BASE | {"data": DATA["npy"] | {"delimiter": ";"}})
    assert "unknown key `data.delimiter`; known here: features, kind" in message


@pytest.mark.parametrize(
    ("scale", "problem"),
    [
        (0, "scale = 0.0: give a number"),
        ("1/0", "scale = '1/0' divides by zero"),
        (1e31, "scale = 1e+31: give a number"),
        ("a half", 'is "a half"; it must be a number, or a fraction in quotes, such as "1/255"'),
    ],
)
def test_a_scale_that_makes_no_sense(tmp_path: Path, scale: object, problem: str):
    message = told(tmp_path, BASE | {"data": DATA["npz"] | {"scale": scale}})
    assert problem in message
    assert "`data" in message


@pytest.mark.parametrize(
    ("broker", "problem"),
    [
        ({"url": "10.0.0.1"}, "key `broker.url`: broker URL ...: it starts with mqtt://"),
        ({"url": ""}, "key `broker.url`: broker URL ...: it starts with mqtt://"),
        ({"url": "mqtt://h:99999"}, "key `broker.url`: broker URL mqtt://h:99999: host or port"),
        (
            {"url": "mqtt://h", "ca_file": "p"},
            "key `broker.ca_file` goes with a `broker.url` of mqtts://",
        ),
        (
            {"url": "mqtt://h", "cert_file": "p", "key_file": "p"},
            "key `broker.cert_file` goes with a `broker.url` of mqtts://",
        ),
        (
            {"url": "mqtts://h", "ca_file": "a", "cert_file": "p"},
            "keys `broker.cert_file` and `broker.key_file` go together",
        ),
        (
            {"url": "mqtts://h", "cert_file": "p", "key_file": "p"},
            "key `broker.ca_file` is missing; `broker.cert_file` goes with it",
        ),
        (
            {"url": "mqtt://h", "password_file": "p"},
            "key `broker.username` is missing; `broker.password_file` goes with it",
        ),
    ],
)
def test_a_broker_that_cannot_be(tmp_path: Path, broker: dict[str, Any], problem: str):
    assert problem in told(tmp_path, BASE | {"data": DATA["npz"], "broker": broker})


def test_a_password_in_a_wrong_url_is_not_shown(tmp_path: Path):
    broker = {"url": "mqtt://me:hunter2@h:port"}
    assert "hunter2" not in told(tmp_path, BASE | {"data": DATA["npz"], "broker": broker})


def test_a_file_that_is_not_toml(tmp_path: Path):
    assert "not TOML" in told(tmp_path, "fleet = farm")


def test_a_file_that_is_missing_says_where_one_comes_from(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "none.toml")
    assert str(caught.value) == (
        f"{tmp_path / 'none.toml'} does not exist; "
        "`covey-device join TOKEN` writes one (for a device on the coordinator's own machine, "
        "`covey device add NAME`)"
    )


def test_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        config.load(tmp_path)
    path = tmp_path / "device.toml"
    path.write_bytes(b"fleet = '\xff'")
    with pytest.raises(ConfigError, match=r"device\.toml cannot be read: it is not UTF-8 text"):
        config.load(path)


@pytest.mark.parametrize("broker", [{}, {"key_file": "another"}])
def test_renewal_wants_key_and_certificate_in_one_file(tmp_path: Path, broker: dict[str, str]):
    broker = ENROLLED["broker"] | broker if broker else BASE["broker"]
    table = BASE | ENROLLED | {"data": DATA["npz"], "broker": broker}
    assert "table `enrol` goes with `broker.cert_file` and `broker.key_file`" in told(
        tmp_path, table
    )
