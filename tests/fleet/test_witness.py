"""The witness and the ear must be able to fail: what they say of a run hangs on it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey_coordinator.round import Completed
from covey_fleet.eavesdropper import Eavesdropper
from covey_fleet.witness import Witness
from covey_shared import chunks
from covey_shared.fixedpoint import Encoding, pack
from covey_shared.messages import DeviceId
from covey_shared.topics import Topics
from covey_shared.transport import Incoming

ENCODING = Encoding(value_bits=16, n=3, n_params=500, clip=1.0, w_max=10)
NAMES = tuple(DeviceId(f"pi-{i}") for i in (1, 2, 3))
TOPICS = Topics("f")


def encoded(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    delta = rng.normal(0, 0.1, 500).astype(np.float32)
    return ENCODING.encode(delta, 5, (), rng.bytes)


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    told = Witness(tmp_path)
    for seed, name in enumerate(NAMES):
        told.of(name)(4, encoded(seed))
    return told


def total(*seeds: int) -> Any:
    ring = sum(encoded(seed).astype(np.int64) for seed in seeds) % (1 << ENCODING.bits)
    return ring.astype(ENCODING.lane)


def test_the_survivors_sum_and_no_other_is_right(witness: Witness) -> None:
    both = Completed(total(0, 2), ENCODING, (NAMES[0], NAMES[2]), (NAMES[1],))
    assert witness.mismatches(4, both) == 0
    assert witness.mismatches(4, Completed(total(0, 1), ENCODING, both.survivors, ())) > 450
    ring = total(0, 2)
    ring[17] += 1
    assert witness.mismatches(4, Completed(ring, ENCODING, both.survivors, ())) == 1


def test_a_survivor_nobody_knows_makes_everything_wrong(witness: Witness) -> None:
    stranger = Completed(total(0), ENCODING, (NAMES[0], DeviceId("pi-9")), ())
    assert witness.mismatches(4, stranger) == 501
    assert witness.mismatches(5, Completed(total(0), ENCODING, (NAMES[0],), ())) == 501


def test_what_is_forgotten_is_gone(witness: Witness, tmp_path: Path) -> None:
    witness.forget(4)
    assert list(tmp_path.iterdir()) == []
    assert witness.encoded(4, NAMES[0]) is None


def overheard(ring: Any) -> float:
    """What the ear makes of an upload with this payload, of a device that encoded `encoded(0)`."""
    nobody: Any = None
    ear = Eavesdropper(nobody, TOPICS)
    blob = chunks.blob_of(pack(ring, ENCODING.bits))
    for frame in (b"garbage", chunks.frame(blob, 0)):
        ear._on_message(Incoming(TOPICS.upload(NAMES[0]), frame))
    ear.compare(1, NAMES[1], ENCODING, encoded(1))
    assert ear.overheard is None
    ear.compare(1, NAMES[0], ENCODING, encoded(0))
    assert ear.overheard is not None
    assert ear.overheard.coordinates == 501
    return ear.overheard.correlation


def test_an_update_that_was_not_masked_would_be_heard() -> None:
    noise = np.random.default_rng(9).integers(0, 1 << ENCODING.bits, 501).astype(ENCODING.lane)
    masked = (encoded(0) + noise) & ENCODING.lane.type((1 << ENCODING.bits) - 1)
    assert abs(overheard(masked)) < 0.2
    assert overheard(encoded(0)) == pytest.approx(1.0)
