"""The broker and whoever else is on the network: garbage, eavesdropping, forged presence."""

import random
import struct
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from covey_coordinator.round import Phase
from covey_shared import keys, messages, wire
from covey_shared.errors import MalformedError, RemoteProtocolError, SignatureError
from covey_shared.messages import CheckIn, Decline, Shares
from lab import NOW_UNIX, RUN, Lab, Mail
from mallory import Mallory

N_GARBAGE = 2000

# -- garbage --------------------------------------------------------------------------------------


def mutated(chance, data):
    """A message with something wrong: bits flipped, cut, grown, or two of them spliced."""
    changed = bytearray(data)
    match chance.randrange(5):
        case 0:
            for _ in range(chance.randint(1, 8)):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        case 1:
            del changed[chance.randrange(len(changed)) :]
        case 2:
            changed += chance.randbytes(chance.randint(1, 40))
        case 3:
            at = chance.randrange(len(changed))
            changed[at : at + chance.randint(1, 60)] = chance.randbytes(chance.randint(0, 60))
        case 4:
            changed[1] ^= chance.randint(1, 31)
    return bytes(changed) if changed != data else b""


@pytest.mark.parametrize("seed", [1, 2])
def test_garbage_at_any_moment(seed):
    """Random and mutated bytes into both machines in all phases: refused, and without a trace."""
    lab = Lab(4, seed=seed)
    play = lab.round()
    chance = random.Random(seed)
    thrown = {"coordinator": 0, "device": 0}
    phases, dropped = set(), []

    def garbage():
        if not play.seen or chance.random() < 0.1:
            return chance.randbytes(chance.randint(0, 400))
        return mutated(chance, chance.choice(play.seen).envelope)

    def throw():
        name = chance.choice(lab.names)
        data = garbage()
        phases.add(play.machine.phase)
        if chance.random() < 0.5:
            thrown["coordinator"] += 1
            try:  # what comes too late is not even looked at
                assert play.machine.receive(data, name, play.now, NOW_UNIX) == []
                dropped.append(data)
            except RemoteProtocolError:
                pass
        else:
            thrown["device"] += 1
            with pytest.raises(RemoteProtocolError):
                lab.sessions[name].receive(data)

    def on_mail(mail: Mail):
        for _ in range(40):
            throw()
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert sum(thrown.values()) >= N_GARBAGE / 2
    assert min(thrown.values()) > N_GARBAGE / 8
    assert len(phases) >= 6
    assert len(dropped) < thrown["coordinator"] / 4
    assert play.completed.survivors == tuple(lab.names)
    assert play.mismatches() == 0
    assert play.faults == []


def values_for(chance, value):
    """Something else of the same type, often out of place."""
    if isinstance(value, bool | float):
        return chance.choice([0.0, 1e300, -1.0, float("nan")])
    if isinstance(value, int):
        return chance.choice([0, 1, value + 1, 2**32, 2**53])
    if isinstance(value, bytes):
        return chance.choice([b"", bytes(len(value)), value[:-1], value + b"\0", value[::-1]])
    if isinstance(value, str):
        return chance.choice(["", "pi-000", "pi-003", "pi-900", "x" * 40])
    if isinstance(value, tuple):
        return chance.choice([(), value[:1], value[::-1], value + value[:1]])
    return value


def twisted(chance, message, key):
    """The message with one field changed, signed by the right key: what a liar could send."""
    if isinstance(message, messages.Manifest) and chance.random() < 0.7:
        field = chance.choice(message.head.__struct_fields__)
        head = msgspec.structs.replace(
            message.head, **{field: values_for(chance, getattr(message.head, field))}
        )
        changed = messages.Manifest(head, message.check_ins)
    else:
        field = chance.choice(message.__struct_fields__)
        changed = msgspec.structs.replace(
            message, **{field: values_for(chance, getattr(message, field))}
        )
    body = wire.body_of(changed)
    return bytes((wire.VERSION, changed.CODE)) + key.sign(changed.LABEL, body) + body


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_twisted_messages_of_the_coordinator(seed):
    """Whatever the coordinator signs, a device answers with a decline or a remote error."""
    chance = random.Random(seed)
    seen = [mail for mail in Lab(3).round().run().seen if mail.sender is None]
    reference = Lab(3)
    steps = ("gather", "share", "deliver", "collect", "propose", "reveal")
    for _ in range(25):
        lab = Lab(3)
        mallory = Mallory(lab)
        for step in steps[: chance.randrange(6)]:
            getattr(mallory, step)()
        for _ in range(12):
            mail = chance.choice(seen)
            name = mail.to or chance.choice(lab.names)
            twist = twisted(chance, mail.message, reference.coordinator_key)
            try:
                mallory.give(name, twist)
            except RemoteProtocolError:
                continue


