"""What the coordinator says in a round, as messages: what follows from what, without deciding anything."""

from collections.abc import Iterator, Mapping, Sequence

from covey_coordinator.phases import RoundSpec
from covey_shared.errors import LocalProtocolError
from covey_shared.fixedpoint import Encoding
from covey_shared.messages import (
    MAX_REASON_CHARS,
    Delivery,
    Head,
    RoundAbandoned,
    RoundCall,
)
from covey_shared.secagg.cohort import Cohort, check_ins_digest
from covey_shared.secagg.parameters import PRG, parameters_for


def head_of(spec: RoundSpec, envelopes: tuple[bytes, ...], pk_reveal: bytes, now_unix: int) -> Head:
    """The head of a manifest. envelopes: the chosen check-ins, in the order of their devices' names.

    Raises LocalProtocolError if so many updates cannot be encoded as the spec says.
    """
    call, n = spec.call, len(envelopes)
    encoding = Encoding(
        value_bits=spec.value_bits,
        n=n,
        n_params=spec.n_params,
        clip=spec.clip,
        w_max=spec.w_max,
        metric_clips=spec.metric_clips,
    )
    if (problem := encoding.problem()) is not None:
        raise LocalProtocolError(f"this round cannot be encoded: {problem}")
    parameters = parameters_for(n)
    return Head(
        fleet=call.fleet,
        run=call.run,
        round=call.round,
        plan=call.plan,
        model=call.model,
        revision=call.revision,
        check_ins=check_ins_digest(envelopes),
        n=n,
        n_params=spec.n_params,
        value_bits=spec.value_bits,
        bits=encoding.bits,
        lane_bits=encoding.lane_bits,
        prg=PRG,
        degree=parameters.degree,
        min_side=parameters.min_side,
        committee=parameters.committee,
        threshold=parameters.threshold,
        n_min=call.n_min,
        w_max=spec.w_max,
        clip=spec.clip,
        metric_clips=spec.metric_clips,
        work=spec.work,
        pk_reveal=pk_reveal,
        issued_unix=now_unix,
        share_s=spec.share_s,
        collect_s=spec.collect_s,
        unmask_s=spec.unmask_s,
    )


def deliveries(cohort: Cohort, boxes: Mapping[int, Sequence[bytes]]) -> Iterator[Delivery]:
    """For each member the boxes that are for it. boxes: by the index of who shared, its boxes in the
    order of the members; who is in it is the roster."""
    bitmap = cohort.bitmap(frozenset(boxes))
    for peer in cohort.peers:
        yield Delivery(
            h=cohort.h,
            member=peer.device,
            u2=bitmap,
            boxes=tuple(boxes[i][peer.index] for i in sorted(boxes)),
        )


def abandonment(call: RoundCall, reason: str) -> RoundAbandoned:
    """The word to devices that a round will not go on."""
    return RoundAbandoned(
        fleet=call.fleet, run=call.run, round=call.round, reason=reason[:MAX_REASON_CHARS]
    )
