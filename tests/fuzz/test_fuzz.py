"""What fuzzing kept goes through every target again, without atheris; and the targets notice what is planted.

How it was found, and how to find more: docs/fuzzing.md.
"""

import functools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from covey_coordinator.enrolment.desk import EnrolmentDesk
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.round import Round
from covey_device import enrol
from covey_device.session import Session
from covey_shared import chunks, config, keys, plan, transcript, wire
from covey_shared.chunks import Assembly
from covey_shared.errors import RefusedError
from covey_shared.layout import Layout
from covey_shared.vetting import graph
from fuzz import __main__ as runner
from fuzz import harness
from fuzz.harness import CORPUS, FOUND, FindingError, Target, check, files_of, name_of, traced
from fuzz.targets import NAMES, target

MAX_CORPUS_BYTES = 1_000_000

REACHED: dict[str, tuple[Any, str]] = {
    "wire": (wire, "decode"),
    "keys": (keys, "verify"),
    "chunks": (Assembly, "add"),
    "header": (plan, "decode_header"),
    "graph": (graph, "read"),
    "joining": (enrol, "granted"),
    "desk": (EnrolmentDesk, "_enrol"),
    "carried": (FleetDirectory, "import_certificates"),
    "config": (config, "convert"),
    "transcript": (transcript.Reader, "_exactly"),
    "session": (Session, "_handle"),
    "round": (Round, "_take"),
}
"""Something of each target's that its corpus gets to."""


GOOD = {
    "wire": "a sound manifest",
    "keys": "_open went well",
    "chunks": "9 verified",
    "header": "a header of mse",
    "graph": "a sound train",
    "joining": "a sound answer",
    "desk": "enrolled pi-2",
    "carried": "taken ['pi-2']",
    "config": "a sound device.toml",
    "transcript": "model PASS",
    "session": "serving: 0 Save Publish",
    "round": "Completed",
}
"""What comes of good input: a target that refuses everything would find nothing."""


def replayed(it: Target) -> set[str]:
    """All that is kept of a target, and what it begins with, judged; what came of it, in words. Raises what
    the first bad one raises."""
    inputs = [path.read_bytes() for path in files_of(it.name)] + list(it.seeds())
    with it.ready() as run, traced():
        return {words for data in inputs for words in check(it, run, data)}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_is_kept_breaks_anything(name: str):
    came = replayed(target(name))
    assert len(came) >= 12
    assert [words for words in came if GOOD[name] in words], "nothing good was accepted"
    assert "atheris" not in sys.modules


def test_the_corpus_is_small_and_named_by_its_content():
    files = [path for name in NAMES for path in files_of(name)]
    assert sum(path.stat().st_size for path in files) < MAX_CORPUS_BYTES
    assert all(path.name == name_of(path.read_bytes()) for path in files)
    folders = {path.name for kept in (CORPUS, FOUND) if kept.is_dir() for path in kept.iterdir()}
    assert folders <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_another_error_than_a_peers_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: Any, **rest: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(*REACHED[name], broken)
    with pytest.raises(KeyError):
        replayed(target(name))


@pytest.mark.parametrize("name", NAMES)
def test_memory_beyond_the_bound_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch):
    it = target(name)
    owner, attribute = REACHED[name]
    real = getattr(owner, attribute)

    @functools.wraps(real)
    def greedy(*args: Any, **rest: Any) -> Any:
        held = bytearray(it.memory(it.longest))
        try:
            return real(*args, **rest)
        finally:
            del held

    monkeypatch.setattr(owner, attribute, greedy)
    with pytest.raises(FindingError, match=r"bytes of memory for an input of [\d,]+; at most"):
        replayed(it)


def test_an_error_as_long_as_a_book_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def wordy(*args: Any) -> Any:
        raise RefusedError("no " * 2000)

    monkeypatch.setattr(plan, "decode_header", wordy)
    with pytest.raises(FindingError, match="an error of 6,000 characters"):
        replayed(target("header"))


