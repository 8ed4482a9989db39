"""Serves blobs and takes in uploads: the coordinator's two ends of `covey_shared.chunks`."""

import asyncio
import contextlib
import hashlib
import logging
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from covey_coordinator.files import sync_directory
from covey_coordinator.spool import FileSink
from covey_shared import chunks, wire
from covey_shared.chunks import Assembly, Blob, BlobDigest, Chunk
from covey_shared.errors import LocalProtocolError, MalformedError, RefusedError, StorageError
from covey_shared.messages import MAX_RANGES, DeviceId, WantBlob
from covey_shared.mqtt import publish_all
from covey_shared.topics import Topics
from covey_shared.transport import Transport

log = logging.getLogger("covey.coordinator")

Ranges = tuple[tuple[int, int], ...]

# Requests of many devices for the same chunks are gathered for a moment and answered once: the
# broker multiplies, not we.
GATHER_S = 0.1

# For how long the blobs of one run stay on offer when another begins: devices fetch its last model at
# leisure.
LINGER_S = 600.0

# How long an upload stands still before its missing chunks are asked for.
PATIENCE_S = 3.0

# Chunks kept in memory before their announcement was handled, of all devices together: 30 MB, of which
# no device can take what the others need. What is dropped beyond that is asked for again.
MAX_EARLY_CHUNKS = 256
MAX_EARLY_PER_DEVICE = 32

# How often a device's upload may turn out not to be what it announced.
MAX_RESETS = 2

# How often what has come of a long upload is made safe: more often wears cards out.
CHECKPOINT_S = 5.0


def request_of(data: bytes, device: DeviceId, fleet: str) -> WantBlob:
    """What a device asks for on its topic. Raises RemoteProtocolError.

    Not verified: anyone on the broker may read blobs; a hash is asked for, nothing else.
    """
    want = wire.decode_as(WantBlob, data).message
    if want.device != device or want.fleet != fleet:
        raise RefusedError(f"a request in another's name came from {device}'s topic")
    return want


class BlobServer:
    """Publishes the chunks that devices ask for, of the blobs that are on offer."""

    def __init__(self, transport: Transport, topics: Topics) -> None:
        self._transport = transport
        self._topics = topics
        self._offered: dict[bytes, Blob] = {}
        self._former: dict[bytes, Blob] = {}
        self._wanted: dict[bytes, set[int]] = {}
        self._asked = asyncio.Event()

    def offer(self, blobs: Iterable[bytes]) -> None:
        """From now on these are on offer, and no others, but for those that `linger`."""
        self._offered = {blob.digest: blob for blob in map(chunks.blob_of, blobs)}
        self._wanted = {d: wanted for d, wanted in self._wanted.items() if self._blob(d)}

    def linger(self, seconds: float = LINGER_S) -> None:
        """What is on offer now stays so for a while, beside what comes next."""
        self._former = former = self._offered

        def forget() -> None:
            if self._former is former:
                self._former = {}

        asyncio.get_running_loop().call_later(seconds, forget)

    def _blob(self, digest: bytes) -> Blob | None:
        return self._offered.get(digest) or self._former.get(digest)

    def want(self, digest: bytes, ranges: Ranges) -> None:
        """Some device lacks these chunks. Unknown blobs and chunks beyond the end are ignored."""
        blob = self._blob(digest)
        if blob is None:
            return
        wanted = self._wanted.setdefault(digest, set())
        for first, count in ranges:
            wanted.update(range(first, min(first + count, blob.n_chunks)))
        if wanted:
            self._asked.set()

    async def serve(self) -> None:
        """Answer for ever."""
        while True:
            await self._asked.wait()
            await asyncio.sleep(GATHER_S)
            self._asked.clear()
            wanted, self._wanted = self._wanted, {}
            await publish_all(self._transport, self._frames(wanted))

    def _frames(self, wanted: dict[bytes, set[int]]) -> Iterable[tuple[str, bytes]]:
        for digest, indices in wanted.items():
            topic = self._topics.blob(digest)
            for index in sorted(indices):
                blob = self._blob(digest)
                if blob is not None:  # it may have been withdrawn meanwhile
                    yield topic, chunks.frame(blob, index)


