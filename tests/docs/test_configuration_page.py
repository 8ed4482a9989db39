"""docs/configuration.md has every key, with what may stand in it and its default."""

import re
from pathlib import Path
from typing import Any

import pytest

from config_walk import Key, keys_of
from covey_coordinator.config import FleetConfig, RunConfig
from covey_device.config import DeviceConfig, PolicyConfig
from covey_shared.config import describe, parse

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
FILES: dict[str, Any] = {
    "covey.toml": FleetConfig,
    "run.toml": RunConfig,
    "device.toml": DeviceConfig,
    "policy.toml": PolicyConfig,
}


def section(file: str) -> str:
    return PAGE.split(f"\n## {file}\n")[1].split("\n## ")[0]


def rows(file: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(key, kind of data) -> (value, default), from the tables of one section."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for line in section(file).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| `"):
            continue
        kind = cells.pop(1) if len(cells) == 5 else ""
        name, value, default, meaning = cells
        assert meaning.endswith((".", "...")), line
        assert found.setdefault((name.strip("`"), kind), (value, default)) == (value, default)
    return found


def default_of(key: Key) -> str:
    if key.required:
        return "required"
    if key.default is None:
        return "none"
    if key.default in ((), {}):
        return "empty"
    if isinstance(key.default, bool):
        return str(key.default).lower()
    return f'"{key.default}"' if isinstance(key.default, str) else str(key.default)


def expected(file: str) -> dict[tuple[str, str], tuple[str, str]]:
    keys = keys_of(FILES[file])
    tags = {key.tag for key in keys if key.tag}
    documented = {}
    for key in keys:
        said = (describe(key.kind), default_of(key))
        twins = [k for k in keys if k.name == key.name and k.tag]
        same = [k for k in twins if (describe(k.kind), default_of(k)) == said]
        everywhere = key.name == "data.kind" or (key.tag and {k.tag for k in same} == tags)
        documented[key.name, "all" if everywhere else key.tag or ""] = said
    return documented


@pytest.mark.parametrize("file", FILES)
def test_every_key_is_documented_as_it_is(file: str):
    assert rows(file) == expected(file)


@pytest.mark.parametrize("file", FILES)
def test_examples_are_valid(file: str):
    for example in re.findall(r"```toml\n(.*?)```", section(file), re.DOTALL):
        assert parse(example, FILES[file], file=file)
