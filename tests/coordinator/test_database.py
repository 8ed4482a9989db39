"""The coordinator's database: what was acknowledged is there, whatever happened since."""

import contextlib
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine

from covey_coordinator.store import OpenRound, RunState, Store, database, opening, schema
from covey_shared.errors import ConfigError, LocalProtocolError, StorageError

RUN_ID = bytes(range(16))
SECRET = bytes.fromhex("5ec2e7" * 10) + b"\x01\x02"
MODEL, OTHER = b"\x01" * 32, b"\x02" * 32
SCRIPTS = Path(opening.__file__).parents[1] / "migrations"


def opened(number: int = 7, run: str = "one", index: int = 1) -> OpenRound:
    return OpenRound(run, index, number, b"spec" * 50, SECRET, 1.5)


def line(number: int, index: int) -> dict[str, Any]:
    return {"round": number, "index": index, "outcome": "completed", "seconds": 0.25}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "covey.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as store:
        store.add_run("one", RUN_ID, 10.0)
        yield store


def finish(store: Store, number: int, index: int, run: str = "one") -> RunState:
    state = store.run(run)
    state.rounds_done = state.rounds_completed = index
    state.last = line(number, index)
    store.finish_round(run, state)
    return state


# -- round numbers and revisions -------------------------------------------------------------------


def test_numbers_grow_across_restarts(path: Path):
    numbers = []
    for _ in range(3):
        with Store.open(path) as store:
            numbers += [store.next_round(), store.next_round()]
    assert numbers == [1, 2, 3, 4, 5, 6]


def test_a_revision_is_used_up_when_uploads_begin(path: Path):
    with Store.open(path) as store:
        assert store.revision(MODEL) == 0
        store.next_round()
        assert store.revision(MODEL) == 0  # called, but nobody was let upload
        store.uploads_begin(MODEL, 0)
    with Store.open(path) as store:
        assert (store.revision(MODEL), store.revision(OTHER)) == (1, 0)
        store.uploads_begin(MODEL, 1)
        store.uploads_begin(MODEL, 0)  # never back
        assert store.revision(MODEL) == 2
        assert store.next_round() == 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=30))
def test_models_are_remembered_as_long_as_devices_do(order: list[int]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "MAX_REMEMBERED_MODELS", 10)
        recent: dict[int, int] = {}
        with Store.in_memory() as store:
            for model in order:
                revision = store.revision(bytes([model]) * 32)
                assert revision == recent.get(model, -1) + 1
                store.uploads_begin(bytes([model]) * 32, revision)
                recent.pop(model, None)
                recent[model] = revision
                recent = dict(list(recent.items())[-10:])
    assert database.MAX_REMEMBERED_MODELS == 1000


# -- runs and rounds -------------------------------------------------------------------------------


def test_a_new_run_is_queued(store: Store):
    assert store.run("one") == RunState(run_id=RUN_ID.hex())
    assert (store.rounds("one"), store.opened(), store.entries()) == ([], None, [])


def test_runs_are_listed_oldest_first(store: Store):
    store.add_run("b", RUN_ID, 20.0)
    store.add_run("a", RUN_ID, 20.0)
    store.add_run("first", RUN_ID, 5.0)
    assert [name for name, _ in store.runs()] == ["first", "one", "b", "a"]


def test_a_name_is_taken_once(store: Store):
    with pytest.raises(ConfigError, match="there is a run 'one' already; choose another name"):
        store.add_run("one", bytes(16), 0.0)
    assert store.run("one").run_id == RUN_ID.hex()


@pytest.mark.parametrize("ask", ["run", "save", "finish"])
def test_a_run_there_is_not_is_named(store: Store, ask: str):
    state = RunState(run_id="0" * 32, last=line(1, 1))
    with pytest.raises(ConfigError, match="there is no run 'two' in this fleet"):
        {
            "run": lambda: store.run("two"),
            "save": lambda: store.save_run("two", state),
            "finish": lambda: store.finish_round("two", state),
        }[ask]()
    assert store.rounds("one") == []


