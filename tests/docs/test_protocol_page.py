"""docs/protocol.md says what the code says."""

import importlib.util
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parents[2] / "docs"


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_what_the_code_says() -> None:
    text = (DOCS / "protocol.md").read_text(encoding="utf-8")
    assert _generator().filled(text) == text, "run `make docs`"


def test_every_generator_is_used() -> None:
    text = (DOCS / "protocol.md").read_text(encoding="utf-8")
    for name in _generator().GENERATED:
        assert f"<!-- generated: {name} -->" in text
