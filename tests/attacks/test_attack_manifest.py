"""A coordinator that lies about the round: its model, its rules, its cohort.

Every field of the head is changed in turn and signed again with the coordinator's real key. What a
device can know to be wrong, it refuses before it has shared anything. What it cannot know (a clip, a
deadline, another key to reveal to) changes the manifest's digest h, and with it every mask and box:
devices that were shown different heads never reach a quorum together, and their masks cancel with
nobody's.
"""

import struct

import msgspec
import numpy as np
import pytest

from covey_device.session import Prepared
from covey_shared import keys, wire
from covey_shared.errors import MalformedError, RefusedError, SignatureError
from covey_shared.fixedpoint import to_signed, unpack
from covey_shared.masking import add_masks, self_mask_key
from covey_shared.messages import CheckIn, Decline, Head, Manifest, MaskedUpdate, RosterVote, Shares
from covey_shared.secagg import rules
from covey_shared.secagg.cohort import manifest_digest
from lab import NOW_UNIX, Lab
from mallory import Mallory, declined, published

FIELDS = Head.__struct_fields__

# A device cannot know better; that these differ is noticed by the others' votes, or spoils the sum.
TAKEN_ON_TRUST = {
    "clip",
    "w_max",
    "n_min",
    "metric_clips",
    "work",
    "pk_reveal",
    "issued_unix",
    "share_s",
    "collect_s",
    "unmask_s",
}


def flipped(head, field):
    """The field with its lowest bit flipped (for text and numbers: the next one), still decodable."""
    value = getattr(head, field)
    if field == "pk_reveal":  # another key, or else it would be refused as a bad one
        return keys.AgreementKey(bytes(31) + b"\x01").public
    if isinstance(value, bytes):
        return bytes((value[0] ^ 1,)) + value[1:]
    if isinstance(value, str):
        return value[:-1] + chr(ord(value[-1]) ^ 1)
    if isinstance(value, float):
        return next_float(value)
    if isinstance(value, tuple):
        return (next_float(value[0]), *value[1:])
    if isinstance(value, int):
        # Where the flipped number would not even be of the field's type, the next one.
        return {"n_min": 4, "round": 3, "lane_bits": 31}.get(field, value ^ 1)
    return msgspec.structs.replace(value, batches=value.batches ^ 2)


