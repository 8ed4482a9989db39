"""Every key of a configuration, from its Structs: what tests of files and of their docs walk."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect


@dataclass(frozen=True)
class Key:
    """One key. name: dotted. tag: of the kind of table it belongs to, where there are several."""

    name: str
    kind: inspect.Type
    required: bool
    default: Any
    tag: str | None = None


def keys_of(kind: type[msgspec.Struct]) -> list[Key]:
    """All keys that hold a value, nested tables included; a table of free names is one key."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return list(_keys("", info, info.cls))


def _keys(prefix: str, table: inspect.StructType, owner: Any, tag: Any = None) -> Iterator[Key]:
    for field in table.fields:
        name = f"{prefix}.{field.encode_name}" if prefix else field.encode_name
        if tables := _tables(field.type):
            for inner in tables:
                yield from _keys(name, inner, inner.cls, inner.tag)
            if tables[0].tag_field:
                tags = inspect.LiteralType(values=tuple(sorted(str(t.tag) for t in tables)))
                yield Key(f"{name}.{tables[0].tag_field}", tags, True, None)
        else:
            default = field.default
            if field.default_factory is not msgspec.NODEFAULT:
                default = field.default_factory()
            yield Key(name, field.type, field.required, default, tag)


def _tables(kind: inspect.Type) -> list[inspect.StructType]:
    types = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    return [t for t in types if isinstance(t, inspect.StructType)]


def wrong_values(kind: inspect.Type) -> list[Any]:
    """Values that a key of this type must refuse: other types, and just beyond each bound."""
    types = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    types = tuple(t.type if isinstance(t, inspect.Metadata) else t for t in types)
    wrong: list[Any] = [{"a": "table"}] if not _has(types, inspect.DictType) else [3, {"a": "b"}]
    for type_ in types:
        match type_:
            case inspect.IntType():
                wrong += ["1", 1.5, True, *_beyond(type_, 1)]
            case inspect.FloatType():
                wrong += [True, float("nan"), float("inf"), *_beyond(type_, 0.001)]
            case inspect.BoolType():
                wrong += [1, "true"]
            case inspect.StrType():
                wrong += [[], True]
                if type_.pattern is not None:
                    wrong += ["", "!", "a\n"]
                elif type_.min_length:
                    wrong.append("")
            case inspect.LiteralType():
                wrong += ["no such choice", 1]
            case inspect.VarTupleType():
                wrong += [[3]]
    return wrong


def _has(types: tuple[inspect.Type, ...], kind: type[inspect.Type]) -> bool:
    return any(isinstance(t, kind) for t in types)


def _beyond(kind: inspect.IntType | inspect.FloatType, step: float) -> list[Any]:
    beyond: list[Any] = []
    if kind.ge is not None:
        beyond.append(kind.ge - step if isinstance(kind, inspect.IntType) else kind.ge / 2 - step)
    if kind.gt is not None:
        beyond.append(kind.gt)
    if kind.le is not None:
        beyond.append(kind.le + step)
    return beyond


def put(table: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a nested table with one key set."""
    head, _, rest = key.partition(".")
    return {**table, head: put(table.get(head, {}), rest, value) if rest else value}


def drop(table: dict[str, Any], key: str) -> dict[str, Any]:
    """A copy of a nested table without one key."""
    head, _, rest = key.partition(".")
    if rest:
        return {**table, head: drop(table[head], rest)}
    return {name: value for name, value in table.items() if name != head}
