"""Blobs going out and updates coming in, over a network that need not be friendly."""

import asyncio
import errno
import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey_coordinator import blobs
from covey_coordinator.blobs import MAX_EARLY_CHUNKS, MAX_EARLY_PER_DEVICE, BlobServer, UploadDesk
from covey_coordinator.spool import FileSink
from covey_shared import chunks
from covey_shared.chunks import CHUNK_BYTES
from covey_shared.errors import MalformedError, StorageError
from covey_shared.messages import DeviceId
from covey_shared.topics import Topics
from memory_fleet import go

TOPICS = Topics("farm")
A, B = DeviceId("a"), DeviceId("b")
H = b"h" * 32
DATA = random.Random(1).randbytes(2 * CHUNK_BYTES + 1000)
DIGEST = hashlib.sha256(DATA).digest()
FRAMES = list(chunks.split(chunks.blob_of(DATA)))


def desk(tmp_path: Path) -> UploadDesk:
    made = UploadDesk(tmp_path / "spool", patience_s=3.0)
    made.open()
    return made


def expect(made: UploadDesk, device: DeviceId = A, now: float = 0.0) -> bool:
    return made.expect(device, H, DIGEST, len(DATA), now)


def in_spool(made: UploadDesk) -> list[str]:
    return sorted(path.name for path in made.directory.iterdir())


# -- uploads ---------------------------------------------------------------------------------------


def test_an_upload_comes_whole_and_its_file_stays_until_the_round_is_over(tmp_path: Path):
    made = desk(tmp_path)
    assert not expect(made)
    assert [made.feed(A, frame, 0.0) for frame in FRAMES] == [False, False, True]
    assert in_spool(made) == ["a"]
    assert made.take(A) == DATA
    assert in_spool(made) == ["a"]
    made.close()
    assert in_spool(made) == []


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_in_any_order_and_however_often(tmp_path_factory: pytest.TempPathFactory, data: Any):
    """Chunks before and after the announcement, repeated, in any order: complete is said, once."""
    made = desk(tmp_path_factory.mktemp("desk"))
    order = data.draw(
        st.permutations([0, 1, 2, *data.draw(st.lists(st.integers(0, 2), max_size=5))])
    )
    announced = data.draw(st.integers(0, len(order)))
    complete = []
    for position, index in enumerate(order):
        if position == announced:
            complete.append(expect(made))
        complete.append(made.feed(A, FRAMES[index], 0.0))
    if announced == len(order):
        complete.append(expect(made))
    assert complete.count(True) == 1
    assert made.take(A) == DATA
    made.close()


def test_a_second_announcement_changes_nothing(tmp_path: Path):
    made = desk(tmp_path)
    expect(made)
    made.feed(A, FRAMES[0], 0.0)
    assert not made.expect(A, H, b"x" * 32, 5, 0.0)
    assert [made.feed(A, frame, 0.0) for frame in FRAMES] == [False, False, True]


def test_chunks_of_something_else_are_refused(tmp_path: Path):
    made = desk(tmp_path)
    expect(made)
    other = chunks.frame(chunks.blob_of(b"other"), 0)
    with pytest.raises(MalformedError):
        made.feed(A, other, 0.0)
    for garbage in (b"", b"\x01" * 50, FRAMES[0][:-1]):
        with pytest.raises(MalformedError):
            made.feed(A, garbage, 0.0)


def test_a_chunk_of_an_upload_of_another_size_is_refused(tmp_path: Path):
    """Nobody writes beyond what was announced, and signed."""
    made = desk(tmp_path)
    made.expect(A, H, DIGEST, 100, 0.0)
    with pytest.raises(MalformedError):
        made.feed(A, FRAMES[0], 0.0)
    assert in_spool(made) == []


def test_early_chunks_of_something_else_do_not_hinder(tmp_path: Path):
    made = desk(tmp_path)
    made.feed(A, chunks.frame(chunks.blob_of(b"other"), 0), 0.0)
    lying = bytearray(FRAMES[2])
    lying[33:41] = (3 * CHUNK_BYTES).to_bytes(8, "big")
    for frame in (*FRAMES, FRAMES[0]):
        made.feed(A, frame, 0.0)
    assert expect(made)
    assert made.take(A) == DATA