def next_float(value):
    """The same number with its last bit flipped."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", value))
    return struct.unpack("<d", struct.pack("<Q", bits ^ 1))[0]


@pytest.fixture
def lab():
    return Lab(4)


@pytest.fixture
def mallory(lab):
    return Mallory(lab).gather()


def refuses(mallory, manifest, because, name=None):
    """Every device (or one) leaves the round over this manifest and shares nothing."""
    for each in mallory.lab.names if name is None else [name]:
        actions = mallory.tell(each, manifest)
        assert because in (declined(actions) or ""), actions
        assert published(actions, Shares) == []


# -- every field of the head ----------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_bit_flip_in_a_head_field(field, lab, mallory):
    victim, others = lab.names[0], lab.names[1:]
    head = mallory.head()
    changed = msgspec.structs.replace(head, **{field: flipped(head, field)})
    assert manifest_digest(changed) != manifest_digest(head)
    envelopes = tuple(mallory.check_ins.values())
    if field in ("run", "round"):  # not even ours to decline
        with pytest.raises(RefusedError, match="of a round this device is not in"):
            mallory.tell(victim, Manifest(changed, envelopes))
        assert lab.sessions[victim].round_id == 1
        return
    actions = mallory.tell(victim, Manifest(changed, envelopes))
    if field not in TAKEN_ON_TRUST:
        assert declined(actions)
        assert published(actions, Shares) == []
        return
    # The victim shares, under an h of its own. The others have the honest manifest.
    (shares,) = published(actions, Shares)
    assert shares.message.h == manifest_digest(changed)
    for name in others:
        published(mallory.tell(name, mallory.manifest()), Shares)
    # Votes of the one side are worth nothing on the other, so no roster ever stands: with one
    # device on its side the victim's can have one vote of three.
    twin = Mallory(Lab(4)).gather().share().deliver()
    votes = tuple(twin.roster_votes.values())[1:]
    roster = twin.roster(h=shares.message.h, votes=votes)
    assert "of another round or manifest" in declined(mallory.tell(victim, roster))
    assert mallory.payloads == {}


@pytest.mark.parametrize("field", sorted(TAKEN_ON_TRUST))
def test_masks_under_another_head_cancel_with_nobodys(field):
    """Suppose the votes could be had all the same: what would the coordinator see?

    Three devices mask under one head and one under another, all believe the same roster. The four
    updates, with all four self masks taken off, are still uniformly random noise.
    """
    lab = Lab(4, n_params=400)
    mallory = Mallory(lab).gather()
    head = mallory.head()
    changed = msgspec.structs.replace(head, **{field: flipped(head, field)})
    heads = dict.fromkeys(lab.names[1:], head) | {lab.names[0]: changed}
    envelopes = tuple(mallory.check_ins.values())
    total, plain, secrets = 0, 0, {}
    for name, its_head in heads.items():
        mallory.tell(name, Manifest(its_head, envelopes))
        inner = lab.sessions[name]._round
        inner.participant.roster = frozenset(range(4))  # as if a quorum had said so
        ring = inner.ring.copy()
        plain = plain + to_signed(ring, head.bits)
        secrets[name] = inner.participant._b
        _, payload = inner.participant.mask(ring)
        total = total + unpack(payload, ring.size, head.bits, np.dtype("<u4")).astype(np.int64)
    bare = (total % 2**32).astype("<u4")
    minus = [
        self_mask_key(keys.Seed(secrets[name]), manifest_digest(its_head), name)
        for name, its_head in heads.items()
    ]
    add_masks(bare, [], minus)
    garbage = to_signed(bare, head.bits)
    assert (garbage == plain).mean() < 0.01
    assert abs(garbage).mean() > 2 ** (head.bits - 1) / 3  # spread over the whole ring
    # The same with one head for all is the sum: the test would notice.
    honest = Mallory(Lab(4, n_params=400)).gather().share().deliver().collect().propose().reveal()
    assert np.array_equal(honest.aggregate(), honest.plain(honest.lab.names))


# -- what a device knows to be wrong --------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"plan": bytes(32)}, "plan is not the one that was called"),
        ({"model": bytes(32)}, "model is not the one that was called"),
        ({"revision": 1}, "revision is not the one that was called"),
        ({"fleet": "barn"}, "for fleet 'barn'"),
        ({"n_params": 41}, "41 parameters, the plan has 40"),
        ({"metric_clips": ()}, "asks for 0 metrics"),
        ({"metric_clips": (10.0, 10.0)}, "asks for 2 metrics"),
        ({"prg": "aes128ctr"}, "keystream 'aes128ctr'"),
        ({"check_ins": bytes(32)}, "not those its head names"),
        ({"w_max": 1_000_001}, "this device allows 1000000"),
    ],
)
def test_other_model_plan_or_sizes(mallory, changes, because):
    refuses(mallory, mallory.manifest(**changes), because)


@pytest.mark.parametrize("hyper", [(), (0.1, 0.1), (float("nan"),), (float("inf"),)])
def test_other_hyper_parameters(mallory, hyper):
    work = msgspec.structs.replace(mallory.head().work, hyper=hyper)
    refuses(mallory, mallory.manifest(work=work), "hyper-parameters")


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 2},
        {"threshold": 1},
        {"threshold": 4},
        {"degree": 2},
        {"degree": 1},
        {"committee": 3},
        {"min_side": 1},
        {"threshold": 2, "committee": 2},
    ],
)
def test_low_threshold_degree_or_committee(mallory, changes):
    refuses(mallory, mallory.manifest(**changes), "a cohort of 4 takes 3, 0, 4, 3")


def test_low_minimum_below_the_call(lab):
    mallory = Mallory(lab, n_min=4).gather()
    refuses(mallory, mallory.manifest(n_min=3), "takes part among at least 4")


def test_low_minimum_below_the_owners(lab):
    # Already in the call: then the device does not even check in.
    mallory = Mallory(lab, n_min=2)
    for name in lab.names:
        actions = mallory.tell(name, mallory.call)
        assert "takes part among at least 3" in declined(actions)
        assert [type(action.message.message) for action in actions[:-1]] == [Decline]
    # Or only in the manifest, after a call that was as it should be.
    mallory = Mallory(lab, 2).gather()
    refuses(mallory, mallory.manifest(n_min=2), "takes part among at least 3")


def test_minimum_above_the_cohort(lab, mallory):
    refuses(mallory, mallory.manifest(n_min=5), "has 4 devices and wants at least 5")


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 17},  # one too few for four devices: a sum could wrap, and what wraps can leak
        {"bits": 19},
        {"bits": 16, "lane_bits": 16},
        {"lane_bits": 16},
        {"value_bits": 17},
        {"value_bits": 2, "bits": 4, "lane_bits": 16},
        {"value_bits": 25, "bits": 27},
        {"value_bits": 32, "bits": 32},
        {"clip": 0.0},
        {"clip": -1.0},
        {"clip": float("nan")},
        {"clip": float("inf")},
        {"metric_clips": (float("nan"),)},
        {"metric_clips": (0.0,)},
    ],
)
def test_wrapping_width_or_useless_clip(mallory, changes):
    manifest = mallory.manifest(**changes)
    for name in mallory.lab.names:
        actions = mallory.tell(name, manifest)
        assert declined(actions)
        assert published(actions, Shares) == []


@pytest.mark.parametrize("bad", [bytes(32), b"\x01" + bytes(31), b"\xff" * 32])
def test_a_reveal_key_that_everybody_could_open(mallory, bad):
    refuses(mallory, mallory.manifest(pk_reveal=bad), "the coordinator: ")


# -- replays --------------------------------------------------------------------------------------


def test_replayed_manifest_of_an_earlier_round(lab, mallory):
    old = mallory.manifest()
    Mallory(lab, 2, model=bytes(32)).gather()
    for name in lab.names:
        with pytest.raises(RefusedError, match="of a round this device is not in"):
            mallory.tell(name, old)
        assert lab.sessions[name].round_id == 2


def test_replayed_call_of_an_earlier_round(lab, mallory):
    later = Mallory(lab, 2, model=bytes(32)).gather()
    for name in lab.names:
        assert mallory.tell(name, mallory.call) == []
    later.share()
    assert len(later.shares) == 4


def test_replayed_round_with_old_check_ins(lab, mallory):
    # Round 2's manifest with round 1's check-ins, of which she knows more: refused by everyone.
    later = Mallory(lab, 2, model=bytes(32)).gather()
    old_ones = tuple(mallory.check_ins.values())
    refuses(later, later.manifest(old_ones), "is of another round", lab.names[0])
    mixed = (*old_ones[:1], *tuple(later.check_ins.values())[1:])
    refuses(later, later.manifest(mixed), "is of another round", lab.names[1])


def test_replayed_check_in_of_another_run(lab, mallory):
    other = Mallory(lab, 2, run=bytes(16), model=bytes(32)).gather()
    again = Mallory(lab, 3, model=bytes(31) + b"\x01")
    again.check_ins = other.check_ins
    envelopes = tuple(again.check_ins.values())
    signed = wire.sign(again.manifest(envelopes), lab.coordinator_key)
    with pytest.raises(RefusedError, match="is of another round"):
        rules.verified_cohort(signed, lab.trust)


def test_second_manifest(lab, mallory):
    mallory.share()
    for name in lab.names:
        # To other devices, with another clip, without one of them: the first one stands.
        for second in (
            mallory.manifest(clip=2.0),
            mallory.manifest(tuple(mallory.check_ins.values())[:3]),
        ):
            with pytest.raises(RefusedError):
                mallory.tell(name, second)
    mallory.deliver().collect().propose().reveal()
    assert np.array_equal(mallory.aggregate(), mallory.plain(lab.names))


# -- the cohort -----------------------------------------------------------------------------------


def other_device(lab, mallory, name, *, ca=None, fleet="lab", key=None, not_after=2**31, **changes):
    """A check-in of a device that Mallory made up; certified by `ca`, by default the fleet's."""
    key = key or keys.SigningKey(lab.rng(32))
    certificate = lab.certify(
        changes.pop("certified", name), key, ca=ca, fleet=fleet, not_after=not_after
    )
    fields = {
        "fleet": fleet,
        "run": mallory.call.run,
        "round": mallory.call.round,
        "device": name,
        "certificate": certificate,
        "pk_mask": keys.mask_key(lab.rng(16)).public,
        "pk_seal": keys.seal_key(lab.rng(16)).public,
        "self_mask_commitment": keys.self_mask_commitment(lab.rng(16)),
    }
    return wire.sign(CheckIn(**(fields | changes)), key).envelope


