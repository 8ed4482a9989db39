"""The transcript of a round: what it is made of as bytes, and how it is read. Without I/O.

A transcript is a file that grows while a round runs::

    "covey transcript 1\\n"
    records: kind (1 byte), size of the body (4 bytes, big-endian), body

    ABOUT    whose round it is, under which keys, and how sums become models: the first record
    MESSAGE  an envelope, exactly as it was signed
    NOTE     something the coordinator noticed; its word alone
    KEY      the private half of the head's pk_reveal, of a round with a result only
    PAYLOAD  a masked update: its device's place in the cohort (1 byte), the packed vector
    THINNED  what is left of one: the place, and the payload's SHA-256
    ENDING   how the round ended
    SEAL     the coordinator's signature over all that stands before: the last record

The seal covers of a payload only its place and its hash, so that payloads can be taken out by anyone,
later, and the seal still stands. What a transcript says is checked in `transcript_checks`.

Bytes that are no transcript raise MalformedError, whatever they are; nothing is ever held in memory
but one record that is no payload.
"""

import enum
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from covey_shared import keys, wire
from covey_shared.errors import LocalProtocolError, MalformedError
from covey_shared.messages import MAX_REASON_CHARS, Bytes32, Device, FleetName, RoundId, Run

MAGIC = b"covey transcript 1\n"
LABEL = "transcript"
"""What the seal is signed as; no message of the protocol has this label."""

CHUNK_BYTES = 1 << 20
_PREFIX_BYTES = 5

Read = Callable[[int], bytes]
"""n -> the next n bytes, fewer only at the end."""


class Kind(enum.IntEnum):
    """What a record is."""

    ABOUT = 1
    MESSAGE = 2
    NOTE = 3
    KEY = 4
    PAYLOAD = 5
    THINNED = 6
    ENDING = 7
    SEAL = 8


_LIMITS = {
    Kind.ABOUT: 1024,
    Kind.MESSAGE: wire.MAX_MESSAGE_BYTES,
    Kind.NOTE: 2048,
    Kind.KEY: 32,
    Kind.THINNED: 33,
    Kind.ENDING: 2048,
    Kind.SEAL: keys.SIGNATURE_BYTES,
}