def test_early_chunks_are_bounded_and_leave_room_for_others(tmp_path: Path):
    made = desk(tmp_path)
    small = [chunks.frame(chunks.blob_of(bytes([i, j])), 0) for i in range(40) for j in range(25)]
    for frame in small:
        made.feed(A, frame, 0.0)
    assert len(made._early[A]) == MAX_EARLY_PER_DEVICE
    for i in range(100):
        for frame in small[: 2 * MAX_EARLY_PER_DEVICE]:
            made.feed(DeviceId(f"ghost-{i}"), frame, 0.0)
    assert sum(map(len, made._early.values())) == MAX_EARLY_CHUNKS
    assert len(made._early) <= MAX_EARLY_CHUNKS
    expect(made, B)
    assert [made.feed(B, frame, 0.0) for frame in FRAMES] == [False, False, True]


def test_a_wrong_upload_starts_over_and_is_asked_for_a_few_times(tmp_path: Path):
    made = desk(tmp_path)
    expect(made)
    wrong = [FRAMES[0], FRAMES[1][:-1] + bytes((FRAMES[1][-1] ^ 1,)), FRAMES[2]]
    for time in range(blobs.MAX_RESETS + 1):
        assert [made.feed(A, frame, float(time)) for frame in wrong][-1]
        with pytest.raises(MalformedError, match="fetch it again"):
            made.take(A)
        asked = made.stalled(1000.0 * (time + 1))
        if time < blobs.MAX_RESETS:
            assert [(m.device, m.h, m.payload, m.ranges) for m in asked] == [
                (A, H, DIGEST, ((0, 3),))
            ]
        else:
            assert asked == []
    # Should the right one come after all, it is taken.
    assert [made.feed(A, frame, 9.0) for frame in FRAMES][-1]
    assert made.take(A) == DATA


def test_what_stands_still_is_asked_for_and_only_that(tmp_path: Path):
    made = desk(tmp_path)
    expect(made, A, now=0.0)
    expect(made, B, now=0.0)
    made.feed(A, FRAMES[1], 2.0)
    for frame in FRAMES:
        made.feed(B, frame, 2.0)
    assert made.stalled(4.9) == []
    (missing,) = made.stalled(5.0)
    assert (missing.device, missing.ranges) == (A, ((0, 1), (2, 1)))
    assert made.stalled(7.9) == []  # asked just now
    assert len(made.stalled(8.0)) == 1


def test_a_repeated_chunk_is_no_progress(tmp_path: Path):
    """Else who repeats one for ever would never be asked for the others."""
    made = desk(tmp_path)
    expect(made)
    made.feed(A, FRAMES[0], 0.0)
    for second in range(1, 4):
        made.feed(A, FRAMES[0], float(second))
    assert len(made.stalled(3.0)) == 1