@pytest.mark.parametrize("seed", [1, 2])
def test_twisted_messages_of_a_device(seed):
    """Whatever a device signs, the coordinator refuses or takes, and its sum is exact or abandoned."""
    chance = random.Random(seed)
    for attempt in range(10):
        lab = Lab(4, seed=(seed, attempt))
        play = lab.round()
        liar = lab.names[1]

        def on_mail(mail: Mail, lab=lab, liar=liar):
            if mail.sender != liar:
                return (mail,)
            lies = [twisted(chance, mail.message, lab.identities[liar]) for _ in range(6)]
            return (*(replace(mail, envelope=lie) for lie in lies), mail)

        play.intercept = on_mail
        play.run()
        assert {fault.device for fault in play.faults} <= {liar}
        if play.completed is not None and liar not in play.completed.survivors:
            assert play.mismatches() == 0
        if play.abandoned is not None:
            assert set(play.abandoned.blamed) <= {liar}


# -- forged presence and declines -----------------------------------------------------------------


def test_forged_absence_cannot_end_a_round_below_its_threshold():
    # The broker says that everyone has gone. That saves waiting, but lowers no bound.
    lab = Lab(4)
    play = lab.round()

    def on_mail(mail: Mail):
        if mail.sender is None and mail.kind == "Manifest":
            for name in lab.names:
                play.coordinator_did(play.machine.presence(name, False, play.now, NOW_UNIX))
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert play.completed.survivors == tuple(lab.names)
    assert play.mismatches() == 0


def test_forged_decline_for_a_device_that_has_checked_in():
    lab = Lab(4)
    play = lab.round()
    victim = lab.names[0]
    forged = wire.sign(Decline("lab", RUN, 1, victim, "bye"), lab.identities[lab.names[1]]).envelope

    def on_mail(mail: Mail):
        if mail.kind == "Shares" and mail.sender == victim:
            return (Mail(forged, victim, None), mail)
        return (mail,)

    play.intercept = on_mail
    play.run()
    assert isinstance(play.refused[0][1], SignatureError)
    assert play.completed.survivors == tuple(lab.names)


def test_check_ins_cannot_be_relabelled():
    """A type byte changed on the way: the label is under the signature."""
    lab = Lab(3)
    mallory = Mallory(lab).gather()
    envelope = mallory.check_ins[lab.names[0]]
    for kind in messages.ALL:
        other = envelope[:1] + bytes((kind.CODE,)) + envelope[2:]
        if kind is not CheckIn:
            public = lab.identities[lab.names[0]].public
            with pytest.raises((MalformedError, SignatureError)):
                wire.opened(kind, other, public, signer="pi-000")


# -- eavesdropping --------------------------------------------------------------------------------

EXAMPLES = 123_457
LOSS = 2.718281828459045


def telling(lab):
    """Updates whose numbers would be recognised anywhere."""

    def update(name, round_id):
        at = lab.names.index(name)
        delta = np.linspace(0.1, 0.9, lab.n_params, dtype=np.float32) + np.float32(at)
        return delta, EXAMPLES + at, (LOSS + at,)

    lab.update = update
    return lab


def encodings(number):
    """A number as anything might write it."""
    found = {repr(number).encode(), str(number).encode()}
    found.add(msgspec.msgpack.encode(number))
    for kind in "<>":
        found.add(struct.pack(kind + "d", number))
        found.add(struct.pack(kind + "f", number))
        if isinstance(number, int):
            found |= {struct.pack(kind + "I", number), struct.pack(kind + "Q", number)}
    return found


