"""The coordinator's files: whole or not there, and what they say survives any crash."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator import files
from covey_coordinator.files import append_line, last_line, write_atomic
from covey_coordinator.store import (
    Progress,
    RoundCounter,
    RunDirectory,
    RunState,
)
from covey_shared.errors import ConfigError, StorageError

RUN_ID = bytes(range(16))
DISK = ["unlink", "open", "write", "ftruncate", "fchmod", "fsync", "replace", "link", "mkdir"]


class Crash(BaseException):
    """The power goes."""


@contextmanager
def trouble(at: int, error: Callable[[], BaseException], names: list[str] = DISK) -> Iterator[None]:
    """Call number `at` of those that touch the disk fails."""
    left = [at]

    def wrapped(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise error()
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(files.os, name, wrapped(getattr(os, name)))
        yield


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def everywhere(
    step: Callable[[], object], error: Callable[[], BaseException], names: list[str] = DISK
) -> Iterator[int]:
    """Let `step` fail at each of its calls in turn; yields after each failure, ends at success."""
    kind = type(error())
    for at in range(60):
        with trouble(at, error, names):
            try:
                step()
            except (kind, StorageError):
                failed = True
            else:
                failed = False
        if not failed:
            return
        yield at
    pytest.fail("it never got through")


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Crash, full], ids=["crash", "full disk"])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, error: Callable[[], BaseException]):
    path = tmp_path / "file"
    times = 0
    write_atomic(path, b"old")
    for _ in everywhere(lambda: write_atomic(path, b"new and longer"), error):
        times += 1
        assert path.read_bytes() in (b"old", b"new and longer")
        write_atomic(path, b"old")
    assert times >= 5
    assert path.read_bytes() == b"new and longer"
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208


def test_a_refusal_names_the_file_and_the_next_step(tmp_path: Path):
    with trouble(0, full, ["fsync"]), pytest.raises(StorageError) as caught:
        write_atomic(tmp_path / "file", b"x")
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'file'}: No space left on device; free some space, or check its "
        "owner"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o000, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_modes_are_exact_whatever_the_umask(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", b"x", mode=mode)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_secret_is_never_readable_not_even_for_a_moment(tmp_path: Path):
    """Not through a left-over of the same name that somebody holds open, either."""
    (tmp_path / ".file.new").write_bytes(b"left over")
    (tmp_path / ".file.new").chmod(0o666)
    with (tmp_path / ".file.new").open("rb") as held:
        write_atomic(tmp_path / "file", b"secret", mode=0o600)
        assert held.read() == b"left over"
    modes = []
    real = os.fchmod

    def fchmod(fd: int, mode: int) -> None:
        modes.append(os.fstat(fd).st_mode & 0o777)
        real(fd, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fchmod", fchmod)
        write_atomic(tmp_path / "open", b"public", mode=0o644)
    assert modes == [0o600]


@pytest.mark.parametrize("error", [Crash, full], ids=["crash", "full disk"])
def test_a_line_is_appended_once_or_not_at_all(tmp_path: Path, error: Callable[[], BaseException]):
    path = tmp_path / "lines"
    path.write_bytes(b"one\n")
    for _ in everywhere(lambda: append_line(path, b"two"), error, ["open", "write", "fsync"]):
        lines = path.read_bytes()
        assert lines in (b"one\n", b"one\ntwo\n")
        if error is full:
            assert lines == b"one\n"
        path.write_bytes(b"one\n")
    assert path.read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("torn", [b"", b'{"ind', b"x" * 200_000])
def test_half_a_line_goes_before_the_next_is_written(tmp_path: Path, torn: bytes):
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\n" + torn)
    assert last_line(path) == b"two"
    append_line(path, b"three")
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    assert last_line(path) == b"three"


def test_a_file_of_half_a_line_has_no_last_one(tmp_path: Path):
    path = tmp_path / "lines"
    assert last_line(path) == b""
    path.write_bytes(b"hal")
    assert last_line(path) == b""
    append_line(path, b"one")
    assert path.read_bytes() == b"one\n"


# -- round numbers and revisions -------------------------------------------------------------------

MODEL, OTHER = b"\x01" * 32, b"\x02" * 32


def test_numbers_grow_across_restarts(tmp_path: Path):
    numbers = [RoundCounter(tmp_path / "rounds").next() for _ in range(5)]
    assert numbers == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [Crash, full], ids=["crash", "full disk"])
def test_no_number_is_ever_given_twice(tmp_path: Path, error: Callable[[], BaseException]):
    counter, given_out = RoundCounter(tmp_path / "rounds"), []

    def step() -> None:
        given_out.append(counter.next())

    for _ in everywhere(step, error):
        given_out.append(RoundCounter(tmp_path / "rounds").next())
    assert given_out == sorted(set(given_out))


def test_a_number_is_durable_before_it_is_given(tmp_path: Path):
    counter = RoundCounter(tmp_path / "rounds")
    with trouble(0, full, ["fsync"]), pytest.raises(StorageError):
        counter.next()
    assert not (tmp_path / "rounds").exists()


def test_a_revision_is_used_up_when_uploads_begin(tmp_path: Path):
    counter = RoundCounter(tmp_path / "rounds")
    assert counter.revision(MODEL) == 0
    counter.next()
    assert counter.revision(MODEL) == 0  # called, but nobody was let upload
    counter.uploads_begin(MODEL, 0)
    again = RoundCounter(tmp_path / "rounds")
    assert again.revision(MODEL) == 1
    assert again.revision(OTHER) == 0
    again.uploads_begin(MODEL, 1)
    again.uploads_begin(MODEL, 0)  # never back
    assert again.revision(MODEL) == 2
    assert again.next() == 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=30))
def test_models_are_remembered_as_long_as_devices_do(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("covey_coordinator.store.directory.MAX_REMEMBERED_MODELS", 10)
        patch.setattr(files.os, "fsync", lambda fd: None)
        counter = RoundCounter(tmp_path_factory.mktemp("fleet") / "rounds")
        recent: dict[int, int] = {}
        for model in order:
            revision = counter.revision(bytes([model]) * 32)
            assert revision == recent.get(model, -1) + 1
            counter.uploads_begin(bytes([model]) * 32, revision)
            recent.pop(model, None)
            recent[model] = revision
            recent = dict(list(recent.items())[-10:])


@pytest.mark.parametrize("data", [b"", b"7\n", b"\xff", b'{"last": -1}', b'{"last": 1.5}', b"[]"])
def test_a_damaged_counter_is_not_guessed_at(tmp_path: Path, data: bytes):
    (tmp_path / "rounds").write_bytes(data)
    for ask in (RoundCounter.next, lambda counter: counter.revision(MODEL)):
        with pytest.raises(StorageError) as caught:
            ask(RoundCounter(tmp_path / "rounds"))
        assert f"{tmp_path / 'rounds'} is damaged (" in str(caught.value)
        assert 'write {"last": N} into it' in str(caught.value)
    (tmp_path / "rounds").write_text('{"last": 41}')
    assert RoundCounter(tmp_path / "rounds").next() == 42


# -- runs ------------------------------------------------------------------------------------------


def make(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs" / "one", b'plan = "p"', RUN_ID)


def test_a_new_run_is_queued(tmp_path: Path):
    run = make(tmp_path)
    assert run.name == "one"
    assert run.state() == RunState(run_id=RUN_ID.hex())
    assert (run.path / "run.toml").read_bytes() == b'plan = "p"'
    assert (run.read_metrics(), run.progress()) == ([], None)
    assert run.parameters(run.state(), 3) is None


def test_a_name_is_taken_once(tmp_path: Path):
    make(tmp_path)
    with pytest.raises(ConfigError, match="there is a run 'one' already; choose another name"):
        make(tmp_path)


@pytest.mark.parametrize("error", [full], ids=["full disk"])
def test_a_run_that_could_not_be_made_leaves_its_name_free(
    tmp_path: Path, error: Callable[[], BaseException]
):
    times = 0
    for _ in everywhere(lambda: make(tmp_path), error, ["open", "write", "fsync", "mkdir"]):
        times += 1
        assert not (tmp_path / "runs" / "one").exists()
    assert times >= 5
    assert make_state(tmp_path).status == "queued"


def make_state(tmp_path: Path) -> RunState:
    return RunDirectory(tmp_path / "runs" / "one").state()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[1]",
        b"{}",
        b'{"run_id": "00", "status": "queued"}',
        b'{"run_id": "00000000000000000000000000000000", "status": "asleep"}',
        b'{"run_id": "00000000000000000000000000000000", "rounds_done": -1}',
        b'{"run_id": "00000000000000000000000000000000", "model": "xyz"}',
        b'{"run_id": "00000000000000000000000000000000", "what": 1}',
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, data: bytes):
    run = make(tmp_path)
    (run.path / "state.json").write_bytes(data)
    with pytest.raises(StorageError) as caught:
        run.state()
    assert f"{run.path / 'state.json'} is damaged (" in str(caught.value)
    assert "queue it anew" in str(caught.value)


def test_a_missing_state_is_named(tmp_path: Path):
    with pytest.raises(StorageError, match=r"cannot read .*state\.json: No such file"):
        RunDirectory(tmp_path).state()


FLAT = [np.array([i, i + 1, i + 2], np.float32) for i in range(3)]


def finish_round(run: RunDirectory, state: RunState, index: int) -> None:
    """A completed round as `Run` saves it."""
    run.stage_model(index, FLAT[index], b"onnx %d" % index)
    state.rounds_done = state.rounds_completed = state.model_index = index
    state.model = hashlib.sha256(FLAT[index].tobytes()).hexdigest()
    state.last = {"index": index}
    run.save_state(state)
    run.settle(state)


@pytest.mark.parametrize("error", [Crash, full], ids=["crash", "full disk"])
def test_a_round_s_end_is_kept_whole_or_not_at_all(
    tmp_path: Path, error: Callable[[], BaseException]
):
    run = make(tmp_path)
    finish_round(run, run.state(), 1)
    seen = set()

    def step() -> None:
        finish_round(run, run.state(), 2)

    for at in everywhere(step, error):
        again = RunDirectory(run.path)  # a new process
        state = again.state()
        parameters = again.parameters(state, 3)
        assert parameters is not None
        assert parameters.tolist() == FLAT[state.rounds_done].tolist()
        again.settle(state)
        lines = [line["index"] for line in again.read_metrics()]
        assert lines == list(range(1, state.rounds_done + 1)), at
        assert (again.path / "parameters.bin").read_bytes() == FLAT[state.rounds_done].tobytes()
        assert (again.path / "model.onnx").read_bytes() == b"onnx %d" % state.rounds_done
        assert not (again.path / "next.bin").exists()
        seen.add(state.rounds_done)
        if state.rounds_done == 2:  # back to where it was, for the next crash
            again.save_state(RunState(run_id=RUN_ID.hex()))
            again.metrics.unlink()
            finish_round(again, again.state(), 1)
    assert seen == {1, 2}
    assert [line["index"] for line in run.read_metrics()] == [1, 2]


def test_settling_twice_changes_nothing(tmp_path: Path):
    run = make(tmp_path)
    finish_round(run, run.state(), 1)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    run.settle(run.state())
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_the_model_is_stored_once_where_there_are_links(tmp_path: Path):
    run = make(tmp_path)
    finish_round(run, run.state(), 1)
    assert (run.path / "model.onnx").samefile(run.path / "rounds" / "00001" / "model.onnx")


def test_where_there_are_no_links_the_model_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", link)
    run = make(tmp_path)
    finish_round(run, run.state(), 1)
    assert (run.path / "model.onnx").read_bytes() == b"onnx 1"


@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_a_model_that_is_not_the_one_is_refused(tmp_path: Path, damage: str):
    run = make(tmp_path)
    finish_round(run, run.state(), 1)
    path = run.path / "parameters.bin"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(FLAT[1].tobytes()[:-1] if damage == "cut" else FLAT[2].tobytes())
    with pytest.raises(
        StorageError, match=r"parameters\.bin is not the model that state\.json names"
    ):
        run.parameters(run.state(), 3)


def test_a_model_of_another_plan_is_refused(tmp_path: Path):
    run = make(tmp_path)
    finish_round(run, run.state(), 1)
    with pytest.raises(StorageError):
        run.parameters(run.state(), 4)


def test_metrics_with_a_torn_last_line_are_read_without_it(tmp_path: Path):
    run = make(tmp_path)
    finish_round(run, run.state(), 1)
    with run.metrics.open("ab") as file:
        file.write(b'{"index": 2, "outc')
    assert run.read_metrics() == [{"index": 1}]
    finish_round(run, run.state(), 2)
    assert run.metrics.read_bytes() == b'{"index":1}\n{"index":2}\n'


def test_metrics_that_cannot_be_read(tmp_path: Path):
    run = make(tmp_path)
    run.metrics.mkdir()
    with pytest.raises(StorageError, match=r"cannot read .*metrics\.jsonl: Is a directory"):
        run.read_metrics()


def test_progress_is_a_hint(tmp_path: Path):
    run = make(tmp_path)
    progress = Progress(
        round=7, index=2, phase="share", detail="", answered=1, awaited=3, present=4
    )
    run.show(progress)
    assert run.progress() == progress
    (run.path / "progress.json").write_bytes(b"\xff{")
    assert run.progress() is None


def test_state_survives_a_round_trip(tmp_path: Path):
    run = make(tmp_path)
    state = RunState(
        status="running",
        run_id=RUN_ID.hex(),
        rounds_done=5,
        rounds_completed=3,
        rounds_abandoned=2,
        model="ab" * 32,
        model_index=4,
        last={"index": 5, "reason": "äöü", "loss": 0.25},
        message="hello",
    )
    run.save_state(state)
    assert run.state() == state
    assert msgspec.json.decode((run.path / "state.json").read_bytes())["rounds_done"] == 5