def test_a_full_disk_leaves_a_chunk_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def reserve(sink: FileSink, fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made = desk(tmp_path)
    expect(made)
    with monkeypatch.context() as patch:
        patch.setattr(FileSink, "_reserve", reserve)
        for frame in FRAMES:
            assert not made.feed(A, frame, 0.0)
    assert made.problem is not None
    assert "No space left on device; free some space, or move the spool" in made.problem
    (missing,) = made.stalled(5.0)
    assert missing.ranges == ((0, 3),)
    assert [made.feed(A, frame, 6.0) for frame in FRAMES] == [False, False, True]
    assert made.take(A) == DATA


def test_an_upload_that_cannot_be_read_back_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = desk(tmp_path)
    expect(made)
    for frame in FRAMES:
        made.feed(A, frame, 0.0)
    with (made.directory / "a").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(StorageError, match="was it cut"):
        made.take(A)
    assert made.problem is not None
    assert made.stalled(5.0)[0].ranges == ((0, 3),)
    for frame in FRAMES:
        made.feed(A, frame, 6.0)
    assert made.take(A) == DATA


def test_a_new_round_starts_with_an_empty_spool(tmp_path: Path):
    made = desk(tmp_path)
    expect(made)
    made.feed(A, FRAMES[0], 0.0)
    (made.directory / "left-over").write_bytes(b"from a crash")
    made.problem = "old"
    made.open()
    assert in_spool(made) == []
    assert made.problem is None
    assert made.stalled(100.0) == []
    assert made.directory.stat().st_mode & 0o777 == 0o700
    expect(made)
    assert [made.feed(A, frame, 0.0) for frame in FRAMES][-1]


# -- another process goes on -----------------------------------------------------------------------


def left(tmp_path: Path, *frames: bytes) -> tuple[UploadDesk, dict[str, bytes]]:
    """What a process leaves that had these, and what it had saved of it."""
    made = desk(tmp_path)
    expect(made)
    for frame in frames:
        made.feed(A, frame, 0.0)
    saved = {}
    for device, sink, received in made.unsaved(blobs.CHECKPOINT_S):
        sink.sync()
        saved[str(device)] = received
    made.leave()
    return UploadDesk(made.directory, patience_s=3.0), saved


def test_chunks_that_came_are_not_asked_for_again(tmp_path: Path):
    made, saved = left(tmp_path, FRAMES[1])
    made.reopen(saved, ())
    assert not expect(made)
    assert made.stalled(5.0)[0].ranges == ((0, 1), (2, 1))
    assert not made.feed(A, FRAMES[0], 5.0)
    assert made.feed(A, FRAMES[2], 5.0)
    assert made.take(A) == DATA


def test_an_upload_that_came_whole_is_complete_at_once(tmp_path: Path):
    made, saved = left(tmp_path, *FRAMES)
    made.reopen(saved, ())
    assert expect(made)
    assert made.take(A) == DATA


def test_what_was_not_saved_comes_again(tmp_path: Path):
    made, _ = left(tmp_path, *FRAMES)
    made.reopen({}, ())
    assert not expect(made)
    assert made.stalled(5.0)[0].ranges == ((0, 3),)
    assert [made.feed(A, frame, 5.0) for frame in FRAMES] == [False, False, True]
    assert made.take(A) == DATA


@pytest.mark.parametrize("harm", ["gone", "short", "bitmap"])
def test_what_was_saved_of_a_file_that_is_not_there(tmp_path: Path, harm: str):
    made, saved = left(tmp_path, *FRAMES)
    if harm == "gone":
        made.path(A).unlink()
    elif harm == "short":
        made.path(A).write_bytes(DATA[:-1])
    else:
        saved = {"a": b"\xff\xff"}
    made.reopen(saved, ())
    assert not expect(made)
    assert [made.feed(A, frame, 5.0) for frame in FRAMES] == [False, False, True]
    assert made.take(A) == DATA


def test_saved_chunks_that_are_others_are_found_at_the_end(tmp_path: Path):
    """The disk lied about what was on it."""
    made, saved = left(tmp_path, *FRAMES)
    made.path(A).write_bytes(bytes(len(DATA)))
    made.reopen(saved, ())
    assert expect(made)
    with pytest.raises(MalformedError, match="has digest"):
        made.take(A)
    assert [made.feed(A, frame, 5.0) for frame in FRAMES] == [False, False, True]
    assert made.take(A) == DATA


def test_what_is_in_the_sum_is_asked_for_no_more(tmp_path: Path):
    made, _ = left(tmp_path, *FRAMES)
    made.reopen({}, [A])
    assert made.whole(A, DIGEST, len(DATA)) == DATA
    assert not expect(made)
    assert made.stalled(100.0) == []
    assert not made.feed(A, FRAMES[0], 5.0)
    made.shut([A])
    assert in_spool(made) == ["a"]
    made.close()
    assert in_spool(made) == []


def test_an_update_in_the_sum_must_be_the_one_that_was_announced(tmp_path: Path):
    made, _ = left(tmp_path, *FRAMES)
    made.reopen({}, [A])
    with pytest.raises(MalformedError, match="not the update that a announced"):
        made.whole(A, DIGEST, len(DATA) + 1)
    made.path(A).write_bytes(bytes(len(DATA)))
    with pytest.raises(MalformedError, match="not the update that a announced"):
        made.whole(A, DIGEST, len(DATA))
    with pytest.raises(StorageError, match=r"cannot read .*: No such file"):
        made.whole(B, DIGEST, len(DATA))


def test_long_uploads_alone_are_saved_and_not_too_often(tmp_path: Path):
    made = desk(tmp_path)
    expect(made)
    made.feed(A, FRAMES[0], 1.0)
    assert made.unsaved(blobs.CHECKPOINT_S - 0.1) == []
    ((device, _, received),) = made.unsaved(blobs.CHECKPOINT_S)
    assert (device, received) == (A, b"\x01")
    made.feed(A, FRAMES[1], 6.0)
    assert made.unsaved(blobs.CHECKPOINT_S + 1.0) == []
    ((_, _, received),) = made.unsaved(2 * blobs.CHECKPOINT_S)
    assert received == b"\x03"
    assert made.unsaved(3 * blobs.CHECKPOINT_S) == []  # no news
    made.feed(A, FRAMES[2], 16.0)
    made.take(A)
    assert made.unsaved(9 * blobs.CHECKPOINT_S) == []


def test_a_spool_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot make the spool .*file/spool: Not a directory"):
        UploadDesk(tmp_path / "file" / "spool").open()


def test_closing_goes_on_past_a_file_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def remove(sink: FileSink) -> None:
        raise StorageError("cannot remove")

    made = desk(tmp_path)
    expect(made)
    with monkeypatch.context() as patch:
        patch.setattr(FileSink, "remove", remove)
        made.close()
    assert made.stalled(100.0) == []


# -- blobs -----------------------------------------------------------------------------------------


class Publishing:
    """The part of a transport that a blob server uses."""

    def __init__(self) -> None:
        self.published: list[tuple[str, bytes]] = []

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        assert not retain
        self.published.append((topic, payload))


async def served(wants: list[tuple[bytes, Any]], offered: list[bytes]) -> list[int]:
    """Which chunks of DATA were published, in order, after some devices asked."""
    transport = Publishing()
    server = BlobServer(transport, TOPICS)  # type: ignore[arg-type]
    server.offer(offered)
    serving = asyncio.create_task(server.serve())
    for digest, ranges in wants:
        server.want(digest, ranges)
    await asyncio.sleep(0.2)
    serving.cancel()
    assert all(topic == TOPICS.blob(DIGEST) for topic, _ in transport.published)
    return [chunks.decode_frame(payload).index for _, payload in transport.published]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "GATHER_S", 0.02)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("wants", "sent"),
    [
        ([(DIGEST, ((0, 3),))], [0, 1, 2]),
        ([(DIGEST, ((0, 3),))] * 50, [0, 1, 2]),  # many devices, one answer
        ([(DIGEST, ((2, 1),)), (DIGEST, ((0, 1),))], [0, 2]),
        ([(DIGEST, ((1, 2**32),))], [1, 2]),
        ([(DIGEST, ((3, 1), (2**32, 2**32)))], []),
        ([(b"?" * 32, ((0, 3),))], []),
        ([(DIGEST, ())], []),
    ],
)
def test_chunks_that_were_asked_for_are_published_once(wants: Any, sent: list[int]):
    async def scenario() -> None:
        assert await served(wants, [DATA, b"another"]) == sent

    go(scenario())


