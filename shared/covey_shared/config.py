"""TOML text -> typed configuration, with errors that name the file, the key and the fix.

Configuration is msgspec Structs that mirror the TOML one to one; msgspec finds the mistake, here it
is put into words: what stands there, and what may stand there instead. Files are read by the callers.
"""

import datetime
import difflib
import math
import re
import tomllib
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, inspect

from covey_shared import messages
from covey_shared.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)

_MAX_SHOWN_CHARS = 60

# A description says in words what a pattern says in signs; see `describe`.
Name = Annotated[
    messages.FleetName,
    Meta(description="1 to 32 lower-case letters, digits and inner hyphens, in quotes"),
]
FileName = Annotated[str, Meta(min_length=1, description="a path in quotes")]
HexKey = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{64}\Z",
        description="a public key in quotes: 64 hexadecimal digits, lower case",
    ),
]
Seconds = messages.Seconds
PositiveInt = Annotated[int, Meta(ge=1)]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every configuration table: unknown keys are errors."""


def parse(text: str, kind: type[T], *, file: str) -> T:
    """TOML -> `kind`, validated as a whole. Raises ConfigError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from error
    except RecursionError as error:
        raise _too_deep(file) from error
    except ValueError as error:  # Python's limit of digits, which tomllib hands on
        raise ConfigError(f"{file}: not TOML: a number in it has thousands of digits") from error
    return convert(table, kind, file=file)


