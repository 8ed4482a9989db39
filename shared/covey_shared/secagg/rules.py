"""What each side refuses, in one place, without I/O.

Every function raises the RemoteProtocolError family and returns what it verified. A device trusts
three things only: its own keys and memory, the fleet CA's key and the coordinator's key; and the
coordinator's key only to know who is speaking, never that it speaks the truth.
"""

import functools
import math
from dataclasses import dataclass

from covey_shared import keys, wire
from covey_shared.errors import RefusedError
from covey_shared.messages import (
    MAX_COHORT,
    Certificate,
    CheckIn,
    Head,
    Manifest,
    MaskedUpdate,
    RosterVote,
    RoundCall,
    Shares,
    ViewVote,
)
from covey_shared.secagg.cohort import (
    Cohort,
    Peer,
    Trust,
    check_ins_digest,
    encoding_of,
    manifest_digest,
)
from covey_shared.secagg.parameters import PRG, parameters_for
from covey_shared.wire import Signed


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a device knows of a round before it sees the manifest.

    call: the round's call, whose plan and model it has fetched and checked. n_params and
    n_hyperparameters: of that plan. min_cohort: the owner's own bound, which the coordinator cannot
    lower. max_weight: the largest w_max the owner accepts.
    """

    call: RoundCall
    n_params: int
    n_hyperparameters: int
    n_metrics: int
    min_cohort: int
    max_weight: int


@functools.lru_cache(maxsize=8 * MAX_COHORT)
def _certificate(envelope: bytes, ca: bytes) -> Certificate:
    """A certificate with the CA's signature, which is half the work of verifying a manifest: a device
    meets mostly the same ones, round after round. Whether it still lasts is asked each time."""
    return wire.opened(Certificate, envelope, ca, signer="the fleet CA").message


def forget_certificates() -> None:
    """Verify every certificate anew from now on; for measurements."""
    _certificate.cache_clear()


def verified_check_in(envelope: bytes, trust: Trust, now_unix: int) -> tuple[CheckIn, bytes]:
    """Check-in and identity key, with the CA's signature, the device's, and the certificate's end."""
    signed = wire.decode_as(CheckIn, envelope)
    check_in = signed.message
    certificate = _certificate(check_in.certificate, trust.ca)
    if check_in.fleet != trust.fleet or certificate.fleet != trust.fleet:
        raise RefusedError(f"check-in of {check_in.device} is for fleet {certificate.fleet!r}")
    if certificate.device != check_in.device:
        raise RefusedError(
            f"check-in of {check_in.device} carries the certificate of {certificate.device}"
        )
    signed.check(certificate.identity, signer=check_in.device)
    if certificate.not_after_unix < now_unix:
        raise RefusedError(
            f"the certificate of {check_in.device} has ended", sender=check_in.device
        )
    # One bad key would make every other device's sealing or masking fail.
    for public in (check_in.pk_mask, check_in.pk_seal):
        keys.check_agreement_key(public, owner=check_in.device)
    return check_in, certificate.identity


def keys_of(check_in: CheckIn, identity: bytes) -> tuple[bytes, ...]:
    """What must be a device's own, and no other's in the cohort."""
    return identity, check_in.pk_mask, check_in.pk_seal, check_in.self_mask_commitment


