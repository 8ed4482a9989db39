"""Every wire message, a frozen record. How they become bytes is `wire`'s business.

============  ==========================  ====================================================
message       from -> to                  says
============  ==========================  ====================================================
RoundCall     coordinator -> all          a round gathers: fetch this plan and model, check in
CheckIn       device -> coordinator       1: I take part, with these round keys
Manifest      coordinator -> all          2: the round's head, and every check-in of the cohort
Shares        device -> coordinator       3: one sealed box of secret shares per member
Delivery      coordinator -> member       3': the boxes addressed to one member
RosterVote    member -> coordinator       4: I hold boxes of exactly these devices
Roster        coordinator -> all          5: these devices, and a quorum that says so
MaskedUpdate  device -> coordinator       6: digest of my masked update (sent in chunks)
ViewProposal  coordinator -> members      7': these devices' updates arrived
ViewVote      member -> coordinator       7: I stand by this view, and by no other
View          coordinator -> members      8': a quorum stands by this view
Reveal        member -> coordinator       8: the shares that this view allows, sealed
Result        coordinator -> all          9: who was summed, and the next model
RoundAbandoned  coordinator -> all        the round ended without a sum, and why
Decline       device -> coordinator       I leave this round, and why
WantBlob      device -> coordinator       send me these chunks of a plan or model
WantUpload    coordinator -> device       send me these chunks of your update again
PlanSignature model owner -> devices      inside RoundCall: this plan is mine
============  ==========================  ====================================================

A *member* is a device in its role on the round's committee (in cohorts up to 128 everybody is one).
Check-ins and votes travel on inside other messages as the very envelopes that were signed.

Field limits are part of the type: `wire.decode` refuses what exceeds them. Hashes are SHA-256;
times named `_unix` are seconds of the coordinator's clock, durations end in `_s`.
Bitmaps have one bit per check-in of the manifest, in its order, lowest bit first.
"""

from typing import Annotated, ClassVar, NewType

import msgspec
from msgspec import Meta

from covey_shared.keys import BOX_OVERHEAD_BYTES, SEED_BYTES

MAX_COHORT = 128
"""Largest cohort of this version: complete graph, everybody on the committee."""

MAX_METRICS = 8
MAX_HYPERPARAMETERS = 16
MAX_ENVELOPE_BYTES = 1024
MAX_REASON_CHARS = 300
MAX_RANGES = 64
MAX_PLAN_SIGNATURES = 4

MAX_PACE_S = 3600
"""Longest time over which a coordinator may have devices spread what they do."""

DeviceId = NewType("DeviceId", str)
RunId = NewType("RunId", bytes)
ManifestDigest = NewType("ManifestDigest", bytes)
"""h: SHA-256 of the manifest's head; what every later message of the round names."""

# \Z, not $: that one also matches before a newline at the end.
_NAME = r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?\Z"