def with_stranger(mallory, envelope, name="pi-900"):
    """The cohort's check-ins with one more, in the order of the names."""
    return tuple(e for _, e in sorted([*mallory.check_ins.items(), (name, envelope)]))


def test_a_certified_device_is_welcome(lab, mallory):
    # So that the refusals below are for what they say.
    envelopes = with_stranger(mallory, other_device(lab, mallory, "pi-900"))
    assert published(mallory.tell(lab.names[0], mallory.manifest(envelopes)), Shares)


def test_invented_device(lab, mallory):
    # She cannot fill a cohort with devices of her own around one victim: she is not the CA.
    for ca in (keys.SigningKey(bytes(32)), lab.coordinator_key, lab.identities[lab.names[1]]):
        envelopes = with_stranger(mallory, other_device(lab, mallory, "pi-900", ca=ca))
        signed = wire.sign(mallory.manifest(envelopes), lab.coordinator_key)
        with pytest.raises(SignatureError, match="not signed by the fleet CA"):
            rules.verified_cohort(signed, lab.trust)
    refuses(mallory, mallory.manifest(envelopes), "not signed by the fleet CA")


def test_a_device_under_anothers_certificate(lab, mallory):
    envelopes = with_stranger(mallory, other_device(lab, mallory, "pi-900", certified="pi-901"))
    refuses(mallory, mallory.manifest(envelopes), "carries the certificate of pi-901")