def verified_cohort(manifest: Signed[Manifest], trust: Trust) -> Cohort:
    """Check all of a manifest that does not depend on who reads it: signatures of the coordinator,
    the CA and every device, the list's order and uniqueness, and that the head fits itself."""
    manifest.check(trust.coordinator, signer="the coordinator")
    head, envelopes = manifest.message.head, manifest.message.check_ins
    _check_head(head, trust)
    if len(envelopes) != head.n:
        raise RefusedError(f"the head says {head.n} check-ins, the manifest has {len(envelopes)}")
    if check_ins_digest(envelopes) != head.check_ins:
        raise RefusedError("the manifest's check-ins are not those its head names")
    peers: list[Peer] = []
    seen: set[bytes] = set()
    for index, envelope in enumerate(envelopes):
        check_in, identity = verified_check_in(envelope, trust, head.issued_unix)
        if (check_in.run, check_in.round) != (head.run, head.round):
            raise RefusedError(f"check-in of {check_in.device} is of another round")
        for value in keys_of(check_in, identity):
            if value in seen:
                raise RefusedError(f"a key of {check_in.device} appears twice in the manifest")
            seen.add(value)
        peers.append(
            Peer(
                index=index,
                device=check_in.device,
                identity=identity,
                pk_mask=check_in.pk_mask,
                pk_seal=check_in.pk_seal,
                self_mask_commitment=check_in.self_mask_commitment,
            )
        )
    names = [peer.device for peer in peers]
    if names != sorted(set(names)):
        raise RefusedError("the manifest's check-ins are not sorted, or name a device twice")
    index_by_name = {peer.device: peer.index for peer in peers}
    return Cohort(manifest_digest(head), head, tuple(peers), envelopes, index_by_name)


def _check_head(head: Head, trust: Trust) -> None:
    if head.fleet != trust.fleet:
        raise RefusedError(f"the manifest is for fleet {head.fleet!r}")
    ours = parameters_for(head.n)
    theirs = (head.degree, head.min_side, head.committee, head.threshold)
    if theirs != (ours.degree, ours.min_side, ours.committee, ours.threshold):
        raise RefusedError(
            f"the manifest's degree, side, committee and threshold are {theirs}; a cohort of "
            f"{head.n} takes {ours.degree}, {ours.min_side}, {ours.committee}, {ours.threshold}"
        )
    if head.prg != PRG:
        raise RefusedError(f"the manifest asks for keystream {head.prg!r}; this covey has {PRG}")
    if not head.n_min <= head.n:
        raise RefusedError(f"the manifest has {head.n} devices and wants at least {head.n_min}")
    if (problem := encoding_of(head).problem()) is not None:
        raise RefusedError(f"the manifest's encoding is unusable: {problem}")
    keys.check_agreement_key(head.pk_reveal, owner="the coordinator")
    if not all(math.isfinite(value) for value in head.work.hyper):
        raise RefusedError("the manifest's hyper-parameters are not finite")


def check_expectation(
    cohort: Cohort, expected: Expectation, own_check_in: bytes, index: int
) -> None:
    """What a device refuses of a manifest that is sound in itself."""
    head, call = cohort.head, expected.call
    for name, theirs, ours in (
        ("run", head.run, call.run),
        ("round", head.round, call.round),
        ("plan", head.plan, call.plan),
        ("model", head.model, call.model),
        ("revision", head.revision, call.revision),
    ):
        if theirs != ours:
            raise RefusedError(f"the manifest's {name} is not the one that was called")
    if head.n_params != expected.n_params:
        raise RefusedError(
            f"the manifest says {head.n_params} parameters, the plan has {expected.n_params}"
        )
    if len(head.work.hyper) != expected.n_hyperparameters:
        raise RefusedError(
            f"the manifest sets {len(head.work.hyper)} hyper-parameters, "
            f"the plan has {expected.n_hyperparameters}"
        )
    if len(head.metric_clips) != expected.n_metrics:
        raise RefusedError(f"the manifest asks for {len(head.metric_clips)} metrics")
    floor = max(expected.min_cohort, call.n_min)
    if head.n_min < floor:
        raise RefusedError(
            f"the manifest would sum {head.n_min} devices; this device takes part among "
            f"at least {floor}"
        )
    if head.w_max > expected.max_weight:
        raise RefusedError(
            f"the manifest's largest weight is {head.w_max}; this device allows {expected.max_weight}"
        )
    if cohort.envelopes[index] != own_check_in:
        raise RefusedError("this device's own check-in was altered in the manifest")


def check_shares(cohort: Cohort, shares: Shares) -> None:
    """One box for each member. Whether they open, only their members find out."""
    if len(shares.boxes) != cohort.n:
        raise RefusedError(
            f"{shares.device} sent {len(shares.boxes)} boxes; the committee has {cohort.n} members",
            sender=shares.device,
        )