@dataclass(slots=True)
class _Upload:
    assembly: Assembly
    sink: FileSink
    h: bytes
    last_progress: float
    saved_at: float
    n_saved: int = 0
    resets: int = 0
    taken: bool = False


@dataclass(frozen=True, slots=True)
class Missing:
    """What to ask a device for again."""

    device: DeviceId
    h: bytes
    payload: bytes
    ranges: Ranges


@dataclass(slots=True)
class UploadDesk:
    """Masked updates on their way in, each in its spool file, bounded by what was announced.

    They stay there until the round's end, as its sum may have to be made anew by another process.
    patience_s: how long an upload may stand still before its missing chunks are asked for.
    """

    directory: Path
    patience_s: float = PATIENCE_S
    problem: str | None = None
    _uploads: dict[DeviceId, _Upload] = field(default_factory=dict)
    _early: dict[DeviceId, list[Chunk]] = field(default_factory=dict)
    _received: dict[str, bytes] = field(default_factory=dict)
    _added: frozenset[DeviceId] = frozenset()
    _shut: bool = False

    def open(self) -> None:
        """Start a round with an empty spool. Raises StorageError."""
        self._begin()
        shutil.rmtree(self.directory, ignore_errors=True)
        self._make()

    def reopen(self, received: Mapping[str, bytes], added: Iterable[DeviceId]) -> None:
        """Go on with a round that another process left. received: what it had saved of chunks (see
        `checkpoint`). added: devices whose update is in the sum. Raises StorageError."""
        self._begin()
        self._received, self._added = dict(received), frozenset(added)
        self._make()

    def _begin(self) -> None:
        self.leave()
        self.problem, self._shut = None, False
        self._received, self._added = {}, frozenset()

    def _make(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_directory(self.directory.parent)
        except OSError as error:
            raise StorageError(
                f"cannot make the spool {self.directory}: {error.strerror}; free some space"
            ) from error

    def leave(self) -> None:
        """Let go of everything; the files stay, for who goes on with the round."""
        for upload in self._uploads.values():
            upload.sink.close()
        self._uploads.clear()
        self._early.clear()

    def close(self) -> None:
        """The round is over: drop everything."""
        self._drop(set(self._uploads))
        self._early.clear()

    def shut(self, kept: Collection[DeviceId]) -> None:
        """No other update than these counts from now on: drop those that came too late, and all that
        still come.

        The members reveal the keys of their pair masks, so nothing of them is to lie about.
        """
        self._drop(set(self._uploads) - set(kept))
        self._early.clear()
        self._shut = True

    def _drop(self, devices: Iterable[DeviceId]) -> None:
        for device in devices:
            try:
                self._uploads.pop(device).sink.remove()
            except StorageError as error:
                log.error("%s", error)

    def path(self, device: DeviceId) -> Path:
        """Where a device's update lies."""
        return self.directory / device

    def expect(self, device: DeviceId, h: bytes, payload: bytes, size: int, now: float) -> bool:
        """A device announced its update. True if it is already complete: its chunks
        may have come before."""
        if device in self._uploads or self._shut:
            return False
        sink = FileSink(self.path(device), size)
        if device in self._added:
            self._uploads[device] = _Upload(_added(payload, size, sink), sink, h, now, now)
            self._uploads[device].taken = True
            return False
        assembly = self._resumed(device, payload, size, sink)
        self._uploads[device] = _Upload(assembly, sink, h, now, now, assembly.n_received)
        complete = assembly.complete
        for chunk in self._early.pop(device, ()):
            with contextlib.suppress(MalformedError):  # of something else than was announced
                complete = self._add(device, chunk, now) or complete
        return complete

    def _resumed(self, device: DeviceId, payload: bytes, size: int, sink: FileSink) -> Assembly:
        """An assembly of what has come already, if another process left something."""
        received = self._received.pop(device, None)
        with contextlib.suppress(OSError, LocalProtocolError):
            if received is not None and sink.path.stat().st_size == size:
                return Assembly(BlobDigest(payload), size, sink, received=received)
        with contextlib.suppress(StorageError):  # then writing into it will say so
            sink.remove()
        return Assembly(BlobDigest(payload), size, sink)

    def feed(self, device: DeviceId, frame: bytes, now: float) -> bool:
        """One frame of a device's upload; True when the upload is complete.

        Raises MalformedError for a wrong frame. A disk that is full is noted in `problem`, and the
        chunk stays missing: it is asked for again, and by then there may be space.
        """
        chunk = chunks.decode_frame(frame)
        if self._shut:
            return False
        if device not in self._uploads:
            # Chunks are handled at once, messages in their turn, so the first chunks often overtake
            # the message that announces them.
            waiting = self._early.get(device, [])
            total = sum(map(len, self._early.values()))
            if len(waiting) < MAX_EARLY_PER_DEVICE and total < MAX_EARLY_CHUNKS:
                self._early[device] = [*waiting, chunk]
            return False
        return self._add(device, chunk, now)

    def _add(self, device: DeviceId, chunk: Chunk, now: float) -> bool:
        upload = self._uploads[device]
        if upload.assembly.complete:
            return False
        before = upload.assembly.n_received
        try:
            complete = upload.assembly.add(chunk)
        except StorageError as error:
            if self.problem is None:
                log.error("%s", error)
            self.problem = str(error)
            return False
        if upload.assembly.n_received > before:
            upload.last_progress = now
        return complete

    def take(self, device: DeviceId) -> bytes:
        """The complete upload, its digest checked, and safe on the disk.

        Raises MalformedError if the bytes are not those that were announced, StorageError if they
        cannot be read back; either way it then starts over.
        """
        upload = self._uploads[device]
        try:
            upload.assembly.verify()
            upload.sink.sync()
            data = upload.sink.read(0, upload.assembly.size)
        except MalformedError:
            upload.assembly.reset()
            upload.resets += 1
            raise
        except StorageError as error:
            upload.assembly.reset()
            self.problem = str(error)
            raise
        upload.taken = True
        upload.sink.close()
        return data

    def whole(self, device: DeviceId, payload: bytes, size: int) -> bytes:
        """An update that was added by another process, its digest checked.

        Raises MalformedError if it is not the one that was announced, StorageError if it is gone.
        """
        path = self.path(device)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != size or hashlib.sha256(data).digest() != payload:
            raise MalformedError(f"{path} is not the update that {device} announced")
        return data

    def unsaved(self, now: float) -> list[tuple[DeviceId, FileSink, bytes]]:
        """Long uploads that have come further since: device, file, chunks in it so far. `sync` the
        file, and only then write down the chunks."""
        found = []
        for device, upload in self._uploads.items():
            assembly = upload.assembly
            if upload.taken or now - upload.saved_at < CHECKPOINT_S:
                continue
            upload.saved_at = now
            if assembly.n_received != upload.n_saved:
                upload.n_saved = assembly.n_received
                found.append((device, upload.sink, assembly.received))
        return found

    def stalled(self, now: float) -> list[Missing]:
        """Uploads that stand still, and what they lack."""
        missing = []
        for device, upload in self._uploads.items():
            if (
                upload.taken
                or upload.assembly.complete
                or now - upload.last_progress < self.patience_s
            ):
                continue
            if upload.resets > MAX_RESETS:
                continue  # it keeps sending bytes that are not what it signed
            upload.last_progress = now
            ranges = upload.assembly.missing(MAX_RANGES)
            missing.append(Missing(device, upload.h, upload.assembly.digest, ranges))
        return missing


def _added(payload: bytes, size: int, sink: FileSink) -> Assembly:
    """Complete: its bytes were checked when it was added to the sum."""
    n = chunks.n_chunks(size)
    bitmap = ((1 << n) - 1).to_bytes(-(-n // 8), "little")
    return Assembly(BlobDigest(payload), size, sink, received=bitmap)
