"""docs/cli.md has every command with every option and its default; each says what it is for."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from covey_coordinator.cli import main as covey
from covey_device.cli import main as covey_device

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """All commands that do something, by their full names."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command, info_name=name)
    for part in command.list_commands(context):
        inner = command.get_command(context, part)
        assert inner is not None
        yield from commands(inner, f"{name} {part}")


COMMANDS = dict([*commands(covey, "covey"), *commands(covey_device, "covey-device")])


def sections() -> dict[str, str]:
    """Heading without its arguments -> text."""
    parts = re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)[1:]
    return {
        re.sub(r" \[?[A-Z:\]]+$", "", heading): text
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }


def default_of(option: click.Option) -> str:
    if option.required:
        return "required"
    if option.is_flag or not isinstance(option.default, int | float | str | Path):
        return ""
    return str(option.default)


def test_every_command_is_there_and_no_other():
    assert set(sections()) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_there_with_its_default(name: str):
    rows = re.findall(r"^\| (`-.*?) \|(.*?)\| (.+) \|$", sections()[name], re.MULTILINE)
    documented = {}
    for spelled, default, meaning in rows:
        assert meaning.endswith(".")
        documented[frozenset(re.findall(r"`(--?[a-z-]+)", spelled))] = default.strip()
    options = [p for p in COMMANDS[name].params if isinstance(p, click.Option)]
    assert documented == {frozenset(o.opts): default_of(o) for o in options}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_is_for(name: str):
    command = COMMANDS[name]
    assert command.help
    assert command.get_short_help_str(60).rstrip().endswith(".")
    for option in command.params:
        if isinstance(option, click.Option) and option.opts[-1] not in UNEXPLAINED:
            assert option.help, option.opts


UNEXPLAINED = {
    "--devices", "--model", "--seed", "--optimizer", "--momentum", "--weight-decay",
}  # fmt: skip
"""Their names and defaults say it."""