# -- properties that are broken on purpose ---------------------------------------------------------------


def _takes_any_double(self: Assembly, chunk: chunks.Chunk) -> bool:
    self._sink.write(chunk.index * chunks.CHUNK_BYTES, chunk.data)
    self._n_missing -= self._have[chunk.index] == 0
    self._have[chunk.index] = 1
    return self.complete


def _changes_before_it_refuses(real: Any) -> Any:
    def take(self: Round, *args: Any) -> Any:
        self._declined["pi-099"] = "?"  # type: ignore[index]
        return real(self, *args)

    return take


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "ours"),
    [
        ("chunks", Assembly, "add", lambda real: _takes_any_double),
        ("wire", wire, "body_of", lambda real: lambda message: real(message) + b"\xc0"),
        ("header", Layout, "check", lambda real: lambda self: None),
        ("round", Round, "_take", _changes_before_it_refuses),
        ("desk", EnrolmentDesk, "_check_token", lambda real: lambda *args: None),
    ],
)  # fmt: skip
def test_a_broken_property_is_noticed(
    name: str, owner: Any, attribute: str, ours: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(owner, attribute, ours(getattr(owner, attribute)))
    with pytest.raises(FindingError):
        replayed(target(name))


# -- what makes inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_are_made_up_break_nothing(name: str):
    """The mutators themselves, with something simpler in libFuzzer's place."""
    it, chance = target(name), random.Random(7)

    def flip(data: bytes, longest: int) -> bytes:
        at = chance.randrange(len(data) + 1)
        return (data[:at] + bytes((chance.randrange(256),)) + data[at + chance.randrange(2) :])[
            :longest
        ]

    corpus = [path.read_bytes() for path in files_of(name)]
    made = 0
    with it.ready() as run, traced():
        for _ in range(60):
            data = chance.choice(corpus)
            assert it.mutate is not None
            other = it.mutate(data, it.longest, chance, flip)
            assert len(other) <= max(it.longest, len(data))
            made += other != data
            check(it, run, other)
    assert made > 30


# -- the runner ------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of its own, and a fuzzer that finds what `found` says."""
    for module in (harness, runner):
        monkeypatch.setattr(module, "CORPUS", tmp_path / "corpus")
        monkeypatch.setattr(module, "FOUND", tmp_path / "found")
    monkeypatch.setattr(runner, "TESTS", tmp_path)
    return tmp_path


def test_a_finding_is_kept_and_told_with_what_shows_it_again(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def child(it: Target, scratch: Path, *options: str) -> subprocess.CompletedProcess[str]:
        (scratch / "finding-crash-1").write_bytes(b"a finding")
        return subprocess.CompletedProcess(
            [], 77, "#12\tNEW    cov: 3 ft: 4 corp: 1/1b\nKeyError\n"
        )

    monkeypatch.setattr(runner, "_child", child)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--targets", "wire", "--work", str(kept / "work")])
    assert runner.main() == 1
    path = kept / "found" / "wire" / name_of(b"a finding")
    assert path.read_bytes() == b"a finding"
    told = capsys.readouterr().out
    assert f"--replay found/wire/{path.name}" in told
    assert "KeyError" in told
    assert "12 runs" in told


def test_a_fuzzer_that_fails_without_a_finding_is_no_success(
    kept: Path, monkeypatch: pytest.MonkeyPatch
):
    failed = subprocess.CompletedProcess([], 1, "no such module: atheris\n")
    monkeypatch.setattr(runner, "_child", lambda *args: failed)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--targets", "wire", "--work", str(kept / "work")])
    with pytest.raises(SystemExit, match="atheris"):
        runner.main()


def test_a_replay_judges_by_the_folder(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = kept / "found" / "header" / "x"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"{}")
    monkeypatch.setattr(sys, "argv", ["fuzz", "--replay", str(path)])
    assert runner.main() == 0
    assert "MalformedError" in capsys.readouterr().out
