"""A device as `covey-device run` has it, that leaves evidence: python -m chaos.device --evidence DIR ...

The very same command is run. Only the assembled service is told to leave two things in DIRECTORY: the
encoding of every update, before it is masked, in a file of its own (see `covey_fleet.witness`), and every
message that it sends or is sent, but for chunks, in `DEVICE.log`. Nothing of it goes through the broker.
"""

import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from covey_device import assembly, cli
from covey_fleet.witness import Witness
from covey_shared.topics import Topics
from covey_shared.transport import Incoming

SENT, HEARD, DONE = b"s", b"h", b"d"
_RECORD = struct.Struct("<cdI")


@dataclass(frozen=True)
class Logged:
    """One message. kind: `SENT` before it is handed to the broker, `DONE` when that has it, `HEARD`.
    at: monotonic seconds, the same clock for all processes of a machine."""

    kind: bytes
    at: float
    envelope: bytes


def records(path: Path) -> Iterator[Logged]:
    """All whole records of a log, the oldest first."""
    data, at = path.read_bytes(), 0
    while at + _RECORD.size <= len(data):
        kind, when, size = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        if at + size > len(data):
            return
        yield Logged(kind, when, data[at : at + size])
        at += size


class Log:
    """Appends records, each in one write: a kill leaves whole ones."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("ab", buffering=0)

    def add(self, kind: bytes, envelope: bytes) -> None:
        self._file.write(_RECORD.pack(kind, time.monotonic(), len(envelope)) + envelope)


def with_evidence(parts: assembly.DeviceParts, directory: Path) -> Any:
    """The service that `assemble` makes, with its words written down."""
    service = plain_assemble(parts)
    device = service.device
    service._session._witness = Witness(directory).of(device)
    log, topics = Log(directory / f"{device}.log"), Topics(parts.config.fleet)
    outbox = topics.outbox(device)
    heard = {topics.round, topics.all, topics.inbox(device)}
    publish, start = service.transport.publish, service.transport.start

    async def noted_publish(topic: str, payload: bytes, *, retain: bool = False) -> None:
        if topic == outbox:
            log.add(SENT, payload)
        await publish(topic, payload, retain=retain)
        if topic == outbox:
            log.add(DONE, payload)

    async def noted_start(
        on_message: Callable[[Incoming], None],
        on_connected: Callable[[], Awaitable[None]],
        on_disconnected: Callable[[str], None],
    ) -> None:
        def hear(incoming: Incoming) -> None:
            if incoming.topic in heard and incoming.payload:
                log.add(HEARD, incoming.payload)
            on_message(incoming)

        await start(hear, on_connected, on_disconnected)

    service.transport.publish = noted_publish
    service.transport.start = noted_start
    return service


plain_assemble = assembly.assemble


def main() -> None:
    option, directory, *arguments = sys.argv[1:]
    assert option == "--evidence"
    assembly.assemble = lambda parts: with_evidence(parts, Path(directory))
    cli.main(["run", *arguments], prog_name="covey-device")


if __name__ == "__main__":
    main()
