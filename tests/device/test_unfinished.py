"""An upload that a device finishes after its process died: those bytes, in that round, and no more."""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from covey_device import session as device
from covey_device import unfinished as files
from covey_device.keystore import MemoryFile
from covey_device.phases import Phase
from covey_device.unfinished import Unfinished
from covey_shared import wire
from covey_shared.errors import RefusedError, SignatureError, StorageError
from covey_shared.keys import SEED_BYTES
from covey_shared.messages import (
    CheckIn,
    Decline,
    MaskedUpdate,
    Result,
    RoundAbandoned,
    WantUpload,
)
from lab import RUN, Lab
from mallory import Mallory, published


def uploaded(n: int = 4, **call: Any) -> tuple[Lab, Mallory, Any]:
    """A lab in a round in which all have uploaded, and a name."""
    lab = Lab(n)
    mallory = Mallory(lab, **call).gather().share().deliver().collect()
    return lab, mallory, lab.names[0]


def want(mallory: Mallory, name: Any, *ranges: tuple[int, int], **changes: Any) -> WantUpload:
    fields = {
        "h": mallory.cohort.h,
        "device": name,
        "payload": mallory.payload_digest(name),
        "ranges": ranges or ((0, 1),),
    }
    return WantUpload(**(fields | changes))


def result(mallory: Mallory, u3: set[int]) -> Result:
    u3_bitmap = mallory.cohort.bitmap(frozenset(u3))
    return Result(
        h=mallory.cohort.h, fleet="lab", run=RUN, round=1, u3=u3_bitmap, votes=(),
        ring_sum=bytes(32), next_model=bytes(32),
    )  # fmt: skip


# -- the session -----------------------------------------------------------------------------------


def test_a_restarted_device_sends_the_very_same_upload():
    lab, mallory, name = uploaded()
    before, payload = mallory.updates[name], mallory.payloads[name]
    session = lab.restart(name)
    assert (session.phase, session.round_id) == (Phase.FINISHING, 1)
    assert mallory.tell(name, mallory.call) == []  # no decline: it is not out of the round
    for _ in range(2):
        (said,) = mallory.tell(name, mallory.roster())
        assert said.message.envelope == before.envelope
        assert mallory.tell(name, want(mallory, name, (0, 1), (7, 2))) == [
            device.Upload(payload, ((0, 1), (7, 2)))
        ]
    assert session.phase is Phase.FINISHING


@pytest.mark.parametrize("chosen", [True, False])
def test_its_round_ends_with_the_result(chosen: bool):
    lab, mallory, name = uploaded()
    session = lab.restart(name)
    forget, ended = mallory.tell(name, result(mallory, {1, 2, 3} | ({0} if chosen else set())))
    assert forget == device.Forget()
    assert (ended.round_id, ended.outcome, ended.contributed) == (1, "completed", chosen)
    assert ended.call == mallory.call
    assert (session.phase, session.unfinished, lab.kept[name]) == (Phase.IDLE, None, None)
    assert mallory.tell(name, mallory.call) == []  # nor is it declined afterwards
    for message in (mallory.roster(), want(mallory, name)):
        with pytest.raises(RefusedError, match="not in"):
            mallory.tell(name, message)


def test_its_round_ends_when_it_is_abandoned():
    lab, mallory, name = uploaded()
    lab.restart(name)
    with pytest.raises(RefusedError):
        mallory.tell(name, RoundAbandoned("lab", bytes(16), 1, "another run's"))
    forget, ended = mallory.tell(name, RoundAbandoned("lab", RUN, 1, "too few"))
    assert forget == device.Forget()
    assert ended == device.Ended(1, "abandoned: too few", contributed=False)
    again = Mallory(lab, 2, revision=1)
    assert published(again.tell(name, again.call), CheckIn)


def test_another_call_ends_it_and_is_followed():
    lab, mallory, name = uploaded()
    lab.restart(name)
    later = Mallory(lab, 2, model=bytes(32))
    actions = later.tell(name, later.call)
    assert actions[:2] == [
        device.Forget(),
        device.Ended(1, "another round was called", contributed=False),
    ]
    assert published(actions, CheckIn)
    assert lab.kept[name] is None
    with pytest.raises(RefusedError):
        mallory.tell(name, mallory.roster())


def test_a_call_that_is_declined_ends_it_too():
    lab, _, name = uploaded()
    lab.restart(name)
    again = Mallory(lab, 2)  # the same model and revision
    actions = again.tell(name, again.call)
    assert "already contributed" in published(actions, Decline)[0].message.reason
    assert lab.kept[name] is None


