"""covey.toml and run.toml: every key, what it refuses, and how it says so."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from config_walk import Key, drop, keys_of, put, wrong_values
from covey_coordinator import config
from covey_coordinator.config import (
    CohortConfig,
    DeadlinesConfig,
    EncodingConfig,
    FleetConfig,
    RunConfig,
)
from covey_shared.errors import ConfigError
from covey_shared.fixedpoint import Encoding

FILES: dict[str, tuple[Any, dict[str, Any]]] = {
    "covey.toml": (FleetConfig, {"fleet": "farm"}),
    "run.toml": (RunConfig, {"plan": "plans/mlp", "evaluation": {"file": "test.npz"}}),
}
KEYS = [(file, key) for file, (kind, _) in FILES.items() for key in keys_of(kind)]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Key) else str(value)


def load(tmp_path: Path, file: str, table: dict[str, Any]) -> Any:
    path = tmp_path / file
    path.write_text(tomli_w.dumps(table))
    return config.load(path, FILES[file][0], hint="make one")


def told(tmp_path: Path, file: str, table: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, file, table)
    assert str(caught.value).startswith(f"{tmp_path / file}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_required_is_enough(tmp_path: Path):
    assert load(tmp_path, "covey.toml", {"fleet": "farm"}).broker_port == 1883
    run = load(tmp_path, "run.toml", {"plan": "p"})
    assert (run.rounds, run.evaluation, run.cohort) == (20, None, CohortConfig())


@pytest.mark.parametrize(("file", "key"), KEYS, ids=name_of)
def test_each_key_refuses_what_it_cannot_be(tmp_path: Path, file: str, key: Key):
    values = wrong_values(key.kind)
    assert values
    for value in values:
        message = told(tmp_path, file, put(FILES[file][1], key.name, value))
        assert f"key `{key.name}" in message, value
        assert "must be" in message


@pytest.mark.parametrize(("file", "key"), KEYS, ids=name_of)
def test_each_key_is_found_by_a_near_miss(tmp_path: Path, file: str, key: Key):
    message = told(tmp_path, file, put(FILES[file][1], key.name + "x", "x"))
    assert f"unknown key `{key.name}x`; did you mean `{key.name}`?" in message


@pytest.mark.parametrize(("file", "key"), [k for k in KEYS if k[1].required], ids=name_of)
def test_each_required_key_is_missed(tmp_path: Path, file: str, key: Key):
    message = told(tmp_path, file, drop(FILES[file][1], key.name))
    assert f"key `{key.name}` is missing; give " in message


def test_a_missing_file_says_where_one_comes_from(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        config.load_fleet(tmp_path)
    assert (
        str(caught.value) == f"{tmp_path / 'covey.toml'} does not exist; `covey init` makes a fleet"
    )


def test_an_unreadable_file_says_why(tmp_path: Path):
    (tmp_path / "covey.toml").mkdir()
    with pytest.raises(ConfigError, match=r"covey\.toml cannot be read: Is a directory"):
        config.load_fleet(tmp_path)
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"run\.toml cannot be read: it is not UTF-8 text"):
        config.load(path, RunConfig, hint="make one")


@pytest.mark.parametrize(
    ("broker", "problem"),
    [
        ({"kind": "external"}, 'key `broker.url` goes with `broker.kind = "external"`'),
        ({"ca_file": "ca"}, "key `broker.ca_file` goes with a `broker.url` of mqtts://"),
        (
            {"kind": "external", "url": "mqtt://h", "ca_file": "ca"},
            "key `broker.ca_file` goes with a `broker.url` of mqtts://",
        ),
        (
            {"kind": "external", "url": "mqtt://h", "cert_file": "c", "key_file": "k"},
            "key `broker.cert_file` goes with a `broker.url` of mqtts://",
        ),
        (
            {"kind": "external", "url": "mqtts://h", "key_file": "k"},
            "keys `broker.cert_file` and `broker.key_file` go together",
        ),
        ({"url": "mqtt://h"}, 'key `broker.url` goes with `broker.kind = "external"`'),
        (
            {"kind": "external", "url": "http://h"},
            "key `broker.url`: broker URL http://h: it starts",
        ),
    ],
)
def test_brokers_that_cannot_be(tmp_path: Path, broker: dict[str, Any], problem: str):
    (tmp_path / "covey.toml").write_text(tomli_w.dumps({"fleet": "farm", "broker": broker}))
    with pytest.raises(ConfigError) as caught:
        config.load_fleet(tmp_path)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'covey.toml'}: ")


def test_a_minimum_above_the_goal_is_refused():
    run = RunConfig(plan="p", cohort=CohortConfig(goal=3, minimum=4))
    with pytest.raises(
        ConfigError, match=r"f: key `cohort.minimum` is 4, above `cohort.goal` \(3\)"
    ):
        config.check_run(run, file="f")
    config.check_run(RunConfig(plan="p", cohort=CohortConfig(goal=4, minimum=4)), file="f")


@given(
    value_bits=st.integers(4, 24),
    clip=st.floats(1e-9, 1e9),
    loss_clip=st.floats(1e-9, 1e9),
    max_weight=st.integers(1, 2**31),
    n=st.integers(2, 128),
    gather_s=st.floats(1e-9, 2_592_000),
)
def test_whatever_passes_can_be_encoded_and_sent(
    value_bits: int, clip: float, loss_clip: float, max_weight: int, n: int, gather_s: float
):
    """Else a run would fail in its first round, in front of the devices."""
    run = config.config.convert(
        {
            "plan": "p",
            "encoding": {
                "value_bits": value_bits,
                "clip": clip,
                "loss_clip": loss_clip,
                "max_weight": max_weight,
            },
            "deadlines": {"gather_s": gather_s},
        },
        RunConfig,
        file="run.toml",
    )
    kept: EncodingConfig = run.encoding
    encoding = Encoding(kept.value_bits, n, 10, kept.clip, kept.max_weight, (kept.loss_clip,))
    assert encoding.problem() is None
    assert run.deadlines == DeadlinesConfig(gather_s=gather_s)