states = st.builds(
    RunState,
    status=st.sampled_from(["queued", "running", "completed", "stopped", "failed"]),
    run_id=st.binary(min_size=16, max_size=16).map(bytes.hex),
    rounds_done=st.integers(0, 2**40),
    rounds_completed=st.integers(0, 2**40),
    rounds_abandoned=st.integers(0, 2**40),
    model=st.one_of(st.just(""), st.binary(min_size=32, max_size=32).map(bytes.hex)),
    model_index=st.integers(0, 2**40),
    last=st.one_of(
        st.none(),
        st.dictionaries(
            st.text(max_size=5), st.one_of(st.integers(-(2**50), 2**50), st.floats(-1e9, 1e9), st.text())
        ),
    ),
    message=st.text(),
    transcripts_lost=st.integers(0, 2**40),
    transcript_problem=st.text(),
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(states)
def test_a_state_comes_back_as_it_was_saved(state: RunState):
    with Store.in_memory() as store:
        store.add_run("one", RUN_ID, 0.0)
        store.save_run("one", state)
        assert store.run("one") == state


def test_a_round_lives_from_its_opening_to_its_end(path: Path, store: Store):
    store.open_round(opened())
    store.journal([b"a", b"b"])
    store.journal([])
    store.journal([b"c"], durable=False)
    store.received("pi-1", b"\x01")
    store.received("pi-2", b"\x02")
    store.received("pi-1", b"\x03")
    store.close()
    with Store.open(path) as again:
        assert again.opened() == opened()
        assert again.entries() == [b"a", b"b", b"c"]
        assert again.received_chunks() == {"pi-1": b"\x03", "pi-2": b"\x02"}
        state = finish(again, 7, 1)
        assert again.run("one") == state
        assert again.rounds("one") == [line(7, 1)]
        assert (again.opened(), again.entries(), again.received_chunks()) == (None, [], {})


def test_a_round_opened_or_ended_twice_is_one(store: Store):
    """As after an error that came too late."""
    store.open_round(opened())
    store.journal([b"a"])
    store.open_round(opened())
    assert store.entries() == [b"a"]
    finish(store, 7, 1)
    finish(store, 7, 1)
    assert store.rounds("one") == [line(7, 1)]


def test_only_one_round_is_open(store: Store):
    store.add_run("two", RUN_ID, 11.0)
    store.open_round(opened())
    with pytest.raises(LocalProtocolError, match="round 7 is open still"):
        store.open_round(opened(8))
    with pytest.raises(LocalProtocolError, match="the open round is one of run 'one'"):
        finish(store, 8, 1, "two")
    assert store.opened() == opened()
    assert store.run("two").rounds_done == 0


def test_without_an_open_round_there_is_nothing_to_write_to(store: Store):
    for write in (lambda: store.journal([b"a"]), lambda: store.received("pi-1", b"")):
        with pytest.raises(LocalProtocolError, match="no round is open"):
            write()
    with pytest.raises(LocalProtocolError, match="line of metrics"):
        store.finish_round("one", store.run("one"))


def test_a_forgotten_round_leaves_its_number_used(store: Store):
    number = store.next_round()
    store.open_round(opened(number))
    store.journal([b"a"])
    store.forget_round()
    assert (store.opened(), store.entries(), store.rounds("one")) == (None, [], [])
    assert store.next_round() == number + 1


# -- secrets ---------------------------------------------------------------------------------------


def bytes_of(path: Path) -> bytes:
    """Everything SQLite keeps of a database. After `close`: a file closed here would cost this
    process SQLite's locks."""
    return b"".join(p.read_bytes() for p in path.parent.glob(path.name + "*"))


@pytest.mark.parametrize("end", ["finish", "forget"])
def test_a_round_s_secret_is_gone_from_the_disk_at_its_end(path: Path, store: Store, end: str):
    """While the database is open still: nobody waits for that before they steal a disk."""
    entry = b"entry that nobody needs" * 300
    store.open_round(opened())
    store.journal([entry])

    def raw() -> bytes:
        return subprocess.run(
            ["cat", *path.parent.iterdir()], capture_output=True, check=True
        ).stdout

    before = raw()
    assert SECRET in before
    assert entry[:500] in before
    if end == "finish":
        finish(store, 7, 1)
    else:
        store.forget_round()
    after = raw()
    assert b"alembic" in after
    assert SECRET not in after
    assert b"entry that nobody needs" not in after


def test_a_secret_is_in_no_representation_and_no_error(path: Path, store: Store):
    assert repr(SECRET)[2:12] not in repr(opened())
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(
            "CREATE TRIGGER never BEFORE INSERT ON open_round BEGIN SELECT RAISE(FAIL, 'never'); END"
        )
    with pytest.raises(StorageError) as caught:
        store.open_round(opened())
    told = str(caught.value) + str(caught.value.__cause__)
    assert "never" in told
    assert repr(SECRET)[2:12] not in told


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o177])
def test_the_files_are_this_user_s_alone_whatever_the_umask(path: Path, umask: int):
    before = os.umask(umask)
    try:
        with Store.open(path) as store:
            store.next_round()
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"covey.db": 0o600, "covey.db-wal": 0o600, "covey.db-shm": 0o600}