class About(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Whose round it is. index: its number within its run. fleet_ca, coordinator: public keys.

    rule, server_lr: how the coordinator says that it makes the next model from the average.
    """

    fleet: FleetName
    run: Run
    round: RoundId
    index: RoundId
    fleet_ca: Bytes32
    coordinator: Bytes32
    rule: Annotated[str, Meta(max_length=32)]
    server_lr: float


class Note(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the coordinator held against a device."""

    device: Device
    text: Annotated[str, Meta(max_length=MAX_REASON_CHARS)]


class Ending(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """completed: with a result. abandoned: without, and why. interrupted: the coordinator ended first."""

    outcome: Literal["completed", "abandoned", "interrupted"]
    reason: Annotated[str, Meta(max_length=MAX_REASON_CHARS)]


T = TypeVar("T", bound=msgspec.Struct)


def parsed(kind: type[T], body: bytes) -> T:
    """A record's body, in its one spelling. Raises MalformedError."""
    name = kind.__name__.lower()
    try:
        value = msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"the transcript's record {name}: {error}") from error
    if wire.body_of(value) != body:
        raise MalformedError(f"the transcript's record {name} is not in canonical form")
    return value


class Chain:
    """What the seal is over: a hash of all records so far."""

    def __init__(self) -> None:
        self._state = hashlib.sha256(keys.DOMAIN + MAGIC)

    def add(self, kind: Kind, body: bytes) -> None:
        """Any record but a payload."""
        if kind is Kind.THINNED:
            self.add_payload(body[0], body[1:])
        else:
            self._state.update(keys.digest("transcript record", bytes((kind,)), body))

    def add_payload(self, index: int, digest: bytes) -> None:
        """A payload, there or taken out: its place and its SHA-256."""
        body = bytes((index,)) + digest
        self._state.update(keys.digest("transcript record", bytes((Kind.PAYLOAD,)), body))

    def digest(self) -> bytes:
        """32 bytes: the text that is signed."""
        return self._state.digest()


class Encoder:
    """Makes a transcript's bytes, record by record, and the seal at the end. chain: of the records
    there are already, to go on with a transcript that was cut off."""

    def __init__(self, chain: Chain | None = None) -> None:
        self._chain = chain or Chain()

    @staticmethod
    def begin() -> bytes:
        """What a transcript begins with."""
        return MAGIC

    def record(self, kind: Kind, body: bytes) -> bytes:
        """Any record but a payload or the seal."""
        if kind in (Kind.PAYLOAD, Kind.SEAL) or len(body) > _LIMITS[kind]:
            raise LocalProtocolError(f"no record {kind.name} of {len(body)} bytes can be written")
        self._chain.add(kind, body)
        return _prefix(kind, len(body)) + body

    def struct(self, kind: Kind, value: About | Note | Ending) -> bytes:
        """A record of fields."""
        return self.record(kind, wire.body_of(value))

    def payload(self, index: int, size: int, digest: bytes) -> bytes:
        """The beginning of a payload's record; `size` bytes whose SHA-256 is `digest` must follow."""
        self._chain.add_payload(index, digest)
        return _prefix(Kind.PAYLOAD, 1 + size) + bytes((index,))

    def seal(self, key: keys.SigningKey) -> bytes:
        """The last record."""
        return _prefix(Kind.SEAL, keys.SIGNATURE_BYTES) + key.sign(LABEL, self._chain.digest())


def _prefix(kind: Kind, size: int) -> bytes:
    return bytes((kind,)) + size.to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class Record:
    """One record that is no payload."""

    kind: Kind
    body: bytes


@dataclass(frozen=True, slots=True)
class Payload:
    """A payload that is about to be read. chunks: of at most CHUNK_BYTES, to be taken before the next
    record is; `size` bytes in all."""

    index: int
    size: int
    chunks: Iterator[bytes]


class Reader:
    """Records of a transcript, in order. Raises MalformedError for anything else.

    chain: of the records that were read. offset: where the last whole record ends. Nothing may follow
    the seal.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self.chain = Chain()
        self.offset = 0
        self.sealed = b""
        if self._exactly(len(MAGIC), "its first line") != MAGIC:
            raise MalformedError("this is not a transcript, or one of another version of covey")
        self.offset = len(MAGIC)

    def __iter__(self) -> Iterator[Record | Payload]:
        while prefix := self._read(_PREFIX_BYTES):
            if self.sealed:
                raise MalformedError("something follows the transcript's seal")
            if len(prefix) < _PREFIX_BYTES:
                raise self._torn("a record")
            try:
                kind = Kind(prefix[0])
            except ValueError:
                raise MalformedError(f"a record of unknown kind {prefix[0]}") from None
            size = int.from_bytes(prefix[1:], "big")
            if kind is Kind.PAYLOAD:
                yield from self._payload(size)
                continue
            if size > _LIMITS[kind] or (kind is Kind.THINNED and size != _LIMITS[kind]):
                raise MalformedError(f"a record {kind.name} of {size} bytes")
            body = self._exactly(size, f"a record {kind.name}")
            self.offset += _PREFIX_BYTES + size
            if kind is Kind.SEAL:
                self.sealed = body
            else:
                self.chain.add(kind, body)
            yield Record(kind, body)

    def _payload(self, size: int) -> Iterator[Payload]:
        if size < 2:
            raise MalformedError("a record PAYLOAD without a payload")
        index = self._exactly(1, "a payload")[0]
        state = hashlib.sha256()

        def chunks() -> Iterator[bytes]:
            left = size - 1
            while left:
                chunk = self._exactly(min(left, CHUNK_BYTES), "a payload")
                left -= len(chunk)
                state.update(chunk)
                yield chunk

        rest = chunks()
        yield Payload(index, size - 1, rest)
        for _ in rest:  # what the reader of this record did not want
            pass
        self.chain.add_payload(index, state.digest())
        self.offset += _PREFIX_BYTES + size

    def _exactly(self, size: int, what: str) -> bytes:
        data = self._read(size)
        if len(data) != size:
            raise self._torn(what)
        return data

    def _torn(self, what: str) -> MalformedError:
        return MalformedError(f"the transcript ends within {what}: it is cut off")


def thinned(read: Read, write: Callable[[bytes], None]) -> None:
    """Copy a transcript without its payloads; their hashes remain, and the seal stands.

    Raises MalformedError.
    """
    reader = Reader(read)
    write(MAGIC)
    for record in reader:
        if isinstance(record, Record):
            write(_prefix(record.kind, len(record.body)) + record.body)
            continue
        state = hashlib.sha256()
        for chunk in record.chunks:
            state.update(chunk)
        body = bytes((record.index,)) + state.digest()
        write(_prefix(Kind.THINNED, len(body)) + body)


def check_seal(reader: Reader, coordinator: bytes) -> None:
    """Of a transcript that was read to its end. Raises MalformedError, SignatureError."""
    if not reader.sealed:
        raise MalformedError("the transcript has no seal: it was cut off, or its round still runs")
    keys.verify(coordinator, LABEL, reader.chain.digest(), reader.sealed, signer="the coordinator")
