"""The upload that a device must be able to finish after its process died: the very bytes, and no more.

An update is masked once. Whoever could have it masked a second time could take one from the other, so a
device that lost its memory in the middle of an upload has two ways to go on: leave, or send again what it
had begun to send. For the second the signed message and the masked payload are on its disk before the
first of them leaves. Both are what the coordinator gets anyway; the seeds behind them are never written.

Two files in the state directory, readable by the device's user alone: ``unfinished.bin``, the payload, and
``unfinished.json``, written after it, which names it by its hash. Together they stand, or neither does.
They are of no use after the round, and at the latest the next round's call removes them.
"""

import contextlib
import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from covey_device.files import write_durably
from covey_device.memory import Memory
from covey_shared import wire
from covey_shared.errors import RefusedError, RemoteProtocolError
from covey_shared.messages import MAX_COHORT, DeviceId, MaskedUpdate, RoundCall
from covey_shared.secagg.cohort import Trust
from covey_shared.wire import Signed

log = logging.getLogger("covey.device")

PAYLOAD, ABOUT = "unfinished.bin", "unfinished.json"

_Hex = Annotated[str, Meta(pattern=r"^([0-9a-f]{2})*\Z")]
_Count = Annotated[int, Meta(ge=0, le=MAX_COHORT)]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An update that was masked for a round, which may not have arrived whole.

    call: what this device was called to. index: its place in the manifest of n devices, of which at
    least n_min are summed.
    """

    call: Signed[RoundCall]
    update: Signed[MaskedUpdate]
    payload: bytes = field(repr=False)
    index: int
    n: int
    n_min: int

    def stands(self, memory: Memory) -> bool:
        """Whether it belongs to the last round that is remembered, and counts as contributed.

        If not, nothing of it ever left: what is remembered is written after it, and before it is sent.
        Or a later round was joined since, and it is of no use.
        """
        call = self.call.message
        sent = memory.contributed.get(call.model.hex())
        return memory.last_round == call.round and sent == call.revision


class _About(msgspec.Struct, forbid_unknown_fields=True):
    call: _Hex
    update: _Hex
    index: _Count
    n: _Count
    n_min: _Count


def keep(directory: Path, unfinished: Unfinished) -> None:
    """On the disk when this returns. Raises StorageError, and then there is nothing."""
    forget(directory)
    about = _About(
        unfinished.call.envelope.hex(),
        unfinished.update.envelope.hex(),
        unfinished.index,
        unfinished.n,
        unfinished.n_min,
    )
    try:
        write_durably(directory / PAYLOAD, unfinished.payload)
        write_durably(directory / ABOUT, msgspec.json.encode(about))
    except BaseException:
        forget(directory)
        raise


def forget(directory: Path) -> None:
    """Remove it. What cannot be removed is of no round that comes, and harmless."""
    # First what the other means nothing without.
    for name in (ABOUT, PAYLOAD, "unfinished.new"):
        with contextlib.suppress(OSError):
            (directory / name).unlink(missing_ok=True)


def load(directory: Path, trust: Trust, identity: bytes, device: DeviceId) -> Unfinished | None:
    """What an earlier process kept, if it is all there and this device's own; else nothing is there.

    identity: this device's public key. What is damaged is removed: it costs that one upload.
    """
    try:
        about = msgspec.json.decode((directory / ABOUT).read_bytes(), type=_About)
        call = wire.opened(
            RoundCall, bytes.fromhex(about.call), trust.coordinator, signer="the coordinator"
        )
        update = wire.opened(
            MaskedUpdate, bytes.fromhex(about.update), identity, signer="this device"
        )
        if (call.message.fleet, update.message.device) != (trust.fleet, device):
            raise RefusedError("it is another device's")
        if (directory / PAYLOAD).stat().st_size != update.message.payload_bytes:
            raise RefusedError("its payload has another size")
        payload = (directory / PAYLOAD).read_bytes()
        if hashlib.sha256(payload).digest() != update.message.payload:
            raise RefusedError("its payload is damaged")
    except FileNotFoundError:
        forget(directory)
    except (OSError, ValueError, RecursionError, RemoteProtocolError) as error:
        # msgspec's errors and those of Unicode are ValueErrors.
        log.warning("an upload that was not finished cannot be: %s: %s", directory / ABOUT, error)
        forget(directory)
    else:
        return Unfinished(call, update, payload, about.index, about.n, about.n_min)
    return None