def test_a_file_that_others_could_read_is_closed_to_them(path: Path):
    Store.open(path).close()
    path.chmod(0o664)
    with Store.open(path) as store:
        store.next_round()
        assert {stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()} == {0o600}


# -- death -----------------------------------------------------------------------------------------

WRITER = """
import json, sys
from pathlib import Path
from covey_coordinator.store import OpenRound, Store
store = Store.open(Path(sys.argv[1]))
def say(*what):
    print(json.dumps(what), flush=True)
state = store.run("one")
while True:
    number = store.next_round()
    say("number", number)
    index = state.rounds_done + 1
    store.forget_round()
    store.open_round(OpenRound("one", index, number, b"s" * 500, b"x" * 32, 0.0))
    say("opened", number)
    for entry in range(6):
        store.journal([b"%d" % entry, b"e" * 3000], durable=entry % 2 == 0)
        say("entries", number, entry + 1)
    state.rounds_done = state.rounds_completed = index
    state.last = {"round": number, "index": index}
    store.finish_round("one", state)
    say("finished", number, index)
"""


def test_what_was_acknowledged_survives_kill_9(path: Path, store: Store):
    store.close()
    acknowledged: list[list[Any]] = []
    for life in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            said = [child.stdout.readline() for _ in range(3 + 11 * life)]
            child.kill()
            said += child.stdout.readlines()
        assert child.returncode == -signal.SIGKILL
        acknowledged += [json.loads(text) for text in said if text.endswith(b"\n")]
        _check_against(path, acknowledged, life + 1)
    assert len(acknowledged) > 80
    numbers = [entry[1] for entry in acknowledged if entry[0] == "number"]
    assert numbers == sorted(set(numbers))