FleetName = Annotated[str, Meta(pattern=_NAME)]
Device = Annotated[DeviceId, Meta(pattern=_NAME)]
Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Bytes64 = Annotated[bytes, Meta(min_length=64, max_length=64)]
Run = Annotated[RunId, Meta(min_length=16, max_length=16)]
ManifestHash = Annotated[ManifestDigest, Meta(min_length=32, max_length=32)]
RoundId = Annotated[int, Meta(ge=1, le=2**53)]
Bitmap = Annotated[bytes, Meta(min_length=1, max_length=MAX_COHORT // 8)]
Envelope = Annotated[bytes, Meta(min_length=66, max_length=MAX_ENVELOPE_BYTES)]
Size = Annotated[int, Meta(ge=1, le=2**40)]
Unix = Annotated[int, Meta(ge=0, le=2**40)]
Seconds = Annotated[float, Meta(gt=0, le=30 * 86400)]
PaceSeconds = Annotated[float, Meta(ge=0, le=MAX_PACE_S)]
Reason = Annotated[str, Meta(max_length=MAX_REASON_CHARS)]
Box = Annotated[
    bytes,
    Meta(
        min_length=BOX_OVERHEAD_BYTES + 2 * SEED_BYTES,
        max_length=BOX_OVERHEAD_BYTES + 2 * SEED_BYTES,
    ),
]
Ranges = Annotated[
    tuple[tuple[Annotated[int, Meta(ge=0, le=2**32)], Annotated[int, Meta(ge=1, le=2**32)]], ...],
    Meta(max_length=MAX_RANGES),
]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages. CODE is the type's byte on the wire, LABEL the one in its signature."""

    CODE: ClassVar[int]
    LABEL: ClassVar[str]


class Certificate(Message, frozen=True):
    """A device's identity, signed by the fleet's certificate authority. Travels inside CheckIn.

    issued_unix: from when its renewal is reckoned, and which of two certificates is the newer.
    """

    CODE: ClassVar[int] = 1
    LABEL: ClassVar[str] = "certificate"

    fleet: FleetName
    device: Device
    identity: Bytes32
    issued_unix: Unix
    not_after_unix: Unix


class RoundCall(Message, frozen=True):
    """A round gathers. Retained by the broker, so that a device that comes late sees it too.

    plan: hash of the plan's header. model: hash of the flat float32 vector. revision: how many
    rounds on this very model came as far as uploads before (see `device.session` on contributing
    once). plan_signatures: envelopes of PlanSignature, for devices that run owners' plans only.

    The last three steer the pace of a large fleet. chance: with which each device, by its own draw,
    answers the call at all. spread_s: the window over which those that do spread their answers.
    reconnect_s: the window over which all spread their return after their next lost connection.
    """

    CODE: ClassVar[int] = 2
    LABEL: ClassVar[str] = "round call"

    fleet: FleetName
    run: Run
    round: RoundId
    plan: Bytes32
    plan_bytes: Size
    model: Bytes32
    model_bytes: Size
    revision: Annotated[int, Meta(ge=0, le=65535)]
    n_min: Annotated[int, Meta(ge=2, le=MAX_COHORT)]
    plan_signatures: Annotated[tuple[Envelope, ...], Meta(max_length=MAX_PLAN_SIGNATURES)]
    gather_s: Seconds
    chance: Annotated[float, Meta(gt=0, le=1)]
    spread_s: PaceSeconds
    reconnect_s: PaceSeconds


class CheckIn(Message, frozen=True):
    """Message 1. Round keys are fresh: a reused one would let two rounds be subtracted.

    certificate: the envelope the fleet CA signed. self_mask_commitment: H(b).
    """

    CODE: ClassVar[int] = 3
    LABEL: ClassVar[str] = "check-in"

    fleet: FleetName
    run: Run
    round: RoundId
    device: Device
    certificate: Envelope
    pk_mask: Bytes32
    pk_seal: Bytes32
    self_mask_commitment: Bytes32


class Work(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a device is asked to compute, at most; its own budget may allow less.

    hyper: the plan's hyper-parameters, in the order of its header.
    """

    batches: Annotated[int, Meta(ge=1, le=2**31)]
    batch_size: Annotated[int, Meta(ge=1, le=2**20)]
    seconds: Seconds
    hyper: Annotated[tuple[float, ...], Meta(max_length=MAX_HYPERPARAMETERS)]


class Head(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Everything a round is about. Its hash h binds every key that is used in the round.

    check_ins: hash of the list that follows it in the manifest. n: its length. bits (b), lane_bits,
    value_bits, clip, w_max, metric_clips: see `fixedpoint`. degree (k), min_side (e_min),
    committee (L), threshold (t): see `secagg.parameters`. pk_reveal: the coordinator's X25519 key of
    this round. issued_unix: what certificates' ends are compared with, since a device's own clock
    may be wrong by years.
    """

    fleet: FleetName
    run: Run
    round: RoundId
    plan: Bytes32
    model: Bytes32
    revision: Annotated[int, Meta(ge=0, le=65535)]
    check_ins: Bytes32
    n: Annotated[int, Meta(ge=2, le=MAX_COHORT)]
    n_params: Annotated[int, Meta(ge=1, le=2**28)]
    value_bits: Annotated[int, Meta(ge=1, le=32)]
    bits: Annotated[int, Meta(ge=1, le=32)]
    lane_bits: Annotated[int, Meta(ge=16, le=32)]
    prg: Annotated[str, Meta(max_length=16)]
    degree: Annotated[int, Meta(ge=1, le=MAX_COHORT)]
    min_side: Annotated[int, Meta(ge=0, le=MAX_COHORT)]
    committee: Annotated[int, Meta(ge=1, le=MAX_COHORT)]
    threshold: Annotated[int, Meta(ge=1, le=MAX_COHORT)]
    n_min: Annotated[int, Meta(ge=2, le=MAX_COHORT)]
    w_max: Annotated[int, Meta(ge=1, le=2**31)]
    clip: float
    metric_clips: Annotated[tuple[float, ...], Meta(max_length=MAX_METRICS)]
    work: Work
    pk_reveal: Bytes32
    issued_unix: Unix
    share_s: Seconds
    collect_s: Seconds
    unmask_s: Seconds


class Manifest(Message, frozen=True):
    """Message 2: the head and the cohort's check-ins, sorted by device id."""

    CODE: ClassVar[int] = 4
    LABEL: ClassVar[str] = "manifest"

    head: Head
    check_ins: Annotated[tuple[Envelope, ...], Meta(min_length=2, max_length=MAX_COHORT)]


class Shares(Message, frozen=True):
    """Message 3: box x holds member x's share of b and of s. boxes: in the manifest's order."""

    CODE: ClassVar[int] = 5
    LABEL: ClassVar[str] = "shares"

    h: ManifestHash
    device: Device
    boxes: Annotated[tuple[Box, ...], Meta(min_length=2, max_length=MAX_COHORT)]


class Delivery(Message, frozen=True):
    """Message 3': the boxes for one member. boxes: those of the devices in u2, in order."""

    CODE: ClassVar[int] = 6
    LABEL: ClassVar[str] = "delivery"

    h: ManifestHash
    member: Device
    u2: Bitmap
    boxes: Annotated[tuple[Box, ...], Meta(min_length=1, max_length=MAX_COHORT)]


class RosterVote(Message, frozen=True):
    """Message 4. readable: those of u2 whose box opened; the others' secrets this member lacks."""

    CODE: ClassVar[int] = 7
    LABEL: ClassVar[str] = "roster vote"

    h: ManifestHash
    member: Device
    u2: Bitmap
    readable: Bitmap


class Roster(Message, frozen=True):
    """Message 5: u2 and at least `threshold` votes for it."""

    CODE: ClassVar[int] = 8
    LABEL: ClassVar[str] = "roster"

    h: ManifestHash
    u2: Bitmap
    votes: Annotated[tuple[Envelope, ...], Meta(max_length=MAX_COHORT)]


class MaskedUpdate(Message, frozen=True):
    """Message 6. payload: hash of the packed masked vector, which follows in chunks."""

    CODE: ClassVar[int] = 9
    LABEL: ClassVar[str] = "masked update"

    h: ManifestHash
    device: Device
    u2: Bitmap
    payload: Bytes32
    payload_bytes: Size


class ViewProposal(Message, frozen=True):
    """Message 7': whose updates the coordinator holds."""

    CODE: ClassVar[int] = 10
    LABEL: ClassVar[str] = "view proposal"

    h: ManifestHash
    u2: Bitmap
    u3: Bitmap


class ViewVote(Message, frozen=True):
    """Message 7: a member signs one view a round; a second one would reveal a device."""

    CODE: ClassVar[int] = 11
    LABEL: ClassVar[str] = "view vote"

    h: ManifestHash
    member: Device
    u2: Bitmap
    u3: Bitmap


class View(Message, frozen=True):
    """Message 8': at least `threshold` votes for one view."""

    CODE: ClassVar[int] = 12
    LABEL: ClassVar[str] = "view"

    h: ManifestHash
    u3: Bitmap
    votes: Annotated[tuple[Envelope, ...], Meta(max_length=MAX_COHORT)]


class Reveal(Message, frozen=True):
    """Message 8: for i in u3 the share of b_i, for i in u2 but not u3 the share of s_i.

    present: the devices of u2 whose shares this member holds. box: their 16-byte shares in order,
    sealed to the coordinator's key of this round.
    """

    CODE: ClassVar[int] = 13
    LABEL: ClassVar[str] = "reveal"

    h: ManifestHash
    member: Device
    u3: Bitmap
    present: Bitmap
    box: Annotated[
        bytes,
        Meta(
            min_length=BOX_OVERHEAD_BYTES, max_length=BOX_OVERHEAD_BYTES + SEED_BYTES * MAX_COHORT
        ),
    ]


class Result(Message, frozen=True):
    """Message 9. votes: the view's quorum. ring_sum: hash of the decoded sum's packed ring vector."""

    CODE: ClassVar[int] = 14
    LABEL: ClassVar[str] = "result"

    h: ManifestHash
    fleet: FleetName
    run: Run
    round: RoundId
    u3: Bitmap
    votes: Annotated[tuple[Envelope, ...], Meta(max_length=MAX_COHORT)]
    ring_sum: Bytes32
    next_model: Bytes32


class RoundAbandoned(Message, frozen=True):
    """The round ended without a sum."""

    CODE: ClassVar[int] = 15
    LABEL: ClassVar[str] = "round abandoned"

    fleet: FleetName
    run: Run
    round: RoundId
    reason: Reason


class Decline(Message, frozen=True):
    """A device leaves the round; its committee duties, if it has any, it still does."""

    CODE: ClassVar[int] = 16
    LABEL: ClassVar[str] = "decline"

    fleet: FleetName
    run: Run
    round: RoundId
    device: Device
    reason: Reason


class WantBlob(Message, frozen=True):
    """Chunks of a published blob that a device lacks. ranges: (first index, count)."""

    CODE: ClassVar[int] = 17
    LABEL: ClassVar[str] = "want blob"

    fleet: FleetName
    device: Device
    blob: Bytes32
    ranges: Ranges


class WantUpload(Message, frozen=True):
    """Chunks of a masked update that the coordinator lacks. ranges: (first index, count)."""

    CODE: ClassVar[int] = 18
    LABEL: ClassVar[str] = "want upload"

    h: ManifestHash
    device: Device
    payload: Bytes32
    ranges: Ranges


class PlanSignature(Message, frozen=True):
    """A model's owner vouches for a plan. owner: the Ed25519 key that signed; plan: the plan's hash.

    Needed by devices whose owner trusts some model owners only; the coordinator passes it on and
    cannot make one.
    """

    CODE: ClassVar[int] = 19
    LABEL: ClassVar[str] = "plan signature"

    owner: Bytes32
    plan: Bytes32


ALL: tuple[type[Message], ...] = (
    Certificate,
    RoundCall,
    CheckIn,
    Manifest,
    Shares,
    Delivery,
    RosterVote,
    Roster,
    MaskedUpdate,
    ViewProposal,
    ViewVote,
    View,
    Reveal,
    Result,
    RoundAbandoned,
    Decline,
    WantBlob,
    WantUpload,
    PlanSignature,
)


def for_display(reason: str) -> str:
    """A peer's words, fit for a terminal or a log: control characters could rewrite what stands there."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in reason)