def test_no_loss_count_or_metric_in_clear():
    lab = telling(Lab(4))
    play = lab.round(w_max=10**6, clip=10.0, metric_clips=(10.0,)).run()
    assert play.mismatches() == 0
    heard = [mail.envelope for mail in play.seen if mail.sender is not None]
    heard += [parcel.payload for parcel in play.parcels]
    assert len(heard) == 7 * 4  # six messages and an upload of each
    for name in lab.names:
        delta, examples, (loss,) = lab.update(name, 1)
        secrets = encodings(examples) | encodings(loss)
        secrets |= {delta.tobytes()[4 * i : 4 * i + 8] for i in range(lab.n_params - 1)}
        ring = lab.plain[name, 1]
        secrets |= {ring.tobytes()[i : i + 12] for i in range(0, ring.nbytes - 12, 4)}
        for secret in secrets:
            assert not any(secret in data for data in heard), (name, secret)
    # Such a search does find what is there.
    assert any(name.encode() in data for name in lab.names for data in heard)


def test_what_a_device_says_does_not_depend_on_its_data():
    """Two fleets with the same keys and different data: all but the masked update is the same.

    The boxes hold fresh randomness of the operating system's; their sizes are the same.
    """
    said = []
    for lab in (Lab(3), telling(Lab(3))):
        play = lab.round(w_max=10**6, clip=10.0, metric_clips=(10.0,)).run()
        said.append([mail for mail in play.seen if mail.sender is not None])
        sizes = {len(parcel.payload) for parcel in play.parcels}
        assert len(sizes) == 1
    for one, other in zip(*said, strict=True):
        assert (one.sender, one.kind, len(one.envelope)) == (
            other.sender,
            other.kind,
            len(other.envelope),
        )
        if one.kind in ("CheckIn", "RosterVote", "ViewVote"):
            assert one.envelope == other.envelope
        if one.kind == "MaskedUpdate":
            ours, theirs = one.message, other.message
            assert ours.payload != theirs.payload
            assert msgspec.structs.replace(ours, payload=theirs.payload) == theirs


FIELDS_OF_A_DEVICE = {
    "check-in": {"fleet", "run", "round", "device", "certificate", "pk_mask", "pk_seal",
                 "self_mask_commitment"},
    "shares": {"h", "device", "boxes"},
    "roster vote": {"h", "member", "u2", "readable"},
    "masked update": {"h", "device", "u2", "payload", "payload_bytes"},
    "view vote": {"h", "member", "u2", "u3"},
    "reveal": {"h", "member", "u3", "present", "box"},
    "decline": {"fleet", "run", "round", "device", "reason"},
    "want blob": {"fleet", "device", "blob", "ranges"},
    "certificate": {"fleet", "device", "identity", "issued_unix", "not_after_unix"},
}  # fmt: skip
OF_THE_COORDINATOR = {
    "round call", "manifest", "delivery", "roster", "view proposal", "view", "result",
    "round abandoned", "want upload", "plan signature",
}  # fmt: skip


def test_no_message_has_a_field_for_such_a_thing():
    # A new field, or a new message, has to be thought about here.
    for kind in messages.ALL:
        if kind.LABEL not in OF_THE_COORDINATOR:
            assert set(kind.__struct_fields__) == FIELDS_OF_A_DEVICE[kind.LABEL], kind


def test_an_observer_of_everything_but_the_private_keys():
    """All messages of a round, and all public keys: no box opens with any key made of those."""
    lab = Lab(3)
    play = lab.round().run()
    public = [
        getattr(play.machine.cohort.peers[0], field) for field in ("pk_mask", "pk_seal", "identity")
    ]
    public += [play.machine.cohort.h, play.machine.cohort.head.pk_reveal, lab.trust.coordinator]
    for box in play.sent(Shares)[0].message.boxes:
        for data in public:
            with pytest.raises(RemoteProtocolError):
                keys.AgreementKey(data).open(box, sender=public[1], info=b"")
    assert play.machine.phase is Phase.DONE
