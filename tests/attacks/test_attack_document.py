"""docs/attacks.md names tests; they are there, and all attacks are named in it."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "attacks.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DOCUMENT)


@functools.cache
def names_in(path):
    """Test functions and classes at the top of a file."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_every_test_that_the_document_names_is_there():
    assert len(NAMED) > 80
    missing = [f"{path}::{name}" for path, name in NAMED if name not in names_in(path)]
    assert missing == []


def test_no_test_is_named_in_a_way_that_this_test_would_miss():
    assert len(re.findall(r"::", DOCUMENT)) == len(NAMED) + 1  # `file::name` in the text itself


def test_every_row_of_the_tables_names_a_test():
    resisted = DOCUMENT.split("## What is resisted")[1].split("## What is not resisted")[0]
    rows = [line for line in resisted.splitlines() if line.startswith("| ")]
    assert len(rows) > 50
    heads = [row for row in rows if row.startswith("| attack | what happens | test |")]
    assert [row for row in rows if "::" not in row] == heads


def test_what_is_not_resisted_is_in_the_document():
    limits = names_in("tests/attacks/test_attack_limits.py")
    shown = {name for _, name in NAMED}
    assert {name for name in limits if name.startswith("test_")} <= shown
