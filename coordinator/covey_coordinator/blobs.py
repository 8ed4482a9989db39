"""Serves blobs and takes in uploads: the coordinator's two ends of `covey_shared.chunks`."""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from covey_coordinator.spool import FileSink
from covey_shared import chunks
from covey_shared.chunks import Assembly, Blob, BlobDigest, Chunk
from covey_shared.errors import MalformedError, StorageError
from covey_shared.messages import MAX_RANGES, DeviceId
from covey_shared.mqtt import publish_all
from covey_shared.topics import Topics
from covey_shared.transport import Transport

log = logging.getLogger("covey.coordinator")

Ranges = tuple[tuple[int, int], ...]

# Requests of many devices for the same chunks are gathered for a moment and answered once: the
# broker multiplies, not we.
GATHER_S = 0.1

# How long an upload stands still before its missing chunks are asked for.
PATIENCE_S = 3.0

# Chunks kept in memory before their announcement was handled, of all devices together: 30 MB, of which
# no device can take what the others need. What is dropped beyond that is asked for again.
MAX_EARLY_CHUNKS = 256
MAX_EARLY_PER_DEVICE = 32

# How often a device's upload may turn out not to be what it announced.
MAX_RESETS = 2


class BlobServer:
    """Publishes the chunks that devices ask for, of the blobs that are on offer."""

    def __init__(self, transport: Transport, topics: Topics) -> None:
        self._transport = transport
        self._topics = topics
        self._offered: dict[bytes, Blob] = {}
        self._wanted: dict[bytes, set[int]] = {}
        self._asked = asyncio.Event()

    def offer(self, blobs: Iterable[bytes]) -> None:
        """From now on these are on offer, and no others."""
        self._offered = {blob.digest: blob for blob in map(chunks.blob_of, blobs)}
        self._wanted.clear()

    def want(self, digest: bytes, ranges: Ranges) -> None:
        """Some device lacks these chunks. Unknown blobs and chunks beyond the end are ignored."""
        blob = self._offered.get(digest)
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
                blob = self._offered.get(digest)
                if blob is not None:  # it may have been withdrawn meanwhile
                    yield topic, chunks.frame(blob, index)


@dataclass(slots=True)
class _Upload:
    assembly: Assembly
    sink: FileSink
    h: bytes
    last_progress: float
    resets: int = 0


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

    patience_s: how long an upload may stand still before its missing chunks are asked for.
    """

    directory: Path
    patience_s: float = PATIENCE_S
    problem: str | None = None
    _uploads: dict[DeviceId, _Upload] = field(default_factory=dict)
    _early: dict[DeviceId, list[Chunk]] = field(default_factory=dict)
    _shut: bool = False

    def open(self) -> None:
        """Start a round with an empty spool. Raises StorageError."""
        self.close()
        self.problem, self._shut = None, False
        try:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot make the spool {self.directory}: {error.strerror}; free some space"
            ) from error

    def close(self) -> None:
        """Drop everything."""
        for upload in self._uploads.values():
            try:
                upload.sink.remove()
            except StorageError as error:
                log.error("%s", error)
        self._uploads.clear()
        self._early.clear()

    def shut(self) -> None:
        """No update counts from now on: drop those that came too late, and all that still come.

        The members reveal the keys of their pair masks, so nothing of them is to lie about.
        """
        self.close()
        self._shut = True

    def expect(self, device: DeviceId, h: bytes, payload: bytes, size: int, now: float) -> bool:
        """A device announced its update. True if it is already complete: its chunks
        may have come before."""
        if device in self._uploads or self._shut:
            return False
        sink = FileSink(self.directory / device, size)
        assembly = Assembly(BlobDigest(payload), size, sink)
        self._uploads[device] = _Upload(assembly, sink, h, now)
        complete = False
        for chunk in self._early.pop(device, ()):
            with contextlib.suppress(MalformedError):  # of something else than was announced
                complete = self._add(device, chunk, now) or complete
        return complete

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

    def take(self, device: DeviceId, keep: Path | None = None) -> bytes:
        """The complete upload, its digest checked; its file is deleted, or moved to `keep`.

        Raises MalformedError if the bytes are not those that were announced, StorageError if they
        cannot be read back; either way it then starts over.
        """
        upload = self._uploads[device]
        try:
            upload.assembly.verify()
            data = upload.sink.read(0, upload.assembly.size)
        except MalformedError:
            upload.assembly.reset()
            upload.resets += 1
            raise
        except StorageError as error:
            upload.assembly.reset()
            self.problem = str(error)
            raise
        if keep is not None:
            with contextlib.suppress(OSError):
                upload.sink.close()
                upload.sink.path.replace(keep)
        with contextlib.suppress(StorageError):  # `open` clears the directory
            upload.sink.remove()
        return data

    def stalled(self, now: float) -> list[Missing]:
        """Uploads that stand still, and what they lack."""
        missing = []
        for device, upload in self._uploads.items():
            if upload.assembly.complete or now - upload.last_progress < self.patience_s:
                continue
            if upload.resets > MAX_RESETS:
                continue  # it keeps sending bytes that are not what it signed
            upload.last_progress = now
            ranges = upload.assembly.missing(MAX_RANGES)
            missing.append(Missing(device, upload.h, upload.assembly.digest, ranges))
        return missing
