"""The coordinator's files: whole or not there, and what they say survives any crash."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator import files
from covey_coordinator.files import append_line, last_line, write_atomic
from covey_coordinator.store import FILE, Progress, RunDirectory, RunState, Store
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


# -- runs ------------------------------------------------------------------------------------------


def make(tmp_path: Path) -> RunDirectory:
    store = Store.open(tmp_path / FILE)
    return RunDirectory.create(tmp_path / "runs" / "one", b'plan = "p"', RUN_ID, store)


def taken_up(run: RunDirectory) -> RunDirectory:
    """By a new process."""
    run.store.close()
    return RunDirectory(run.path, Store.open(run.path.parents[1] / FILE))


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
    with Store.open(tmp_path / FILE) as store:
        return store.run("one")


def test_a_run_the_database_does_not_know_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no run 'two' in this fleet"):
        RunDirectory(tmp_path / "two", Store.in_memory()).state()


def test_what_a_killed_covey_run_left_is_cleared_away(tmp_path: Path):
    path = tmp_path / "runs" / "one"
    path.mkdir(parents=True)
    (path / "run.toml").write_bytes(b"half")
    assert (make(tmp_path).path / "run.toml").read_bytes() == b'plan = "p"'


def test_files_of_a_run_that_was_forgotten_are_not_touched(tmp_path: Path):
    """Whoever lost the database wants to keep the models."""
    path = tmp_path / "runs" / "one"
    (path / "rounds").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds files of a run that the database does not know"):
        make(tmp_path)
    assert (path / "rounds").exists()


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


FLAT = [np.array([i, i + 1, i + 2], np.float32) for i in range(3)]


def finish_round(run: RunDirectory, state: RunState, index: int) -> None:
    """A completed round as `Run` saves it."""
    run.stage_model(index, FLAT[index], b"onnx %d" % index)
    state.rounds_done = state.rounds_completed = state.model_index = index
    state.model = hashlib.sha256(FLAT[index].tobytes()).hexdigest()
    state.last = {"index": index}
    run.finish_round(state)
    run.settle(state)


@pytest.mark.parametrize("error", [Crash, full], ids=["crash", "full disk"])
@pytest.mark.parametrize("links", [True, False])
def test_a_round_s_end_is_kept_whole_or_not_at_all(
    tmp_path: Path,
    error: Callable[[], BaseException],
    links: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    if not links:
        monkeypatch.setattr(files.os, "link", no_links)
    seen = []

    def fresh() -> RunDirectory:
        (tmp_path / str(len(seen))).mkdir()
        run = make(tmp_path / str(len(seen)))
        finish_round(run, run.state(), 1)
        return run

    current = [fresh()]
    for _ in everywhere(lambda: finish_round(current[0], current[0].state(), 2), error):
        again = taken_up(current[0])
        state = again.state()
        parameters = again.parameters(state, 3)
        assert parameters is not None
        assert parameters.tolist() == FLAT[state.rounds_done].tolist()
        again.settle(state, whole=True)
        assert again.read_metrics() == again.store.rounds("one")
        lines = [line["index"] for line in again.read_metrics()]
        assert lines == list(range(1, state.rounds_done + 1))
        assert (again.path / "parameters.bin").read_bytes() == FLAT[state.rounds_done].tobytes()
        assert (again.path / "model.onnx").read_bytes() == b"onnx %d" % state.rounds_done
        seen.append(state.rounds_done)
        again.store.close()
        current[0] = fresh()
    assert set(seen) == {1, 2}
    assert [line["index"] for line in current[0].read_metrics()] == [1, 2]


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
    monkeypatch.setattr(files.os, "link", no_links)
    run = make(tmp_path)
    finish_round(run, run.state(), 1)
    assert (run.path / "model.onnx").read_bytes() == b"onnx 1"


@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_a_model_that_is_not_the_one_is_refused(tmp_path: Path, damage: str):
    run = make(tmp_path)
    finish_round(run, run.state(), 1)
    for path in (run.path / "parameters.bin", run.round(1) / "parameters.bin"):
        assert run.parameters(run.state(), 3) is not None  # while either is right
        path.unlink()
        if damage != "gone":
            path.write_bytes(FLAT[1].tobytes()[:-1] if damage == "cut" else FLAT[2].tobytes())
    with pytest.raises(
        StorageError, match=r"parameters\.bin is not the model that .*covey\.db names; restore both"
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


def test_metrics_are_brought_to_what_the_database_says(tmp_path: Path):
    run = make(tmp_path)
    for index in (1, 2):
        finish_round(run, run.state(), index)
    lines = b'{"index":1}\n{"index":2}\n'
    for damage in (b"", b'{"index":2}\n', b"x" * 100, lines + b'{"index":3}\n', None):
        if damage is None:
            run.metrics.unlink()
        else:
            run.metrics.write_bytes(damage)
        run.settle(run.state(), whole=True)
        assert run.metrics.read_bytes() == lines
    run.metrics.write_bytes(b"y" + lines[1:])
    run.settle(run.state())  # after a round the end is enough
    assert run.metrics.read_bytes() == b"y" + lines[1:]


def test_a_model_without_its_round_s_files_is_left_as_it_is(tmp_path: Path):
    run = make(tmp_path)
    finish_round(run, run.state(), 1)
    run.drop_models([1])
    assert not run.round(1).exists()
    run.settle(run.state())
    assert (run.path / "parameters.bin").read_bytes() == FLAT[1].tobytes()
    (run.path / "parameters.bin").write_bytes(b"")
    with pytest.raises(StorageError, match=r"rounds/00001 lacks the model that .* names; restore"):
        run.settle(run.state())


def test_a_model_goes_and_its_transcript_stays(tmp_path: Path):
    run = make(tmp_path)
    for index in (1, 2):
        finish_round(run, run.state(), index)
        (run.round(index) / "transcript").write_bytes(b"t")
    assert sorted(run.staged()) == [1, 2]
    run.drop_models([1])
    assert sorted(run.staged()) == [2]
    assert [path.name for path in run.round(1).iterdir()] == ["transcript"]