def test_a_check_in_that_its_device_did_not_sign(lab, mallory):
    # The certificate is a real one, copied from an earlier check-in; the keys are hers.
    victim = lab.names[1]
    forged = other_device(lab, mallory, victim, key=keys.SigningKey(bytes(32)))
    message = msgspec.structs.replace(
        wire.decode_as(CheckIn, forged).message, certificate=lab.certificates[victim]
    )
    forged = wire.sign(message, keys.SigningKey(bytes(32))).envelope
    envelopes = tuple((mallory.check_ins | {victim: forged}).values())
    refuses(mallory, mallory.manifest(envelopes), "check-in is not signed by pi-001", lab.names[0])


def test_certificate_of_another_fleet(lab, mallory):
    envelopes = with_stranger(mallory, other_device(lab, mallory, "pi-900", fleet="barn"))
    refuses(mallory, mallory.manifest(envelopes), "is for fleet 'barn'", lab.names[0])
    key = keys.SigningKey(lab.rng(32))
    foreign = lab.certify("pi-900", key, fleet="barn")
    envelope = other_device(lab, mallory, "pi-900", key=key, certificate=foreign)
    refuses(
        mallory, mallory.manifest(with_stranger(mallory, envelope)), "is for fleet", lab.names[1]
    )


def test_expired_certificate(lab, mallory):
    ended = other_device(lab, mallory, "pi-900", not_after=NOW_UNIX - 1)
    refuses(mallory, mallory.manifest(with_stranger(mallory, ended)), "pi-900 has ended")