def check_masked_update(cohort: Cohort, roster: frozenset[int], update: MaskedUpdate) -> None:
    """It is masked for exactly this roster, by one who is on it, and of the size of this round."""
    if cohort.index_of(update.device) not in roster or update.u2 != cohort.bitmap(roster):
        raise RefusedError(f"{update.device} masked for another roster")
    if update.payload_bytes != cohort.encoding.payload_bytes:
        raise RefusedError(
            f"{update.device} announces {update.payload_bytes} bytes; an update of this round has "
            f"{cohort.encoding.payload_bytes}",
            sender=update.device,
        )


def check_roster(cohort: Cohort, votes: tuple[bytes, ...], u2: bytes) -> frozenset[int]:
    """At least t distinct members voted for exactly u2. Returns the set."""
    roster = cohort.subset(u2)
    if len(roster) < max(cohort.head.n_min, cohort.threshold):
        raise RefusedError(
            f"a roster of {len(roster)} devices; at least "
            f"{max(cohort.head.n_min, cohort.threshold)} are needed"
        )
    signers = set()
    for envelope in votes:
        vote = verified_roster_vote(cohort, wire.decode_as(RosterVote, envelope))
        if vote.u2 != u2:
            raise RefusedError(f"the roster carries a vote of {vote.member} for another roster")
        signers.add(vote.member)
    _check_quorum(cohort, len(votes), len(signers), "roster")
    return roster


def verified_roster_vote(cohort: Cohort, signed: Signed[RosterVote]) -> RosterVote:
    """A vote of this round by the member it names."""
    vote = signed.message
    _check_round(cohort, vote.h, "roster vote")
    index = cohort.index_of(vote.member)
    if not cohort.subset(vote.readable) <= cohort.subset(vote.u2):
        raise RefusedError(f"{vote.member} claims boxes that its roster does not have")
    signed.check(cohort.peers[index].identity, signer=vote.member)
    return vote


def check_view(
    cohort: Cohort, roster: frozenset[int], votes: tuple[bytes, ...], u3: bytes
) -> frozenset[int]:
    """At least t distinct members voted for exactly this view of exactly our roster."""
    view = check_view_shape(cohort, roster, u3)
    signers = set()
    for envelope in votes:
        vote = verified_view_vote(cohort, wire.decode_as(ViewVote, envelope))
        if vote.u3 != u3 or vote.u2 != cohort.bitmap(roster):
            raise RefusedError(f"the view carries a vote of {vote.member} for another view")
        signers.add(vote.member)
    _check_quorum(cohort, len(votes), len(signers), "view")
    return view


def check_view_shape(cohort: Cohort, roster: frozenset[int], u3: bytes) -> frozenset[int]:
    """U3 lies within U2 and holds enough devices for nobody to be singled out."""
    view = cohort.subset(u3)
    if not view <= roster:
        raise RefusedError(f"the view names {cohort.names(view - roster)}, not on the roster")
    if len(view) < cohort.head.n_min:
        raise RefusedError(
            f"the view has {len(view)} devices; at least {cohort.head.n_min} are needed"
        )
    return view


def verified_view_vote(cohort: Cohort, signed: Signed[ViewVote]) -> ViewVote:
    """A vote of this round by the member it names."""
    vote = signed.message
    _check_round(cohort, vote.h, "view vote")
    index = cohort.index_of(vote.member)
    signed.check(cohort.peers[index].identity, signer=vote.member)
    return vote


def _check_round(cohort: Cohort, h: bytes, what: str) -> None:
    if h != cohort.h:
        raise RefusedError(f"a {what} of another round or manifest")


def _check_quorum(cohort: Cohort, votes: int, signers: int, what: str) -> None:
    if signers != votes:
        raise RefusedError(f"the {what} repeats a signer")
    if signers < cohort.threshold:
        raise RefusedError(f"the {what} has {signers} votes; {cohort.threshold} are needed")
