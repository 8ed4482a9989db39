"""docs/plans.md: every command and every program on the page does what the page says."""

import re
import shlex
import sys
from pathlib import Path

from click.testing import CliRunner

import plan_support  # noqa: F401  quietens torch under pytest
from covey_coordinator.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "plans.md"
BLOCK = re.compile(r"^```(python|sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def readable(text, folder):
    """Without what differs from run to run: hashes, rounding, where the files lie."""
    text = re.sub(r"plan [0-9a-f]{12}", "plan #", text.replace(f"{folder}/", ""))
    return re.sub(r"\de-\d\d", "#", text).strip()


def test_the_page_is_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    blocks = BLOCK.findall(PAGE.read_text())
    files = {"def build()": "model.py", "class Svd": "refused.py"}
    names, printed, done = {}, "", 0
    for language, text in blocks:
        if language == "sh":
            command, *arguments = shlex.split(text.replace("\\\n", " "))
            assert command == "covey"
            printed = CliRunner().invoke(main, arguments).output
        elif language == "text":
            assert readable(printed, tmp_path) == readable(text, tmp_path)
        elif written := next((files[mark] for mark in files if mark in text), None):
            (tmp_path / written).write_text(text)
        else:
            exec(compile(text, str(PAGE), "exec"), names)  # noqa: S102
        done += 1
    assert done == len(blocks) == 12
    assert (tmp_path / "digits-from-python" / "plan.json").exists()
    assert names["slowest"]["dur"] > 0
    sys.modules.pop("model", None)
    sys.modules.pop("refused", None)