@pytest.mark.usefixtures("quick")
def test_what_is_no_longer_on_offer_is_not_sent():
    async def scenario() -> None:
        transport = Publishing()
        server = BlobServer(transport, TOPICS)  # type: ignore[arg-type]
        server.offer([DATA])
        serving = asyncio.create_task(server.serve())
        server.want(DIGEST, ((0, 3),))
        server.offer([b"the next model"])
        await asyncio.sleep(0.1)
        server.want(DIGEST, ((0, 3),))
        await asyncio.sleep(0.1)
        serving.cancel()
        assert transport.published == []

    go(scenario())


@pytest.mark.usefixtures("quick")
def test_what_another_run_offered_lingers_for_a_while():
    """And what was asked for is not forgotten because the same is offered again."""

    async def scenario() -> None:
        transport = Publishing()
        server = BlobServer(transport, TOPICS)  # type: ignore[arg-type]
        serving = asyncio.create_task(server.serve())
        server.offer([DATA])
        server.want(DIGEST, ((0, 1),))
        server.offer([DATA, b"more"])
        await asyncio.sleep(0.1)
        assert len(transport.published) == 1
        server.linger(0.3)
        server.offer([b"the next run's"])
        server.want(DIGEST, ((1, 1),))
        await asyncio.sleep(0.1)
        assert len(transport.published) == 2
        await asyncio.sleep(0.3)
        server.want(DIGEST, ((2, 1),))
        await asyncio.sleep(0.1)
        assert len(transport.published) == 2
        # One run more, and the timer of the first does not end what lingers of the second.
        server.linger(0.2)
        server.offer([DATA])
        server.linger(5.0)
        server.offer([])
        await asyncio.sleep(0.3)
        server.want(DIGEST, ((2, 1),))
        await asyncio.sleep(0.1)
        assert len(transport.published) == 3
        serving.cancel()

    go(scenario())
