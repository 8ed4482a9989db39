"""What a subscriber sees of real rounds is noise: masked updates are uniform, alone and in pairs.

Chunks are caught from the broker and put together again. The same tests on the updates before they were
masked fail by far. See `programs.noise` for the tests and the probability of a false alarm.
"""

import numpy as np
import pytest

from attacks.programs.noise import ALARM, alone_and_in_pairs, p_values
from attacks.programs.wiretap import Wiretap
from covey_coordinator.config import EncodingConfig
from covey_shared import keys
from covey_shared.masking import add_masks, self_mask_key
from live_fleet import connection, patient
from memory_fleet import go

N_DEVICES, N_ROUNDS = 4, 2


def lowest(rings, bits, chance):
    """The smallest p of all tests of all vectors, and where it was found; and how many tests."""
    found = [
        (p, f"{name}: {test}")
        for name, ring in alone_and_in_pairs(rings, bits)
        for test, p in p_values(ring, bits, chance).items()
    ]
    return min(found), len(found)


def together(rings):
    """One long vector."""
    return np.concatenate(list(rings.values()))


# 2 more bits for the sum of four: 16 and 18 in 16- and 32-bit lanes, and the widest and narrowest.
@pytest.mark.parametrize("value_bits", [8, 14, 16, 24])
def test_masked_updates_are_uniform(value_bits, stage, outcome):
    """Over 150 000 ring elements from all devices of several rounds, for several widths."""
    caught = {}

    async def scenario():
        async with (
            stage(N_DEVICES) as fleet,
            Wiretap(connection(fleet.url, "wiretap"), fleet.trust.fleet) as tap,
        ):
            reveal_keys = {}

            def each_round(event):
                machine = fleet.coordinator._play.machine
                if machine is not None and machine.cohort is not None:
                    reveal_keys[machine.cohort.h] = machine._reveal_key

            fleet.on_event = each_round
            encoding = EncodingConfig(value_bits=value_bits)
            state = await fleet.play(fleet.run(patient(N_ROUNDS, n=N_DEVICES, encoding=encoding)))
            assert state.rounds_completed == N_ROUNDS
            await tap.until_uploads(N_ROUNDS * N_DEVICES)
            await tap.caught_up()
            caught.update(fleet=fleet, view=tap.view(), keys=reveal_keys)
            caught["coordinator's"] = tap.view(reveal_keys.values())

    go(scenario())
    fleet, view = caught["fleet"], caught["view"]
    chance = np.random.default_rng()  # spreads integers over their width, no more
    masked, halved, plain, bits = {}, {}, {}, 0
    for h, seen in view.rounds.items():
        bits = seen.head.bits
        for device in seen.payloads:
            at = f"{device} in round {seen.head.round}"
            masked[at] = seen.ring(device).astype(np.int64)
            plain[at] = fleet.plain[seen.head.round, device].astype(np.int64) & ((1 << bits) - 1)
            # What the coordinator makes of it, who learns b of every survivor: pair masks remain.
            coordinator = caught["coordinator's"]
            b = coordinator.secret(coordinator.rounds[h], "b", device)
            assert b is not None
            ring = seen.ring(device).copy()
            add_masks(ring, [], [self_mask_key(keys.Seed(b), h, device)])
            halved[at] = ring.astype(np.int64) & ((1 << bits) - 1)
    assert len(masked) == N_ROUNDS * N_DEVICES
    n_elements = sum(ring.size for ring in masked.values())
    assert n_elements * 4 > 150_000  # of the four widths together
    (p_masked, where), n_tests = lowest(masked, bits, chance)
    (p_halved, where_halved), more = lowest(halved, bits, chance)
    assert p_masked > ALARM, where
    assert p_halved > ALARM, where_halved
    for rings in (masked, halved):
        assert min(p_values(together(rings), bits, chance).values()) > ALARM
    # The control: every single unmasked update is told from noise, by far, and so is every pair.
    for name, ring in alone_and_in_pairs(plain, bits):
        tests = p_values(ring, bits, chance)
        assert tests["KS"] < 1e-100, name
        assert tests["chi-square, high bits"] < 1e-100, name
    outcome(
        f"{bits} bits, {n_elements} elements: smallest p of {n_tests + more} tests "
        f"{min(p_masked, p_halved):.1e}; unmasked below 1e-100"
    )


def test_a_mask_that_is_used_twice_would_be_noticed():
    """The control of the pairs: two updates under one keystream, each uniform, differ by no noise."""
    rng = np.random.default_rng(1)
    mask, bits = rng.integers(0, 1 << 18, 5000), 18
    a, b = (rng.normal(0, 300, 5000).astype(np.int64) for _ in range(2))
    rings = {"a": mask + a, "b": mask + b}
    assert min(p_values(rings["a"] & 0x3FFFF, bits, rng).values()) > 1e-6
    (p, where), _ = lowest(rings, bits, rng)
    assert p < 1e-100
    assert where.startswith("a - b")


def test_a_key_stream_that_leans_would_be_noticed():
    """A bit that is set five times in nine, in vectors as long as those above."""
    rng = np.random.default_rng(2)
    ring = rng.integers(0, 1 << 18, 40_000)
    for bit in (0, 17):
        leaning = np.where(rng.random(ring.size) < 1 / 9, ring | 1 << bit, ring)
        assert min(p_values(leaning, 18, rng).values()) < ALARM
