"""A coordinator, or whoever can play its messages back, against a device that has an upload to finish.

A restarted device is new ground: it has forgotten the round, and yet speaks in it. All that can be had of
it are the bytes that it had begun to send; everything else is refused, and changes nothing.
"""

from collections.abc import Callable
from typing import Any

import pytest

from covey_device import session as device
from covey_device.phases import Phase
from covey_device.uploads import Uploads
from covey_shared import chunks, wire
from covey_shared.errors import RefusedError, RemoteProtocolError, SignatureError
from covey_shared.messages import (
    Result,
    Roster,
    RoundAbandoned,
    WantUpload,
)
from lab import RUN, Lab
from mallory import Mallory
from memory_fleet import go

OTHER = bytes(range(32))


def restarted(n: int = 4) -> tuple[Lab, Mallory, Any]:
    """A round in which all have uploaded and voted, and one has restarted since."""
    lab = Lab(n)
    mallory = Mallory(lab).gather().share().deliver().collect().propose()
    lab.restart(lab.names[0])
    return lab, mallory, lab.names[0]


def knows(session: device.Session) -> tuple[Any, ...]:
    return (session.phase, session.unfinished, session.round_id, session._memory, session._kept)


def asks(mallory: Mallory, name: Any, **changes: Any) -> WantUpload:
    fields: dict[str, Any] = {
        "h": mallory.cohort.h,
        "device": name,
        "payload": mallory.payload_digest(name),
        "ranges": ((0, 1),),
    }
    return WantUpload(**(fields | changes))


HOSTILE: dict[str, Callable[[Mallory, Any], Any]] = {
    "another payload": lambda m, name: asks(m, name, payload=OTHER),
    "another device's payload": lambda m, name: asks(
        m, name, payload=m.payload_digest(m.lab.names[1])
    ),
    "another round's": lambda m, name: asks(m, name, h=OTHER),
    "a roster of another round": lambda m, name: m.roster(h=OTHER),
    "a roster of others": lambda m, name: m.roster(u2=m.cohort.bitmap(frozenset({0, 1, 2}))),
    "a roster of none": lambda m, name: Roster(m.cohort.h, b"\x00", ()),
    "the manifest": lambda m, name: m.manifest(),
    "another manifest": lambda m, name: m.manifest(clip=2.0),
    "the boxes": lambda m, name: m.delivery(name),
    "other boxes": lambda m, name: m.delivery(name, m.u2 - {3}),
    "the proposal": lambda m, name: m.proposal(),
    "another proposal": lambda m, name: m.proposal(m.u3 - {0}),
    "a view": lambda m, name: m.view(),
    "another run's end": lambda m, name: RoundAbandoned("lab", bytes(16), 1, ""),
    "an earlier round's end": lambda m, name: RoundAbandoned("lab", RUN, 2, ""),
    "another manifest's result": lambda m, name: Result(
        OTHER, "lab", RUN, 1, b"\x0f", (), bytes(32), bytes(32)
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_but_the_upload_comes_of_it(what: str):
    lab, mallory, name = restarted()
    session, before = lab.sessions[name], knows(lab.sessions[name])
    for _ in range(2):
        with pytest.raises(RefusedError, match="only has an upload to finish"):
            mallory.tell(name, HOSTILE[what](mallory, name))
        assert knows(session) == before
    # The control: what it is asked for in order, it does.
    (said,) = mallory.tell(name, mallory.roster())
    assert said.message.envelope == mallory.updates[name].envelope


def test_calls_of_rounds_that_are_over_get_nothing():
    lab, mallory, name = restarted()
    before = knows(lab.sessions[name])
    for call in (
        mallory.call,
        lab.call(1, model=bytes(32)),
        lab.call(1, revision=1),
        lab.call(1, run=bytes(16)),
    ):
        assert mallory.tell(name, call) == []
    assert knows(lab.sessions[name]) == before


def test_messages_of_others_are_not_listened_to():
    lab, mallory, name = restarted()
    before = knows(lab.sessions[name])
    for message in (mallory.roster(), asks(mallory, name), RoundAbandoned("lab", RUN, 1, "")):
        for key in (lab.identities[name], lab.identities[lab.names[1]], lab.ca):
            with pytest.raises(SignatureError):
                mallory.give(name, wire.sign(message, key).envelope)
    for garbage in (b"", b"\x01\x08" + bytes(100), mallory.updates[name].envelope[:-1]):
        with pytest.raises(RemoteProtocolError):
            mallory.give(name, garbage)
    assert knows(lab.sessions[name]) == before


@pytest.mark.parametrize("end", ["result", "abandoned", "another call"])
def test_what_is_played_back_after_the_end_gets_nothing(end: str):
    lab, mallory, name = restarted()
    asked = [mallory.roster(), asks(mallory, name)]
    match end:
        case "result":
            result = Result(mallory.cohort.h, "lab", RUN, 1, b"\x0f", (), bytes(32), bytes(32))
            mallory.tell(name, result)
        case "abandoned":
            mallory.tell(name, RoundAbandoned("lab", RUN, 1, "too few"))
        case "another call":
            mallory.tell(name, lab.call(2, model=bytes(32)))
    assert mallory.tell(name, mallory.call) == []
    for _ in range(2):
        for message in asked:
            with pytest.raises(RefusedError):
                mallory.tell(name, message)
        lab.restart(name)  # nor from a later process: it is not on the disk any more
        assert lab.sessions[name].phase is Phase.IDLE


def test_a_model_is_not_contributed_to_again_through_a_restart():
    lab, mallory, name = restarted()
    for call in (lab.call(2), lab.call(3, run=bytes(16))):
        actions = mallory.tell(name, call)
        assert any(
            isinstance(a, device.Ended) and "already contributed" in a.outcome for a in actions
        )


# -- ranges: whatever is asked for ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "sent"),
    [
        (((0, 1),), [0]),
        (((2, 1), (0, 1)), [0, 2]),
        (((0, 3),) * 64, [0, 1, 2]),
        (((0, 2**32),), [0, 1, 2]),
        (((2, 2**32), (1, 1)), [1, 2]),
        (((3, 1),), []),
        (((2**32, 2**32),), []),
        ((), []),
        (None, [0, 1, 2]),
    ],
)
def test_ranges_beyond_the_update_are_nothing_and_none_is_sent_twice(ranges: Any, sent: list[int]):
    payload = bytes(range(256)) * (3 * chunks.CHUNK_BYTES // 256 - 10)
    frames = list(chunks.split(chunks.blob_of(payload)))
    assert len(frames) == 3
    out: list[bytes] = []

    async def publish(frame: bytes) -> None:
        out.append(frame)

    async def scenario() -> None:
        uploads = Uploads(publish)
        size = uploads.want(payload, ranges)
        await uploads.send()
        assert out == [frames[index] for index in sent]
        assert size == sum(map(len, out))

    go(scenario())
