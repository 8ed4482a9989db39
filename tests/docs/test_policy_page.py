"""docs/policy.md says what the code says: its example is valid, and means what stands below it."""

import re
from pathlib import Path

from covey_device.audit import REFUSALS_PER_HOUR, SEGMENT_BYTES, SEGMENTS
from covey_device.config import load_policy
from covey_shared.messages import MAX_PLAN_SIGNATURES

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")


def test_the_example_means_what_is_said_of_it(tmp_path: Path):
    path = tmp_path / "policy.toml"
    example = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    path.write_text(example[1])
    words = re.search(r"```text\npolicy: .*?\n(.*?)```", PAGE, re.DOTALL)
    assert [line.strip() for line in words[1].splitlines()] == load_policy(path).in_words()


def test_bounds_are_the_code_s():
    assert f"{SEGMENT_BYTES * SEGMENTS // 10**6} MB in all" in PAGE
    assert f"up to {REFUSALS_PER_HOUR} an\n  hour" in PAGE or f"{REFUSALS_PER_HOUR} an hour" in PAGE
    assert MAX_PLAN_SIGNATURES == 4
    assert "up to four owners" in PAGE
