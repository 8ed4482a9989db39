"""docs/enrolment.md: its commands and options are there, and what it shows is what is printed."""

import re
import shlex
from pathlib import Path

import click
import pytest

from covey_coordinator.cli import main as covey
from covey_device.cli import main as covey_device
from covey_shared.keys import in_groups

PAGE = (Path(__file__).parents[2] / "docs" / "enrolment.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SPELLED = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in SPELLED if line.startswith("covey")]


def test_nothing_else_is_run_but_what_is_meant():
    others = {line.split()[0] for line in SPELLED if line not in COMMANDS}
    assert others == {"export", "sudo"}
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_there_with_its_options(line: str):
    words = shlex.split(line, comments=True)
    command: click.Command = {"covey": covey, "covey-device": covey_device}[words.pop(0)]
    context = click.Context(command)
    while isinstance(command, click.Group):
        found = command.get_command(context, words.pop(0))
        assert found is not None, line
        command = found
    known = {opt: p for p in command.params if isinstance(p, click.Option) for opt in p.opts}
    used = [word for word in words if word.startswith("-") and word != "-"]
    assert set(used) <= set(known)
    takes = sum(1 for option in used if not known[option].is_flag)
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    given = len(words) - len(used) - takes
    assert sum(p.required for p in arguments) <= given <= len(arguments)


def test_fingerprints_look_as_they_do():
    shown = re.findall(r"^(?:fleet CA|identity): (.*)$", PAGE, re.MULTILINE)
    assert len(shown) == 2
    for text in shown:
        assert in_groups(bytes.fromhex(text.replace(" ", "")) + bytes(16)) == text
