"""TOML text -> typed configuration, with errors that name the file, the key and the fix.

Configuration is msgspec Structs that mirror the TOML one to one. Files are read by the callers.
"""

import difflib
import re
import tomllib
from typing import Any, TypeVar

import msgspec

from covey_shared.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every configuration table: unknown keys are errors."""


def parse(text: str, kind: type[T], *, file: str) -> T:
    """TOML -> `kind`, validated as a whole. Raises ConfigError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from error
    return convert(table, kind, file=file)


def convert(table: dict[str, Any], kind: type[T], *, file: str) -> T:
    """A parsed table -> `kind`. Raises ConfigError."""
    try:
        return msgspec.convert(table, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {_explain(str(error), kind)}") from error


def _explain(problem: str, kind: type[msgspec.Struct]) -> str:
    """msgspec's words with the key's whole name, and the nearest known key for an unknown one."""
    what, _, path = problem.partition(" - at ")
    table = path.strip("`").removeprefix("$").removeprefix(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    missing = re.fullmatch(r"Object missing required field `(.*)`", what)
    if unknown:
        known = _keys(kind, table)
        near = difflib.get_close_matches(unknown[1], known, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return f"unknown key `{_join(table, unknown[1])}`; {hint}"
    if missing:
        return f"key `{_join(table, missing[1])}` is missing; add it"
    return f"key `{table}`: {what[:1].lower()}{what[1:]}" if table else what


def _join(table: str, key: str) -> str:
    return f"{table}.{key}" if table else key


def _keys(kind: type[msgspec.Struct], table: str) -> list[str]:
    """The keys that a (nested) table knows."""
    current: Any = kind
    for part in filter(None, re.split(r"[.\[]", table)):
        fields = {f.encode_name: f.type for f in msgspec.structs.fields(current)}
        found = next((t for t in _structs(fields.get(part.rstrip("]")))), None)
        if found is None:
            break
        current = found
    return sorted(f.encode_name for f in msgspec.structs.fields(current))


def _structs(annotation: Any) -> list[Any]:
    """The Struct classes within an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return [annotation]
    return [s for inner in getattr(annotation, "__args__", ()) for s in _structs(inner)]
