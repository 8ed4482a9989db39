"""What the coordinator writes down of an open round, so that its next process can go on with it.

Entries, in order: each message that counts (accepted from a device, or said to all), each phase as it is
entered, each update as it is added to the sum, each fault. `round.Round` gives them; played back into a
new `Round`, with the uploads that lie in the spool and the round's reveal secret, they lead to the very
same place, and the coordinator says the very same bytes again: signatures are deterministic (RFC 8032),
and what was left to chance, the choice of the cohort, is in the manifest.

An entry is written before anything follows from it that others can see. So whatever was said is in the
journal, and a device's message that is not in it was never counted; devices answer again when asked again.
"""

from dataclasses import dataclass

from covey_coordinator.phases import Fault, Phase
from covey_shared import wire
from covey_shared.errors import CoveyError, RemoteProtocolError
from covey_shared.messages import DeviceId, Message
from covey_shared.wire import Signed


class JournalError(CoveyError):
    """The journal of an open round does not lead to where it says: the round cannot be resumed."""


@dataclass(frozen=True, slots=True)
class Entered:
    """The round entered a phase."""

    phase: Phase


@dataclass(frozen=True, slots=True)
class Added:
    """A device's whole update is in the spool, safe, and was added to the sum."""

    device: DeviceId


Entry = Signed[Message] | Entered | Added | Fault

_MESSAGE, _ENTERED, _ADDED, _FAULT = b"m", b"p", b"u", b"f"


def encode(entry: Entry) -> bytes:
    """Entry -> bytes."""
    match entry:
        case Entered(phase):
            return _ENTERED + phase.value.encode()
        case Added(device):
            return _ADDED + device.encode()
        case Fault(device, reason):
            return _FAULT + f"{device} {reason}".encode("utf-8", "replace")
        case Signed(_, envelope):
            return _MESSAGE + envelope


def decode(data: bytes) -> Entry:
    """Bytes -> entry. Raises JournalError."""
    kind, body = data[:1], data[1:]
    try:
        if kind == _MESSAGE:
            return wire.decode(body)
        text = body.decode()
        if kind == _ENTERED:
            return Entered(Phase(text))
        if kind == _ADDED:
            return Added(DeviceId(text))
        if kind == _FAULT:
            device, _, reason = text.partition(" ")
            return Fault(DeviceId(device), reason)
    except (RemoteProtocolError, ValueError) as error:
        raise JournalError(f"a damaged entry in the journal: {error}") from error
    raise JournalError(f"an entry of unknown kind {kind!r} in the journal: made by a newer covey?")