def test_a_certificate_is_good_to_its_last_second(lab, mallory):
    last = other_device(lab, mallory, "pi-900", not_after=NOW_UNIX)
    envelopes = with_stranger(mallory, last)
    assert published(mallory.tell(lab.names[0], mallory.manifest(envelopes)), Shares)


def test_expired_certificate_and_a_coordinator_that_turns_back_its_clock(lab, mallory):
    # Not resisted: a device has no clock that it could trust more. docs/attacks.md says so.
    ended = other_device(lab, mallory, "pi-900", not_after=NOW_UNIX - 1)
    manifest = mallory.manifest(with_stranger(mallory, ended), issued_unix=NOW_UNIX - 1)
    assert published(mallory.tell(lab.names[0], manifest), Shares)


def test_duplicate_device(lab, mallory):
    name = lab.names[1]
    envelopes = tuple(mallory.check_ins.values())
    twice = (*envelopes[:2], envelopes[1], *envelopes[2:])
    refuses(mallory, mallory.manifest(twice), "appears twice", lab.names[0])
    # The same name with another identity, which only the CA could have made.
    again = other_device(lab, mallory, name)
    twice = (*envelopes[:2], again, *envelopes[2:])
    refuses(mallory, mallory.manifest(twice), "not sorted, or name a device twice", lab.names[2])


@pytest.mark.parametrize("field", ["pk_mask", "pk_seal", "self_mask_commitment", "identity"])
def test_duplicate_key(lab, mallory, field):
    first = other_device(lab, mallory, "pi-900")
    stranger = wire.decode_as(CheckIn, first).message
    if field == "identity":
        key = keys.SigningKey(bytes(range(32)))
        copies = [other_device(lab, mallory, f"pi-90{i}", key=key) for i in (1, 2)]
        envelopes = with_stranger(mallory, copies[0], "pi-901")
        envelopes = (*envelopes, copies[1])
    else:
        copy = other_device(lab, mallory, "pi-902", **{field: getattr(stranger, field)})
        envelopes = (*with_stranger(mallory, first), copy)
    refuses(mallory, mallory.manifest(envelopes), "a key of pi-902 appears twice", lab.names[0])


def test_check_ins_in_another_order(lab, mallory):
    envelopes = tuple(mallory.check_ins.values())
    refuses(mallory, mallory.manifest(envelopes[::-1]), "not sorted", lab.names[0])


def test_more_or_fewer_check_ins_than_the_head_says(lab, mallory):
    envelopes = tuple(mallory.check_ins.values())
    head = mallory.head()
    fewer = Manifest(head, envelopes[:3])
    refuses(mallory, fewer, "says 4 check-ins, the manifest has 3", lab.names[0])


@pytest.mark.parametrize("field", ["pk_mask", "pk_seal", "self_mask_commitment"])
def test_substituted_round_key(lab, mallory, field):
    # In the name of a device whose signature she does not have.
    victim = lab.names[1]
    message = wire.decode_as(CheckIn, mallory.check_ins[victim]).message
    hers = keys.mask_key(bytes(16)).public
    changed = msgspec.structs.replace(message, **{field: hers})
    for key in (lab.coordinator_key, keys.SigningKey(bytes(32))):
        forged = wire.sign(changed, key).envelope
        envelopes = tuple((mallory.check_ins | {victim: forged}).values())
        signed = wire.sign(mallory.manifest(envelopes), lab.coordinator_key)
        with pytest.raises(SignatureError, match="not signed by pi-001"):
            rules.verified_cohort(signed, lab.trust)
    refuses(mallory, mallory.manifest(envelopes), "not signed by pi-001")


