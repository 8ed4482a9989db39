"""bytes <-> message: version, type, signature, length limits, no trailing bytes.

An envelope is::

    version  1 byte   1
    type     1 byte   Message.CODE
    sig      64 bytes Ed25519 over "covey/1 " || LABEL || 0x00 || body
    body     MessagePack array of the message's fields, in order

Accepted bytes re-encode to the same bytes: MessagePack allows several spellings of a value, so the
decoder encodes again what it read and refuses any difference. Field types and limits come from the
classes in `messages` and `enrolment`. Who must have signed depends on the message; `opened` checks it.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from covey_shared import enrolment, keys, messages
from covey_shared.errors import LocalProtocolError, MalformedError
from covey_shared.messages import Message

VERSION = 1
_PREFIX_BYTES = 2 + keys.SIGNATURE_BYTES
MAX_MESSAGE_BYTES = (
    119 * 1024
)  # one MQTT message of transport.MAX_PAYLOAD_BYTES, with room to spare

M = TypeVar("M", bound=Message)
M_co = TypeVar("M_co", bound=Message, covariant=True)

_ENCODER = msgspec.msgpack.Encoder(order="deterministic")
_KINDS = (*messages.ALL, *enrolment.ALL)
_BY_CODE = {kind.CODE: kind for kind in _KINDS}
_DECODERS = {kind.CODE: msgspec.msgpack.Decoder(kind) for kind in _KINDS}


@dataclass(frozen=True, slots=True)
class Signed(Generic[M_co]):
    """A message with the bytes that were signed. The signature may not have been checked yet."""

    message: M_co
    envelope: bytes

    @property
    def body(self) -> bytes:
        """The signed text without its label."""
        return self.envelope[_PREFIX_BYTES:]

    @property
    def signature(self) -> bytes:
        """64 bytes."""
        return self.envelope[2:_PREFIX_BYTES]

    def check(self, public: bytes, *, signer: str) -> None:
        """Raise SignatureError unless `public` signed this message."""
        keys.verify(public, self.message.LABEL, self.body, self.signature, signer=signer)


def body_of(message: msgspec.Struct) -> bytes:
    """The canonical bytes of a message (or of the head inside one)."""
    return _ENCODER.encode(message)


def sign(message: M, key: keys.SigningKey) -> Signed[M]:
    """Encode and sign. Raises LocalProtocolError for a message that a peer would refuse to decode."""
    body = body_of(message)
    prefix = bytes((VERSION, message.CODE))
    signed = Signed(message, prefix + key.sign(message.LABEL, body) + body)
    try:
        decode(signed.envelope)
    except MalformedError as error:
        raise LocalProtocolError(f"cannot send this {message.LABEL}: {error}") from error
    return signed


def decode(data: bytes) -> Signed[Message]:
    """Bytes -> message, its signature unchecked. Raises MalformedError, whatever the bytes."""
    if not _PREFIX_BYTES < len(data) <= MAX_MESSAGE_BYTES:
        raise MalformedError(
            f"a message has {_PREFIX_BYTES + 1} to {MAX_MESSAGE_BYTES} bytes, not {len(data)}"
        )
    if data[0] != VERSION:
        raise MalformedError(f"protocol version {data[0]}; this covey speaks {VERSION}")
    decoder = _DECODERS.get(data[1])
    if decoder is None:
        raise MalformedError(f"unknown message type {data[1]}")
    body = data[_PREFIX_BYTES:]
    label = _BY_CODE[data[1]].LABEL
    try:
        message = decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"{label}: {error}") from error
    if _ENCODER.encode(message) != body:
        raise MalformedError(f"{label} is not in canonical form")
    return Signed(message, bytes(data))


def decode_as(kind: type[M], data: bytes) -> Signed[M]:
    """`decode`, and raise MalformedError unless the message is a `kind`."""
    signed = decode(data)
    if not isinstance(signed.message, kind):
        raise MalformedError(f"expected a {kind.LABEL}, got a {signed.message.LABEL}")
    return Signed(signed.message, signed.envelope)


def opened(kind: type[M], data: bytes, public: bytes, *, signer: str) -> Signed[M]:
    """`decode_as`, and check the signature. The whole way in for a message from one known key."""
    signed = decode_as(kind, data)
    signed.check(public, signer=signer)
    return signed
