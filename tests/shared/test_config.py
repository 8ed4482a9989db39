"""The configuration reader: its messages are for a person with a text editor open."""

import datetime
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from covey_shared import config
from covey_shared.config import Config, Name, Seconds
from covey_shared.errors import ConfigError


class Circle(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="circle"
):
    radius: float


class Square(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="square"
):
    side: float
    corners: tuple[str, ...] = ()


class Inner(Config, frozen=True):
    level: Annotated[int, Meta(ge=1, le=9)] = 5
    mode: Literal["auto", "manual"] = "auto"
    weights: dict[str, float] = msgspec.field(default_factory=dict)


class Outer(Config, frozen=True):
    name: Name
    shape: Circle | Square
    inner: Inner = Inner()
    wait_s: Seconds = 1.0
    note: str | None = None


GOOD = {"name": "a", "shape": {"kind": "circle", "radius": 1.0}}


def message(table: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config.convert(table, Outer, file="some.toml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"nane": "b"}, "some.toml: unknown key `nane`; did you mean `name`?"),
        (
            {"zzz": 1},
            "some.toml: unknown key `zzz`; known here: inner, name, note, shape, wait_s",
        ),
        ({"inner": {"levle": 1}}, "unknown key `inner.levle`; did you mean `inner.level`?"),
        (
            {"shape": {"kind": "square", "side": 1.0, "radius": 1.0}},
            "unknown key `shape.radius`; known here: corners, kind, side",
        ),
        (
            {"shape": {"kind": "round", "radius": 1.0}},
            'key `shape.kind` is "round"; it must be one of "circle", "square"',
        ),
        ({"shape": {"radius": 1.0}}, 'key `shape.kind` is missing; give one of "circle", "square"'),
        ({"shape": {"kind": "square"}}, "key `shape.side` is missing; give a number"),
        ({"shape": []}, "key `shape` is an empty list; it must be a table"),
        (
            {"shape": {"kind": "square", "side": 1, "corners": ["a", 2]}},
            "key `shape.corners[1]` is 2; it must be text in quotes",
        ),
        (
            {"inner": {"level": 10}},
            "key `inner.level` is 10; it must be a whole number from 1 to 9",
        ),
        (
            {"inner": {"level": True}},
            "key `inner.level` is true; it must be a whole number from 1 to 9",
        ),
        ({"inner": {"mode": "other"}}, 'is "other"; it must be one of "auto", "manual"'),
        (
            {"inner": {"weights": {"a": 1, "b": "x"}}},
            'key `inner.weights.b` is "x"; it must be a number',
        ),
        ({"inner": {"weights": 1}}, "is 1; it must be a table (each value a number)"),
        ({"inner": "x"}, 'key `inner` is "x"; it must be a table'),
        ({"wait_s": 0}, "is 0; it must be a number above 0 and up to 2,592,000"),
        ({"wait_s": float("nan")}, "key `wait_s` is nan; it must be a finite number"),
        (
            {"inner": {"weights": {"a": float("-inf")}}},
            "key `inner.weights.a` is -inf; it must be a finite number",
        ),
        (
            {"shape": {"kind": "circle", "radius": float("inf")}},
            "key `shape.radius` is inf; it must be a finite number",
        ),
        ({"name": "A B"}, 'is "A B"; it must be 1 to 32 lower-case letters, digits'),
        ({"name": "a\n"}, r'key `name` is "a\n"; it must be 1 to 32'),
        ({"name": "x" * 500}, f'is "{"x" * 60}..."; it must be'),
        ({"note": 1}, "key `note` is 1; it must be text in quotes"),
        ({"note": datetime.date(2020, 1, 2)}, "is the date or time 2020-01-02"),
    ],
)
def test_a_message_says_what_stands_there_and_what_may(change: dict[str, Any], expected: str):
    told = message(GOOD | change)
    assert expected in told
    assert told.startswith("some.toml: ")
    assert "\n" not in told


def test_a_missing_key_is_named():
    assert message({"shape": GOOD["shape"]}).startswith("some.toml: key `name` is missing; give 1")


def test_what_is_not_toml_says_where():
    with pytest.raises(ConfigError, match=r"some\.toml: not TOML: .*line 2"):
        config.parse('name = "a"\nname = ]\n', Outer, file="some.toml")


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a" + ".a" * 2000 + " = 1"])
def test_nesting_without_end_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"^some\.toml: .* hundreds deep"):
        config.parse(text, Outer, file="some.toml")


@pytest.mark.parametrize(
    ("number", "told"),
    [
        ("9" * 5000, "a number in it has thousands of digits"),
        ("0x" + "f" * 5000, "20,000 bits; it must be"),
    ],
)
def test_a_number_too_long_for_python_is_refused(number: str, told: str):
    with pytest.raises(ConfigError, match=told) as caught:
        config.parse(
            f'name = {number}\nshape = {{ kind = "circle", radius = 2 }}', Outer, file="some.toml"
        )
    assert len(str(caught.value)) < 200


def test_whole_numbers_pass_for_numbers():
    read = config.parse(
        'name = "a"\nwait_s = 3\nshape = { kind = "circle", radius = 2 }', Outer, file="some.toml"
    )
    assert read.wait_s == 3.0
    assert isinstance(read.wait_s, float)
    assert read.shape == Circle(2.0)
    assert read.inner == Inner(level=5)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.dates() | st.times(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
KEYS = st.sampled_from(["name", "shape", "inner", "wait_s", "kind", "radius", "corners", "weights"])


@given(st.dictionaries(KEYS | st.text(max_size=4), VALUES | st.dictionaries(KEYS, VALUES)))
def test_any_table_reads_or_is_refused_in_one_line(table: dict[str, Any]):
    try:
        read = config.convert(GOOD | table, Outer, file="some.toml")
    except ConfigError as error:
        told = str(error)
    else:
        assert isinstance(read, Outer)
        return
    assert told.startswith("some.toml: ")
    assert "`" in told


def test_an_unreadable_file_says_why():
    told = config.unreadable("f", PermissionError(13, "Permission denied"))
    assert str(told) == "f cannot be read: Permission denied"
    told = config.unreadable("f", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"))
    assert str(told) == "f cannot be read: it is not UTF-8 text"