@pytest.mark.parametrize(
    "bad",
    [bytes(32), b"\x01" + bytes(31), (2**255 - 19 + 9).to_bytes(32, "little")],
    ids=["zero", "low order", "not canonical"],
)
@pytest.mark.parametrize("field", ["pk_mask", "pk_seal"])
def test_a_device_key_that_everybody_knows_the_secret_of(lab, mallory, field, bad):
    envelope = other_device(lab, mallory, "pi-900", **{field: bad})
    refuses(mallory, mallory.manifest(with_stranger(mallory, envelope)), "pi-900: ", lab.names[0])


def test_own_check_in_altered(lab, mallory):
    """A real, earlier or later check-in of the victim's own, but not the one of this session.

    A device signs one check-in a round. A clone of it (a copied memory card) may have signed
    another: the victim notices.
    """
    victim = lab.names[0]
    clone = lab.session(victim)
    actions = clone.receive(wire.sign(mallory.call, lab.coordinator_key).envelope)
    assert actions
    (other,) = published(clone.ready(1, Prepared(lab.n_params, 1, 1)), CheckIn)
    assert other.envelope != mallory.check_ins[victim]
    envelopes = tuple((mallory.check_ins | {victim: other.envelope}).values())
    refuses(mallory, mallory.manifest(envelopes), "own check-in was altered", victim)


def test_a_manifest_with_garbage_for_check_ins(lab, mallory):
    envelopes = tuple(mallory.check_ins.values())
    for garbage in (bytes(100), envelopes[0][:-1], lab.certificates[lab.names[1]]):
        name = lab.names.pop(0)
        listed = (*envelopes[:3], garbage)
        actions = mallory.tell(name, mallory.manifest(listed))
        assert declined(actions)
        assert published(actions, Shares) == []


def test_a_manifest_that_the_coordinator_did_not_sign(lab, mallory):
    manifest = mallory.manifest()
    for key in (lab.ca, lab.identities[lab.names[0]]):
        with pytest.raises(SignatureError):
            rules.verified_cohort(wire.sign(manifest, key), lab.trust)
        with pytest.raises(SignatureError):
            mallory.give(lab.names[0], wire.sign(manifest, key).envelope)
    mallory.share()
    assert len(mallory.shares) == 4


def test_votes_do_not_carry_over_between_two_manifests(lab, mallory):
    """Half of the devices see one head and half another. Neither half can reach a quorum of four."""
    halves = {0: lab.names[:2], 1: lab.names[2:]}
    manifests = {0: mallory.manifest(), 1: mallory.manifest(clip=2.0)}
    votes = []
    for half, names in halves.items():
        mallory.cohort = mallory.cohort_of(manifests[half])
        answers = mallory.ask(manifests[half], Shares, names)
        for name, signed in answers.items():
            mallory.shares[name] = signed.message
    everyone = frozenset(range(4))
    for half, names in halves.items():
        mallory.cohort = mallory.cohort_of(manifests[half])
        for name in names:
            # All four boxes are handed over, two of them sealed under the other head.
            (vote,) = published(mallory.tell(name, mallory.delivery(name, everyone)), RosterVote)
            own = frozenset(mallory.cohort.index_of(other) for other in names)
            assert mallory.cohort.subset(vote.message.readable) == own
            votes.append((half, vote.envelope))
    for half, names in halves.items():
        mallory.cohort = mallory.cohort_of(manifests[half])
        for name in names:
            all_votes = tuple(envelope for _, envelope in votes)
            actions = mallory.tell(name, mallory.roster(u2=b"\x0f", votes=all_votes))
            assert "of another round or manifest" in declined(actions)
            assert published(actions, MaskedUpdate) == []


def test_a_head_out_of_its_types_does_not_decode(lab, mallory):
    body = msgspec.msgpack.encode(mallory.manifest(n=129))
    envelope = bytes((1, 4)) + lab.coordinator_key.sign("manifest", body) + body
    for name in lab.names:
        with pytest.raises(MalformedError):
            mallory.give(name, envelope)
