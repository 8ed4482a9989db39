"""The file behind an upload: random access, resuming, and a disk that is full."""

import os
import stat
from pathlib import Path

import pytest

from covey_coordinator.spool import FileSink
from covey_shared import chunks
from covey_shared.errors import LocalProtocolError, MalformedError, StorageError


def test_an_upload_resumes_over_the_file_after_a_restart(tmp_path: Path) -> None:
    data = os.urandom(3 * chunks.CHUNK_BYTES + 5)
    blob = chunks.blob_of(data)
    path = tmp_path / "upload"
    with FileSink(path, blob.size) as sink:
        assembly = chunks.Assembly(blob.digest, blob.size, sink)
        assert not path.exists()
        for index in (3, 1):
            assembly.add(chunks.decode_frame(chunks.frame(blob, index)))
        sink.sync()
        received = assembly.received
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == blob.size

    with FileSink(path, blob.size) as sink:
        assembly = chunks.Assembly(blob.digest, blob.size, sink, received=received)
        assert assembly.missing(8) == ((0, 1), (2, 1))
        for index in (0, 1, 2):
            assembly.add(chunks.decode_frame(chunks.frame(blob, index)))
        assembly.verify()
    assert path.read_bytes() == data


def test_a_byte_that_changed_on_disk_is_found(tmp_path: Path) -> None:
    blob = chunks.blob_of(os.urandom(chunks.CHUNK_BYTES + 1))
    with FileSink(tmp_path / "upload", blob.size) as sink:
        assembly = chunks.Assembly(blob.digest, blob.size, sink)
        for frame in chunks.split(blob):
            assembly.add(chunks.decode_frame(frame))
        sink.write(17, bytes([sink.read(17, 1)[0] ^ 1]))
        with pytest.raises(MalformedError):
            assembly.verify()


def test_the_whole_size_is_reserved_at_the_first_write(tmp_path: Path) -> None:
    with FileSink(tmp_path / "upload", 1 << 20) as sink:
        sink.write(0, b"x")
        assert sink.path.stat().st_blocks * 512 >= 1 << 20


def test_it_never_writes_beyond_its_size(tmp_path: Path) -> None:
    with FileSink(tmp_path / "upload", 4) as sink:
        for offset, data in ((-1, b"a"), (4, b"a"), (2, b"abc"), (0, b"abcde")):
            with pytest.raises(LocalProtocolError):
                sink.write(offset, data)
    assert not sink.path.exists()


def test_a_full_disk_names_the_file_and_what_to_do() -> None:
    # /dev/full refuses every write with ENOSPC, and reserving with ENODEV
    with (
        FileSink(Path("/dev/full"), 100) as sink,
        pytest.raises(
            StorageError, match=r"cannot write /dev/full: No space left on device; free some space"
        ),
    ):
        sink.write(0, b"x")


def test_a_disk_without_room_for_all_of_it_shows_at_once(tmp_path: Path) -> None:
    # larger than any file may be: the reservation fails though the first byte would fit
    with FileSink(tmp_path / "upload", 1 << 62) as sink, pytest.raises(StorageError, match="free"):
        sink.write(0, b"x")


def test_a_missing_directory_is_a_storage_error(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "no" / "upload", 4)
    for attempt in (lambda: sink.write(0, b"x"), lambda: sink.read(0, 1), sink.sync):
        with pytest.raises(StorageError, match="check the directory"):
            attempt()
    sink.remove()


def test_a_file_that_was_cut_is_a_storage_error(tmp_path: Path) -> None:
    with FileSink(tmp_path / "upload", 10) as sink:
        sink.write(0, b"0123456789")
        os.truncate(sink.path, 4)
        with pytest.raises(StorageError, match="ends at 4"):
            sink.read(0, 10)


def test_a_symlink_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"keep")
    (tmp_path / "upload").symlink_to(tmp_path / "target")
    with FileSink(tmp_path / "upload", 4) as sink, pytest.raises(StorageError):
        sink.write(0, b"x")
    assert (tmp_path / "target").read_bytes() == b"keep"


def test_remove_deletes_and_the_sink_can_start_again(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "upload", 4)
    sink.write(0, b"abcd")
    sink.remove()
    assert not sink.path.exists()
    sink.remove()
    sink.write(0, b"ef")
    assert sink.read(0, 2) == b"ef"
    sink.close()
