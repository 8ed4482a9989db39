"""docs/model.md says what the code does: its figures, its example, its names."""

import re
from pathlib import Path

import msgspec

from covey_coordinator.blobs import LINGER_S
from covey_device.cache import RESERVE_BYTES
from covey_device.config import ModelConfig
from covey_device.home.files import CURRENT, KEPT, MODEL, PLAN, PREVIOUS, SIDECAR, Sidecar
from covey_device.home.hook import MAX_LINES, environment
from covey_shared.config import parse

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")


def test_the_program_is_the_one_that_is_tried():
    """In tests/cli/test_cli_model.py."""
    example = (ROOT / "examples" / "local_model.py").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert example.partition('"""\n\n')[2] == shown
    code = [
        line for line in shown.splitlines() if line and not re.match(r"import |from |os\.env", line)
    ]
    assert len(code) <= 10


def test_the_hook_s_table_and_bounds_are_the_code_s():
    (table,) = re.findall(r"```toml\n\[model\]\n(.*?)```", PAGE, re.DOTALL)
    config = parse(table, ModelConfig, file="device.toml")
    assert config.hook[0].startswith("/")
    sidecar = Sidecar(
        fleet="f", device="d", run="r", round=1, plan_name="p", plan="0" * 64, model="0" * 64,
        onnx="0" * 64, size=1, input=None, output=None, loss="mse", classes=None, written_unix=0,
        before=None, round_call=b"", result=None,
    )  # type: ignore[arg-type]  # fmt: skip
    told = set(
        re.findall(
            r"`([A-Z_0-9]+)`",
            PAGE.split("## A command on a new model")[1].split("\nThe hook is")[0],
        )
    )
    assert told == set(environment(Path("/x"), sidecar))
    assert f"up to {MAX_LINES} lines" in PAGE
    assert f"{RESERVE_BYTES // 10**6} MB are left free" in PAGE


def test_names_and_keys_are_the_code_s():
    for name in (CURRENT, PREVIOUS, KEPT, MODEL, PLAN, SIDECAR):
        assert name in PAGE
    keys = PAGE.split("`current.json` says the same")[1].split("\n## ")[0]
    told = set(re.findall(r"`([a-z_]+)`", keys)) - {"name", "type", "shape"}
    assert told == {field.name for field in msgspec.structs.fields(Sidecar)} - {"format"}


def test_how_long_a_run_s_model_lingers():
    protocol = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert LINGER_S == 600
    assert "for ten\nminutes beside the next" in protocol