def test_it_has_no_other_part_in_the_round():
    lab, mallory, name = uploaded()
    mallory.propose()
    lab.restart(name)
    kept = len(lab.saved[name])
    for message in (mallory.manifest(), mallory.delivery(name), mallory.proposal(), mallory.view()):
        with pytest.raises(RefusedError, match="only has an upload to finish"):
            mallory.tell(name, message)
    session = lab.sessions[name]
    assert session.trained(1, *lab.update(name, 1)) == []
    assert session.training_failed(1, "no") == []
    assert session.ready(1, device.Prepared(lab.n_params, 1, 1)) == []
    assert session.leave(1, "the disk is full") == []  # and may yet finish
    assert session.phase is Phase.FINISHING
    assert len(lab.saved[name]) == kept


def test_nothing_of_it_left_before_the_contribution_was_remembered():
    """The process died between the two: the upload does not stand, and the device drops out."""
    lab, mallory, name = uploaded()
    lab.saved[name].pop()
    assert not lab.saved[name][-1].contributed
    session = lab.restart(name)
    assert session.phase is Phase.IDLE
    (decline,) = published(mallory.tell(name, mallory.call), Decline)
    assert "restarted" in decline.message.reason
    with pytest.raises(RefusedError):
        mallory.tell(name, mallory.roster())
    later = Mallory(lab, 2)  # of this model and revision no update was given: it may be now
    actions = later.tell(name, later.call)
    assert actions[0] == device.Forget()
    assert published(actions, CheckIn)


def test_an_upload_of_an_earlier_round_does_not_stand():
    lab, _, name = uploaded()
    old = lab.kept[name]
    lab.model = bytes(32)
    Mallory(lab, 2).gather()
    assert lab.kept[name] is None
    lab.kept[name] = old  # as if it could not have been removed
    session = lab.restart(name)
    assert (session.phase, session.unfinished) == (Phase.IDLE, None)


def test_it_is_kept_before_it_is_remembered_and_remembered_before_it_is_sent():
    play = Lab(4).round().run()
    kinds = [type(action) for action in play.actions[play.lab.names[0]]]
    at = kinds.index(device.Keep)
    assert kinds[at : at + 4] == [device.Keep, device.Save, device.Publish, device.Upload]
    assert kinds[-2:] == [device.Forget, device.Ended]
    assert all(kept is None for kept in play.lab.kept.values())


def test_a_round_in_which_all_restart_in_mid_upload_has_an_exact_sum():
    """Chunks and digests are lost; new processes finish what the old ones began."""
    lab = Lab(5)
    play = lab.round()
    lost: set[str] = set()

    def lose(parcel: Any) -> Any:
        if parcel.sender in lost:
            return (parcel,)
        lost.add(parcel.sender)
        play.restart(parcel.sender)
        return ()

    play.intercept_parcel = lose
    play.run()
    # Nobody is left who could vote for a view: those who restarted hold no shares any more.
    assert lost == set(lab.names)
    assert play.abandoned is not None
    assert set(play.uploads) == set(lab.names)

    lab.model, lost = bytes(32), set(lab.names[1:])
    play = lab.round(lab.spec(2))
    play.intercept_parcel = lose
    play.run()
    assert lost == set(lab.names)
    assert play.mismatches() == 0
    assert play.completed.survivors == tuple(lab.names)


# -- what a hostile coordinator or broker gets out of it ------------------------------------------
# (the rows of docs/attacks.md are in tests/attacks/test_attack_restarts.py)


# -- the files -------------------------------------------------------------------------------------


@pytest.fixture
def kept() -> tuple[Lab, Unfinished, Any]:
    lab, _, name = uploaded()
    found = lab.kept[name]
    assert found is not None
    return lab, found, name


def load(directory: Path, lab: Lab, name: Any) -> Unfinished | None:
    return MemoryFile(directory).unfinished(lab.trust, lab.identities[name].public, name)


def test_what_is_kept_is_read_back(tmp_path: Path, kept: Any):
    lab, upload, name = kept
    memory = MemoryFile(tmp_path)
    assert load(tmp_path, lab, name) is None
    memory.keep(upload)
    found = load(tmp_path, lab, name)
    assert found == upload
    assert found.update.envelope == upload.update.envelope
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    memory.forget()
    memory.forget()
    assert load(tmp_path, lab, name) is None
    assert list(tmp_path.iterdir()) == []