def _check_against(path: Path, acknowledged: list[list[Any]], lives: int) -> None:
    finished = [entry[1:] for entry in acknowledged if entry[0] == "finished"]
    with Store.open(path) as store:
        state, lines, open_round = store.run("one"), store.rounds("one"), store.opened()
        entries = store.entries()
    seen = [[row["round"], row["index"]] for row in lines]
    # Of each life at most the one thing that was under way when it died is there on top.
    assert [row for row in seen if row in finished] == finished
    assert len(seen) <= len(finished) + lives
    assert [index for _, index in seen] == list(range(1, len(seen) + 1))
    assert state.rounds_done == len(seen)
    assert state.last == (lines[-1] if lines else None)
    what, number, *rest = acknowledged[-1]
    if what == "entries":
        if open_round is None:
            assert seen[-1][0] == number
        else:
            assert open_round.round == number
            assert len(entries) in (2 * rest[0], 2 * rest[0] + 2)
            assert entries == [
                e for i in range(len(entries) // 2) for e in (b"%d" % i, b"e" * 3000)
            ]
    if open_round is None:
        assert entries == []


def pragma(store: Store, name: str) -> object:
    connection = store._connected().connection.driver_connection
    assert connection is not None
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_what_is_durable_is_synced(store: Store):
    """That it survives a power cut no test of one process can show: that SQLite is told to, it can."""
    assert pragma(store, "journal_mode") == "wal"
    assert [pragma(store, name) for name in ("foreign_keys", "secure_delete")] == [1, 1]
    full, normal = 2, 1
    store.open_round(opened())
    assert pragma(store, "synchronous") == full
    for write, expected in (
        (lambda: store.journal([b"a"], durable=False), normal),
        (lambda: store.journal([b"a"]), full),
        (lambda: store.received("pi-1", b"\x01"), normal),
        (store.next_round, full),
        (lambda: store.journal([b"a"], durable=False), normal),
        (lambda: finish(store, 7, 1), full),
    ):
        write()
        assert pragma(store, "synchronous") == expected
    # And after an error that drops the connection.
    with pytest.raises(StorageError), store._writing(durable=False) as connection:
        connection.exec_driver_sql("INSERT INTO nowhere VALUES (1)")
    assert store._connection is None
    store.next_round()
    assert pragma(store, "synchronous") == full
    assert pragma(store, "secure_delete") == 1


# -- a disk that refuses ---------------------------------------------------------------------------


def may_mount() -> bool:
    """Whether this machine lets us mount a small disk."""
    tried = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(tried, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=768k", "none", mounted], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


def limit_pages(store: Store, more: int | None) -> None:
    """As on a full disk, for SQLite's own code."""
    connection = store._connected().connection.driver_connection
    assert connection is not None
    (now,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {2**30 if more is None else now + more}")


def fill(store: Store) -> int:
    """Journal until the disk is full -> entries that were acknowledged."""
    count = 0

    def write() -> None:
        nonlocal count
        while count < 200:
            store.journal([b"e" * 20_000, b"f" * 100])
            count += 1

    with pytest.raises(StorageError) as caught:
        write()
    assert str(caught.value) == f"cannot write {store.path}: the disk is full; free some space"
    return count


def test_a_full_disk_is_told_and_nothing_half_done_is_seen(store: Store):
    store.open_round(opened())
    limit_pages(store, 10)
    count = fill(store)
    assert len(store.entries()) == 2 * count
    for write in (
        lambda: store.journal([b"e" * 20_000]),
        lambda: store.received("pi-1", b"b" * 20_000),
        lambda: store.add_run("big" * 20_000, RUN_ID, 1.0),
    ):
        with pytest.raises(StorageError, match="the disk is full"):
            write()
    limit_pages(store, None)
    store.journal([b"last"])
    assert store.entries()[2 * count :] == [b"last"]
    finish(store, 7, 1)
    assert [name for name, _ in store.runs()] == ["one"]


# Where nobody may mount anything, SQLite's own limit above has to do.
if may_mount():

    def test_a_really_full_disk(small_disk: Path):
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(400_000))
        path = small_disk / "covey.db"
        with Store.open(path) as store:
            store.add_run("one", RUN_ID, 0.0)
            store.open_round(opened())
            count = fill(store)
            with pytest.raises(StorageError, match="the disk is full"):
                store.journal([b"e" * 20_000])
            assert len(store.entries()) == 2 * count
            ballast.unlink()
            store.journal([b"last"])
            finish(store, 7, 1)
        with Store.open(path) as again:
            assert again.rounds("one") == [line(7, 1)]

    def test_no_room_even_to_begin(small_disk: Path):
        (small_disk / "ballast").write_bytes(bytes(768 * 1024))
        with pytest.raises(StorageError, match=r"covey\.db.*free some space"):
            Store.open(small_disk / "covey.db")
        (small_disk / "ballast").unlink()
        with Store.open(small_disk / "covey.db") as store:
            assert store.next_round() == 1


def test_a_database_that_another_process_holds(
    path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(opening, "BUSY_S", 0.2)
    with Store.open(path) as waiting, contextlib.closing(sqlite3.connect(path)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError) as caught:
            waiting.next_round()
        assert str(caught.value) == (
            f"{path} was held by another process for 0.2 s; try again, or end what holds it"
        )
        assert waiting.run("one").status == "queued"  # readers do not wait
        other.execute("ROLLBACK")
        assert waiting.next_round() == 1


def test_a_short_hold_is_waited_for(path: Path, store: Store):
    with contextlib.closing(sqlite3.connect(path, check_same_thread=False)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.2, lambda: other.execute("ROLLBACK"))
        timer.start()
        assert store.next_round() == 1
        timer.join()


def test_a_file_that_was_moved_is_not_written_to(path: Path, store: Store):
    """What is written to a file without a name is lost."""
    path.rename(path.with_name("aside"))
    with pytest.raises(StorageError, match="was moved or replaced while it was in use"):
        store.next_round()
    path.with_name("aside").rename(path)
    assert store.next_round() == 1


def test_a_place_where_nothing_can_be_made(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    for where in (tmp_path / "no" / "covey.db", tmp_path / "file" / "covey.db"):
        with pytest.raises(StorageError, match=rf"cannot use {where}: .*check its owner"):
            Store.open(where)
    (tmp_path / "covey.db").mkdir()
    with pytest.raises(StorageError, match=r"cannot use .*covey\.db: .*check its owner"):
        Store.open(tmp_path / "covey.db")


# -- damage ----------------------------------------------------------------------------------------


def test_what_is_no_database_is_refused_and_left_alone(path: Path):
    path.write_bytes(b"not a database at all\n" * 100)
    with pytest.raises(
        StorageError, match=r"is not a database, or damaged; stop covey and put a backup"
    ):
        Store.open(path)
    assert path.read_bytes() == b"not a database at all\n" * 100


def test_another_program_s_database_is_left_alone(path: Path):
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE songs (title TEXT)")
        other.commit()
    with pytest.raises(
        StorageError, match="but not of covey: it has the table 'songs'; move it away"
    ):
        Store.open(path)


def test_damage_is_found_before_anything_is_done(path: Path, store: Store):
    for index in range(1, 200):
        finish(store, index, index)
    store.close()
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 100] = os.urandom(100)
    path.write_bytes(data)
    with pytest.raises(StorageError) as caught:
        Store.open(path)
    assert f"{path} is damaged (" in str(caught.value)
    assert "put a backup of it in its place" in str(caught.value)
    assert path.read_bytes() == data


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_damage_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    path = tmp_path_factory.mktemp("damage") / "covey.db"
    with Store.open(path) as store:
        store.add_run("one", RUN_ID, 0.0)
        store.open_round(opened())
        store.journal([b"e" * 5000])
        finish(store, 7, 1)
    content = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["bytes", "cut", "page"])):
        case "bytes":
            for _ in range(data.draw(st.integers(1, 20))):
                at = data.draw(st.integers(0, len(content) - 1))
                content[at] = data.draw(st.integers(0, 255))
        case "cut":
            del content[data.draw(st.integers(1, len(content) - 1)) :]
        case _:
            page = data.draw(st.integers(0, len(content) // 4096 - 1))
            content[4096 * page : 4096 * (page + 1)] = (
                data.draw(st.binary(min_size=1, max_size=1)) * 4096
            )
    path.write_bytes(content)
    with contextlib.suppress(StorageError), Store.open(path) as store:
        with contextlib.suppress(ConfigError):  # its name may be what was damaged
            store.run("one")
        store.runs()
        store.rounds("one")
        store.opened()
        store.entries()
        store.next_round()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("status", "asleep"),
        ("run_id", "00"),
        ("rounds_done", -1),
        ("model", "xyz"),
        ("last", "{"),
        ("last", "[]"),
        ("message", b"\xff"),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(
    path: Path, store: Store, column: str, value: object
):
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(f"UPDATE runs SET {column} = ?", (value,))  # noqa: S608
        other.commit()
    with pytest.raises(StorageError, match=r"covey\.db is damaged \(run 'one': "):
        store.run("one")


# -- several at once -------------------------------------------------------------------------------


def test_threads_and_processes_share_it(path: Path, store: Store):
    script = (
        "import sys; from pathlib import Path; from covey_coordinator.store import Store\n"
        "s = Store.open(Path(sys.argv[1]))\n"
        "print(*[s.next_round() for _ in range(40)])"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda: numbers.extend(store.next_round() for _ in range(40)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for child in children:
        numbers += map(int, child.communicate()[0].split())
        assert child.returncode == 0
    assert sorted(numbers) == list(range(1, 241))


def test_processes_may_make_it_at_the_same_moment(path: Path):
    script = (
        "import sys; from pathlib import Path; from covey_coordinator.store import Store\n"
        "sys.stdin.readline(); print(Store.open(Path(sys.argv[1])).next_round())"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]  # fmt: skip
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    assert sorted(int(child.communicate()[0]) for child in children) == [1, 2, 3, 4]


# -- before there was a database -------------------------------------------------------------------


def test_files_of_before_are_taken_over(path: Path):
    fleet = path.parent
    uploads = {MODEL.hex(): 2, OTHER.hex(): 0}
    (fleet / "rounds").write_text(json.dumps({"last": 41, "uploads": uploads}))
    for at, name in enumerate(("newer", "older", "torn")):
        (fleet / "runs" / name).mkdir(parents=True)
        (fleet / "runs" / name / "run.toml").touch()
        os.utime(fleet / "runs" / name / "run.toml", (100 - at, 100 - at))
    (fleet / "runs" / "torn" / "state.json").write_text("{")
    (fleet / "runs" / "newer" / "state.json").write_text(json.dumps({"run_id": "0" * 32}))
    state = RunState(
        run_id=RUN_ID.hex(), status="running", rounds_done=2, rounds_completed=2, last=line(41, 2)
    )
    older = fleet / "runs" / "older"
    (older / "state.json").write_text(
        json.dumps({"run_id": RUN_ID.hex(), "status": "running", "rounds_done": 2,
                    "rounds_completed": 2, "last": line(41, 2)})
    )  # fmt: skip
    # The crash was before the last line was appended, and in the middle of another.
    (older / "metrics.jsonl").write_text(json.dumps(line(40, 1)) + '\n{"ind')
    with Store.open(path) as store:
        assert [name for name, _ in store.runs()] == ["older", "newer"]
        assert store.run("older") == state
        assert store.rounds("older") == [line(40, 1), line(41, 2)]
        assert store.next_round() == 42
        assert (store.revision(MODEL), store.revision(OTHER), store.revision(SECRET)) == (3, 1, 0)
    assert not (fleet / "rounds").exists()
    assert (fleet / "rounds.taken").exists()
    assert (older / "state.json.taken").exists()
    with Store.open(path) as again:
        assert again.next_round() == 43


@pytest.mark.parametrize("data", [b"", b"7\n", b"\xff", b'{"last": -1}', b'{"last": 1.5}', b"[]"])
def test_a_damaged_counter_is_not_guessed_at(path: Path, data: bytes):
    counter = path.with_name("rounds")
    counter.write_bytes(data)
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            Store.open(path)
        assert f"{counter} is damaged (" in str(caught.value)
        assert 'write {"last": N} into it' in str(caught.value)
    counter.write_text('{"last": 41}')
    with Store.open(path) as store:
        assert store.next_round() == 42


# -- schemas ---------------------------------------------------------------------------------------


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.set_main_option("path_separator", "os")
    return ScriptDirectory.from_config(config)


def shape_of(path: Path) -> dict[str, Any]:
    """Tables, their columns and indices, as SQLite has them. In which order indices were made, their
    first column, is no part of it."""
    with contextlib.closing(sqlite3.connect(path)) as raw:
        tables = [t for (t,) in raw.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        return {
            table: [
                sorted(str(row[at:]) for row in raw.execute(f"PRAGMA {what}({table})").fetchall())
                for what, at in (("table_info", 0), ("foreign_key_list", 0), ("index_list", 1))
            ]
            for table in tables
        }


def made_at(path: Path, revision: str) -> None:
    """A database as the covey of that schema left it: by the migrations up to there."""
    from alembic import command

    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.set_main_option("path_separator", "os")
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute("INSERT INTO counter (id, last_round) VALUES (1, 41)")
        raw.execute(
            "INSERT INTO runs (name, created_unix, run_id, status, rounds_done, rounds_completed, "
            "rounds_abandoned, model, model_index, message, transcripts_lost, transcript_problem) "
            "VALUES ('one', 5.0, ?, 'running', 1, 1, 0, '', 0, '', 0, '')",
            (RUN_ID.hex(),),
        )
        raw.execute(
            "INSERT INTO rounds (run, \"index\", round, line) VALUES ('one', 1, 7, ?)",
            (json.dumps(line(7, 1)),),
        )
        raw.execute("INSERT INTO open_round VALUES (1, 'one', 2, 41, x'00', ?, 0.0)", (SECRET,))
        raw.commit()


def test_the_code_knows_the_revisions_that_there_are():
    found = [script.revision for script in scripts().walk_revisions()]
    assert tuple(reversed(found)) == schema.REVISIONS
    assert scripts().get_current_head() == schema.HEAD


def test_a_new_database_is_what_the_migrations_make(tmp_path: Path):
    made_at(tmp_path / "migrated.db", "head")
    Store.open(tmp_path / "new.db").close()
    assert shape_of(tmp_path / "new.db") == shape_of(tmp_path / "migrated.db")
    engine = create_engine(f"sqlite:///{tmp_path / 'migrated.db'}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
    engine.dispose()


@pytest.mark.parametrize("revision", schema.REVISIONS[:-1])
def test_an_older_schema_is_brought_to_the_newest(path: Path, revision: str):
    made_at(path, revision)
    with Store.open(path) as store:
        assert store.run("one").status == "running"
        assert store.rounds("one") == [line(7, 1)]
        assert store.opened() is not None
        assert store.next_round() == 42
        assert store.history("one")[0].turnout is None  # nothing was written down of it
        assert [(r.round, r.turnout, r.fate) for r in store.device_rounds("a", 9)] == [
            (7, None, None)
        ]
        assert store.sightings() == {}
        finish(store, 41, 2)
    made_at(path.with_name("fresh.db"), "head")
    assert shape_of(path) == shape_of(path.with_name("fresh.db"))
    copy = path.with_name(f"covey.db.{revision}")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert SECRET not in bytes_of(copy)
    with Store.open(copy) as restored:  # what it was, and it can be gone on with
        assert restored.run("one").status == "running"
        assert restored.opened() is None
        assert restored.next_round() == 42


@pytest.mark.parametrize("revision", schema.REVISIONS[:-1])
def test_a_migration_that_fails_changes_nothing(
    path: Path, revision: str, monkeypatch: pytest.MonkeyPatch
):
    made_at(path, revision)
    before = shape_of(path)
    real = opening._upgrade

    def upgrade(connection: Any) -> None:
        real(connection)
        connection.exec_driver_sql("INSERT INTO nowhere VALUES (1)")

    with monkeypatch.context() as patch:
        patch.setattr(opening, "_upgrade", upgrade)
        with pytest.raises(StorageError, match="no such table: nowhere"):
            Store.open(path)
    assert shape_of(path) == before
    with Store.open(path) as store:
        assert store.next_round() == 42


def test_without_room_for_a_copy_nothing_is_migrated(path: Path, monkeypatch: pytest.MonkeyPatch):
    made_at(path, schema.REVISIONS[0])
    copy = path.with_name(f"covey.db.{schema.REVISIONS[0]}")
    copy.mkdir()
    with pytest.raises(StorageError, match=r"cannot use .*covey\.db\.0001"):
        Store.open(path)
    copy.rmdir()
    Store.open(path).close()
    assert copy.is_file()


def test_a_newer_schema_is_refused(path: Path, store: Store):
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
        raw.commit()
    with pytest.raises(StorageError) as caught:
        Store.open(path)
    assert str(caught.value) == (
        f"{path} was written by a newer covey (its schema is 9999, this one knows up to "
        f"{schema.HEAD}): upgrade covey"
    )


def test_alembic_is_not_imported_without_need(path: Path):
    script = (
        "import sys; from pathlib import Path; from covey_coordinator.store import Store\n"
        "Store.open(Path(sys.argv[1])).close(); Store.open(Path(sys.argv[1])).close()\n"
        "print('alembic' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_a_copy_holds_all_but_the_open_round(path: Path, store: Store):
    finish(store, 6, 1)
    store.open_round(replace(opened(), index=2))
    store.back_up(path.with_name("copy"))
    assert SECRET not in bytes_of(path.with_name("copy"))
    assert stat.S_IMODE(path.with_name("copy").stat().st_mode) == 0o600
    assert store.opened() is not None
    with Store.open(path.with_name("copy")) as copy:
        assert copy.run("one") == store.run("one")
        assert copy.rounds("one") == [line(6, 1)]
        assert copy.opened() is None
