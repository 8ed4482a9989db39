"""What a device does with a manifest before it believes a word of it: 128 devices, on one core.

Every check-in carries two signatures, the fleet CA's on the certificate and the device's on its round
keys, and two public keys that must be safe to agree with. The signatures alone are timed beside the
whole, in turn within one process: the difference is what the rest of the rules costs. A certificate
that was met in an earlier round is not verified again, which halves the work from the second round on.

    python benchmarks/manifest.py [--json FILE]

Ends with status 1 if the bound is broken.
"""

import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
from _report import Row, report

from covey_shared import keys, wire
from covey_shared.messages import (
    MAX_COHORT,
    Certificate,
    CheckIn,
    DeviceId,
    Head,
    Manifest,
    RunId,
    Work,
)
from covey_shared.secagg import rules
from covey_shared.secagg.cohort import Trust, check_ins_digest
from covey_shared.secagg.parameters import PRG, parameters_for
from covey_shared.wire import Signed

FLEET, RUN, ROUND = "bench", RunId(bytes(16)), 7
LONGEST_MS = 150.0
REPEATS = 15


def check_in(device: DeviceId, ca: keys.SigningKey) -> bytes:
    """One device's envelope, with fresh keys."""
    identity = keys.SigningKey(os.urandom(32))
    certificate = Certificate(FLEET, device, identity.public, 0, 2**31)
    seeds = [keys.Seed(os.urandom(16)) for _ in range(3)]
    message = CheckIn(
        fleet=FLEET,
        run=RUN,
        round=ROUND,
        device=device,
        certificate=wire.sign(certificate, ca).envelope,
        pk_mask=keys.mask_key(seeds[0]).public,
        pk_seal=keys.seal_key(seeds[1]).public,
        self_mask_commitment=keys.self_mask_commitment(seeds[2]),
    )
    return wire.sign(message, identity).envelope


def manifest(n: int, ca: keys.SigningKey, coordinator: keys.SigningKey) -> bytes:
    """A manifest of n devices, as it arrives."""
    envelopes = tuple(check_in(DeviceId(f"pi-{i:03}"), ca) for i in range(n))
    parameters = parameters_for(n)
    head = Head(
        fleet=FLEET,
        run=RUN,
        round=ROUND,
        plan=hashlib.sha256(b"plan").digest(),
        model=hashlib.sha256(b"model").digest(),
        revision=0,
        check_ins=check_ins_digest(envelopes),
        n=n,
        n_params=50_000,
        value_bits=16,
        bits=23,
        lane_bits=32,
        prg=PRG,
        degree=parameters.degree,
        min_side=parameters.min_side,
        committee=parameters.committee,
        threshold=parameters.threshold,
        n_min=3,
        w_max=1000,
        clip=1.0,
        metric_clips=(20.0,),
        work=Work(10, 32, 300.0, (0.1,)),
        pk_reveal=keys.AgreementKey(os.urandom(32)).public,
        issued_unix=1_800_000_000,
        share_s=30.0,
        collect_s=600.0,
        unmask_s=30.0,
    )
    return wire.sign(Manifest(head, envelopes), coordinator).envelope


def milliseconds(work: Callable[[], object]) -> float:
    """Processor time of one call, which other processes on the machine do not add to."""
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


@click.command(help=__doc__)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows too.")
def main(json_path: Path | None) -> None:
    """Measure, print, and say whether the bound holds."""
    ca, coordinator = keys.SigningKey(os.urandom(32)), keys.SigningKey(os.urandom(32))
    trust = Trust(FLEET, ca.public, coordinator.public)
    data = manifest(MAX_COHORT, ca, coordinator)
    signed = wire.decode_as(Manifest, data)
    parts = [wire.decode_as(CheckIn, envelope) for envelope in signed.message.check_ins]
    certificates = [wire.decode_as(Certificate, part.message.certificate) for part in parts]

    def whole() -> None:
        message = wire.decode_as(Manifest, data)
        rules.verified_cohort(Signed(message.message, message.envelope), trust)

    def signatures() -> None:
        for certificate, part in zip(certificates, parts, strict=True):
            certificate.check(ca.public, signer="the fleet CA")
            part.check(certificate.message.identity, signer=part.message.device)

    signatures()
    first, again, least = [], [], []
    for _ in range(REPEATS):
        rules.forget_certificates()
        first.append(milliseconds(whole))
        again.append(milliseconds(whole))
        least.append(milliseconds(signatures))
    strangers, known, floor = map(statistics.median, (first, again, least))
    bound, name = f"<= {LONGEST_MS:.0f}", f"{MAX_COHORT} devices"
    rows = [
        Row(f"{name}, all strangers: verified", strangers, "ms", bound, strangers <= LONGEST_MS),
        Row(f"{name}, met before: verified", known, "ms", bound, known <= LONGEST_MS),
        Row(f"{name}: their {2 * MAX_COHORT} signatures alone", floor, "ms", "", True),
        Row(f"{name}, all strangers: ratio", strangers / floor, "times", "", True),
        Row(f"{name}: size of the manifest", len(data) / 1024, "KiB", "", True),
    ]
    sys.exit(0 if report(rows, json_path) else 1)


if __name__ == "__main__":
    main()