def test_no_secret_of_the_round_is_in_it(tmp_path: Path):
    lab = Lab(4)
    name = lab.names[0]
    secrets: list[bytes] = []
    draw = lab.sessions[name]._rng

    def noted(n: int) -> bytes:
        drawn = draw(n)
        if n == SEED_BYTES:
            secrets.append(drawn)
        return drawn

    lab.sessions[name]._rng = noted
    mallory = Mallory(lab).gather()
    assert len(secrets) == 3  # b, s and c, whatever else is drawn later
    mallory.share().deliver().collect()
    MemoryFile(tmp_path).keep(lab.kept[name])
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for secret in secrets:
        assert secret not in everything
        assert secret.hex().encode() not in everything


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def about(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / files.ABOUT
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: damaged(d / files.PAYLOAD),
        lambda d: damaged(d / files.ABOUT),
        lambda d: (d / files.PAYLOAD).write_bytes(b""),
        lambda d: (d / files.PAYLOAD).write_bytes((d / files.PAYLOAD).read_bytes() + b"x"),
        lambda d: (d / files.PAYLOAD).unlink(),
        lambda d: (d / files.ABOUT).unlink(),
        lambda d: (d / files.ABOUT).write_bytes(b"\xff\xfe"),
        lambda d: (d / files.ABOUT).write_bytes(b"[" * 100_000),
        about(lambda fields: fields.update(index=-1)),
        about(lambda fields: fields.update(update=fields["call"])),
        about(lambda fields: fields.update(call=fields["update"])),
        about(lambda fields: fields.update(update=fields["update"][:-2] + "00")),
        about(lambda fields: fields.update(more=1)),
        about(lambda fields: fields.pop("n")),
    ],
)  # fmt: skip
def test_what_is_damaged_costs_that_upload_and_is_removed(
    tmp_path: Path, kept: Any, damage: Callable[[Path], Any]
):
    lab, upload, name = kept
    MemoryFile(tmp_path).keep(upload)
    damage(tmp_path)
    assert load(tmp_path, lab, name) is None
    assert list(tmp_path.iterdir()) == []


def test_anothers_upload_is_not_taken_for_ours(tmp_path: Path, kept: Any):
    lab, upload, name = kept
    other = lab.names[1]
    MemoryFile(tmp_path).keep(lab.kept[other])
    assert load(tmp_path, lab, name) is None
    # Signed by us, and naming another.
    message = replace_in(upload.update.message, device=other)
    forged = replace(upload, update=wire.sign(message, lab.identities[name]))
    MemoryFile(tmp_path).keep(forged)
    assert load(tmp_path, lab, name) is None
    # A call that our coordinator did not make.
    strange = wire.sign(upload.call.message, lab.identities[other])
    MemoryFile(tmp_path).keep(replace(upload, call=strange))
    assert load(tmp_path, lab, name) is None


def replace_in(message: MaskedUpdate, **changes: Any) -> MaskedUpdate:
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return MaskedUpdate(**(fields | changes))


class Died(BaseException):
    """No code of ours may catch this."""


class Countdown:
    """The process dies before the n-th of some calls."""

    def __init__(self, left: int) -> None:
        self.left = left

    def before(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **rest: Any) -> Any:
            if self.left <= 0:
                raise Died  # and nothing is done any more, whatever is tried on the way out
            self.left -= 1
            return real(*args, **rest)

        return call


def test_only_a_whole_pair_is_ever_read(tmp_path: Path, kept: Any, monkeypatch: pytest.MonkeyPatch):
    """The process dies before each step of writing it over an earlier one: either none or the new one."""
    lab, upload, name = kept
    older = replace(upload, payload=b"older", update=older_update(lab, upload, name))
    steps = ("open", "write", "fsync", "replace", "unlink")
    for at in range(100):
        directory = tmp_path / str(at)
        memory = MemoryFile(directory)
        memory.keep(older)
        with monkeypatch.context() as patch:
            countdown = Countdown(at)
            for step in steps:
                patch.setattr(os, step, countdown.before(getattr(os, step)))
            try:
                memory.keep(upload)
            except Died:
                pass
            else:
                break
        assert load(directory, lab, name) in (None, older, upload)
    assert at > 10
    assert load(directory, lab, name) == upload


def older_update(lab: Lab, upload: Unfinished, name: Any) -> Any:
    message = replace_in(
        upload.update.message, payload=hashlib.sha256(b"older").digest(), payload_bytes=5
    )
    return wire.sign(message, lab.identities[name])


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_full_disk_leaves_nothing_half_kept(
    tmp_path: Path, kept: Any, monkeypatch: pytest.MonkeyPatch, step: str, nth: int
):
    lab, upload, name = kept
    real, calls = getattr(os, step), []

    def full(*args: Any, **rest: Any) -> Any:
        calls.append(args)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        return real(*args, **rest)

    memory = MemoryFile(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(StorageError, match="free some space"):
            memory.keep(upload)
    assert list(tmp_path.iterdir()) == []
    memory.keep(upload)
    assert load(tmp_path, lab, name) == upload


def test_a_damaged_one_is_told_in_the_log(
    tmp_path: Path, kept: Any, caplog: pytest.LogCaptureFixture
):
    lab, upload, name = kept
    MemoryFile(tmp_path).keep(upload)
    damaged(tmp_path / files.PAYLOAD)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, lab, name) is None
    assert "its payload is damaged" in caplog.text


def test_signatures_are_checked_as_ever():
    lab, mallory, name = uploaded()
    lab.restart(name)
    envelope = wire.sign(mallory.roster(), lab.identities[lab.names[1]]).envelope
    with pytest.raises(SignatureError):
        mallory.give(name, envelope)