def convert(table: dict[str, Any], kind: type[T], *, file: str) -> T:
    """A parsed table -> `kind`. Raises ConfigError. TOML's `inf` and `nan` are refused everywhere."""
    try:
        for key, value in _numbers("", table):
            if not math.isfinite(value):
                raise ConfigError(f"{file}: key `{key}` is {value}; it must be a finite number")
    except RecursionError as error:  # dotted keys nest deeper than tomllib itself goes
        raise _too_deep(file) from error
    try:
        return msgspec.convert(table, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {_explain(str(error), kind, table)}") from error


def _too_deep(file: str) -> ConfigError:
    return ConfigError(
        f"{file}: tables and lists stand in each other hundreds deep; none has more than 3"
    )


def unreadable(path: object, error: OSError | UnicodeDecodeError) -> ConfigError:
    """The error for a text file that cannot be read."""
    why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
    return ConfigError(f"{path} cannot be read: {why}")


def describe(kind: inspect.Type) -> str:
    """What may stand in a key of this type, for people: "a whole number from 1 to 64"."""
    match kind:
        case inspect.Metadata(type=inner, extra_json_schema=extra):
            return str((extra or {}).get("description") or describe(inner))
        case inspect.IntType():
            return f"a whole number{_bounds(kind)}"
        case inspect.FloatType():
            return f"a number{_bounds(kind)}"
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType(min_length=1, max_length=1):
            return "one character in quotes"
        case inspect.StrType(min_length=least):
            return "text in quotes, not empty" if least else "text in quotes"
        case inspect.LiteralType(values=values):
            return _choice(values)
        case inspect.VarTupleType(item_type=item, min_length=least):
            return f"a list{' of at least one' if least else ''} (each {describe(item)})"
        case inspect.DictType(value_type=value):
            return f"a table (each value {describe(value)})"
        case inspect.UnionType(types=types):
            return ", or ".join(describe(t) for t in types if not isinstance(t, inspect.NoneType))
        case inspect.StructType():
            return "a table"
        case _:
            return type(kind).__name__


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    low, high = kind.ge if kind.ge is not None else kind.gt, kind.le
    above = low is not None and kind.ge is None
    if low is not None and high is not None:
        return (
            f" above {_number(low)} and up to {_number(high)}"
            if above
            else f" from {_number(low)} to {_number(high)}"
        )
    if low is not None:
        return f" above {_number(low)}" if above else f" of at least {_number(low)}"
    return f" of at most {_number(high)}" if high is not None else ""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _choice(values: Any) -> str:
    return "one of " + ", ".join(f'"{value}"' for value in values)


def _numbers(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """All floats of a table, with their keys."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(_join(key, name), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers(f"{key}[{index}]", inner)


def _explain(problem: str, kind: type[msgspec.Struct], table: dict[str, Any]) -> str:
    """msgspec's words -> what is wrong with which key, and what would be right."""
    what, _, path = problem.rpartition(" - at `$")
    if not what:
        what, path = problem, ""
    place = _Place(inspect.type_info(kind), table)
    for part in re.findall(r"\.([^.\[`]+)|\[([^\]]*)\]", path):
        place.enter(part[0] or part[1])
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL)
    missing = re.fullmatch(r"Object missing required field `(.*)`", what)
    if unknown:
        near = difflib.get_close_matches(unknown[1], place.keys, 1)
        hint = (
            f"did you mean `{_join(place.key, near[0])}`?"
            if near
            else f"known here: {', '.join(place.keys)}"
        )
        return f"unknown key `{_join(place.key, unknown[1])}`; {hint}"
    if missing:
        place.enter(missing[1])
        return f"key `{place.key}` is missing; give {describe(place.kind)}"
    if what.startswith(("Expected ", "Invalid ")):
        return f"key `{place.key}` is {_shown(place.value)}; it must be {describe(place.kind)}"
    return f"in table `{place.key}`: {what}" if place.key else what


class _Place:
    """A key somewhere in a table: its whole name, its type, and what stands there."""

    def __init__(self, kind: inspect.Type, value: Any) -> None:
        self.key, self.kind, self.value = "", kind, value

    @property
    def keys(self) -> list[str]:
        """What a table knows at this place."""
        tables = self._tables()
        names = {field.encode_name for table in tables for field in table.fields}
        return sorted(names | {table.tag_field for table in tables if table.tag_field})

    def enter(self, part: str) -> None:
        """Go to a key of a table or an element of a list; "..." is a table's offending value."""
        kind, value = _bare(self.kind), self.value
        if isinstance(kind, inspect.DictType):
            part = self._offender(kind) if part == "..." else part
            self.key, self.kind = _join(self.key, part), kind.value_type
        elif part.isdecimal():
            lists = [t for t in _members(kind) if isinstance(t, inspect.VarTupleType)]
            self.key, self.kind = f"{self.key}[{part}]", lists[0].item_type if lists else kind
            self.value = value[int(part)] if isinstance(value, list) else value
            return
        else:
            self.key, self.kind = _join(self.key, part), self._field(part)
        self.value = value.get(part) if isinstance(value, dict) else None

    def _tables(self) -> list[inspect.StructType]:
        """The table at this place: of several kinds the one that is named, or all of them."""
        tables = [t for t in _members(_bare(self.kind)) if isinstance(t, inspect.StructType)]
        names = self.value if isinstance(self.value, dict) else {}
        tag = names.get(tables[0].tag_field) if tables and tables[0].tag_field else None
        return [t for t in tables if t.tag == tag] or tables

    def _field(self, name: str) -> inspect.Type:
        tables = self._tables()
        if any(table.tag_field == name for table in tables):
            every = [t for t in _members(_bare(self.kind)) if isinstance(t, inspect.StructType)]
            return inspect.LiteralType(values=tuple(sorted(str(t.tag) for t in every)))
        found = [
            field.type for table in tables for field in table.fields if field.encode_name == name
        ]
        return found[0] if found else inspect.AnyType()

    def _offender(self, kind: inspect.DictType) -> str:
        """The first key of a table of free names whose value is not of its type."""
        wanted = _members(_bare(kind.value_type))
        numbers = any(isinstance(t, inspect.FloatType) for t in wanted)
        for name, value in self.value.items():
            if numbers and (isinstance(value, bool) or not isinstance(value, int | float)):
                return str(name)
        return "..."


def _bare(kind: inspect.Type) -> inspect.Type:
    return _bare(kind.type) if isinstance(kind, inspect.Metadata) else kind


def _members(kind: inspect.Type) -> list[inspect.Type]:
    types = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    return [_bare(t) for t in types]


def _join(table: str, key: str) -> str:
    return f"{table}.{key}" if table else key


def _shown(value: Any) -> str:
    """A value much as it stands in the file, at most a line of it."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            short = value if len(value) <= _MAX_SHOWN_CHARS else f"{value[:_MAX_SHOWN_CHARS]}..."
            return msgspec.json.encode(short).decode()
        case dict():
            return "a table"
        case list():
            return "an empty list" if not value else "a list"
        case int() if value.bit_length() > 4 * _MAX_SHOWN_CHARS:
            # Python refuses to print those of thousands of digits.
            return f"a number of {value.bit_length():,} bits"
        case int() | float():
            return f"{value}"[:_MAX_SHOWN_CHARS]
        case datetime.date() | datetime.time():
            return f"the date or time {value}"
        case _:
            return "not set"
