"""The soak's judgement, on made-up processes: what it lets pass, and what not."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROUNDS, BASELINE = 500, 50


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("soak", BENCHMARKS / "soak.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def broken(soak: ModuleType, name: str, rss: Callable[[int], float], **more: Any) -> set[str]:
    """The bounds that a process breaks whose memory is that after each round."""
    usual = {"fds": 8, "threads": 4, "tasks": 5}
    samples = [
        soak.Sample(
            round=n,
            rss=int(rss(n)),
            **{kind: more.get(kind, lambda n, v=value: v)(n) for kind, value in usual.items()},
            disk=int(more.get("disk", lambda n: 0)(n)),
            cache=int(more.get("cache", lambda n: 0)(n)),
        )
        for n in range(1, ROUNDS + 1)
    ]
    played = soak.Played(
        [{"outcome": "completed"}] * more.get("completed", ROUNDS)
        + [{"outcome": "abandoned"}] * (ROUNDS - more.get("completed", ROUNDS)),
        [], {}, [], 1.0, 1.0,
    )  # fmt: skip
    rows = soak.rows_of([soak.Growth(name, samples, BASELINE, ROUNDS)], played, BASELINE)
    return {row.name for row in rows if not row.holds}


def steady(n: int) -> float:
    return 86e6 + 1e6 * min(n, 200) / 200 + 2e5 * (n % 3)


def test_what_levels_off_and_wavers_passes(soak: ModuleType) -> None:
    for name in ("coordinator", "broker", "pi-01"):
        assert broken(soak, name, steady) == set()
    # What was much more before it was measured, and a single round that is, are no growth.
    assert (
        broken(soak, "pi-01", lambda n: 2 * steady(n) if n < 40 or n == ROUNDS else steady(n))
        == set()
    )


def test_memory_that_grows_does_not(soak: ModuleType) -> None:
    assert broken(soak, "pi-01", lambda n: 86e6 + 20_000 * n) == {
        "devices: resident, last to first", "devices: resident, a round",
    }  # fmt: skip
    # A masked update that is kept of every round is within ten percent, and still seen.
    assert broken(soak, "pi-01", lambda n: 86e6 + 10_000 * n) == {"devices: resident, a round"}
    assert broken(soak, "coordinator", lambda n: 86e6 + 19_000 * n) == {
        "coordinator: resident, a round"
    }
    # A step that comes after the baseline is no leak, and breaks the promise all the same.
    assert broken(soak, "pi-01", lambda n: 86e6 if n < 200 else 95e6) == {
        "devices: resident, last to first"
    }


@pytest.mark.parametrize(
    ("kind", "words"), [("fds", "open files"), ("threads", "threads"), ("tasks", "tasks")]
)
def test_what_is_counted_may_not_grow(soak: ModuleType, kind: str, words: str) -> None:
    now_and_then = {kind: lambda n: 8 + 20 * (n % 7 == 0)}
    assert broken(soak, "coordinator", steady, **now_and_then) == set()
    one_a_hundred_rounds = {kind: lambda n: 8 + n // 100}
    assert broken(soak, "coordinator", steady, **one_a_hundred_rounds) == {
        f"coordinator: {words} more"
    }


def test_disks_and_abandoned_rounds_count(soak: ModuleType) -> None:
    assert broken(soak, "pi-01", steady, disk=lambda n: 2200 * n) == set()
    assert broken(soak, "pi-01", steady, disk=lambda n: 5000 * n) == {"devices: disk, a round"}
    assert broken(soak, "pi-01", steady, cache=lambda n: min(19_000 * n, 990_000)) == set()
    assert broken(soak, "pi-01", steady, cache=lambda n: 19_000 * n) == {"devices: cache"}
    assert broken(soak, "pi-01", steady, completed=ROUNDS - 1) == {"rounds completed"}
