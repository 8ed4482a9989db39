"""Devices that lie, among real ones with a real coordinator over a real broker.

Each has a certificate of the fleet CA. The round gives the exact sum, from which the liar's own part can
be taken off, or is abandoned for a reason that names the liar; no honest update lies open.
"""

import os
import time
from contextlib import asynccontextmanager

import msgspec
import pytest

from attacks.programs.device import LIES, RogueDevice
from attacks.programs.wiretap import Wiretap
from covey_shared import keys, wire
from covey_shared.messages import Certificate, DeviceId, Reveal
from live_fleet import PATIENT, connection, patient
from memory_fleet import go

EVIL = DeviceId("aa-evil")  # first in every order, so that its shares are among those that are used


def enrolled(fleet, lie, name=EVIL):
    """A rogue whose certificate is real."""
    identity, now = keys.SigningKey(os.urandom(32)), int(time.time())
    certificate = Certificate(fleet.trust.fleet, name, identity.public, now, now + 3600)
    return LIES[lie](name, identity, wire.sign(certificate, fleet._ca).envelope, fleet.trust)


@asynccontextmanager
async def among(fleet, lie):
    """The fleet with one rogue in it, and a wiretap."""
    async with fleet, Wiretap(connection(fleet.url, "wiretap"), fleet.trust.fleet) as tap:
        rogue = enrolled(fleet, lie)
        async with RogueDevice(rogue, connection(fleet.url, EVIL)):
            await fleet.until(lambda: EVIL in fleet.coordinator.registry.present)
            on_sum = fleet._on_sum

            def with_rogue(round_id, completed):
                for number, ring in rogue.plain.items():
                    fleet.plain[number, EVIL] = ring
                on_sum(round_id, completed)

            fleet._on_sum = with_rogue
            yield rogue, tap


def reveal_after(service, rogue):
    """An honest device holds its reveal back until the rogue's has left."""
    send = service.send

    async def later(signed):
        if isinstance(signed.message, Reveal):
            await rogue.spoke_last.wait()
        await send(signed)

    service.send = later


def faults(fleet):
    return dict(fleet.coordinator.registry.faults)


@pytest.mark.parametrize("moment", ["call", "manifest", "delivery", "roster", "proposal", "view"])
def test_a_device_vanishes(moment, stage, outcome):
    """In each phase, for good: the sum of the others is exact."""

    async def scenario():
        fleet = stage(4)
        async with among(fleet, f"vanish-at-{moment}") as (rogue, tap):
            n = 4 if moment == "call" else 5
            state = await fleet.play(fleet.run(patient(1, n=n)))
            assert rogue.gone
            assert state.rounds_completed == 1, fleet.outcomes[0].reason
            sent = moment in ("proposal", "view")
            assert (EVIL in fleet.sums[1].survivors) == sent
            assert set(fleet.names) <= set(fleet.sums[1].survivors)
            assert fleet.honest_sum_is_right(1)
            assert await tap.hidden(fleet, rogue.keys, accomplices=1) == 4
            assert faults(fleet) == {}
            outcome(f"the exact sum of the other 4{' and its own' if sent else ''}")

    go(scenario())


@pytest.mark.parametrize("lie", ["two-check-ins", "two-updates", "two-votes"])
def test_a_device_equivocates(lie, stage, outcome):
    """What it said first counts, and the coordinator notes who said two things."""

    async def scenario():
        fleet = stage(4)
        async with among(fleet, lie) as (rogue, tap):
            state = await fleet.play(fleet.run(patient(1, n=5)))
            assert state.rounds_completed == 1, fleet.outcomes[0].reason
            assert set(fleet.names) <= set(fleet.sums[1].survivors)
            assert fleet.honest_sum_is_right(1)
            assert await tap.hidden(fleet, rogue.keys, accomplices=1) == 4
            assert set(faults(fleet)) == {EVIL}
            outcome(f"the exact sum; named: {EVIL}")

    go(scenario())


@pytest.mark.parametrize("lie", ["repeats", "impostor", "flood"])
def test_a_device_makes_noise(lie, stage, outcome):
    """Uploads five times; speaks for another device; floods: the sum holds each device once."""

    async def scenario():
        fleet = stage(4)
        async with among(fleet, lie) as (rogue, tap):
            state = await fleet.play(fleet.run(patient(1, n=5)))
            assert state.rounds_completed == 1, fleet.outcomes[0].reason
            assert set(fleet.names) <= set(fleet.sums[1].survivors)
            assert EVIL in fleet.sums[1].survivors
            assert fleet.honest_sum_is_right(1)
            assert await tap.hidden(fleet, rogue.keys, accomplices=1) == 4
            assert faults(fleet) == {}
            assert lie != "flood" or len(tap.messages) > 1000
            outcome(
                f"the exact sum of {len(fleet.sums[1].survivors)}; {len(tap.messages)} messages in all"
            )

    go(scenario())


@pytest.mark.parametrize("lie", ["edges", "all-ones"])
def test_a_device_sends_the_rings_edges(lie, stage, outcome):
    """All ones, the largest, the smallest: without its part the sum is that of the honest, exactly."""

    async def scenario():
        fleet = stage(4)
        async with among(fleet, lie) as (rogue, tap):
            state = await fleet.play(fleet.run(patient(1, n=5)))
            # A sum that such values spoil may be of no use for an average, and is exact all the same.
            assert set(fleet.sums) == {1}, fleet.outcomes[0].reason
            assert fleet.sums[1].survivors == (EVIL, *fleet.names)
            assert fleet.honest_sum_is_right(1)
            assert await tap.hidden(fleet, rogue.keys, accomplices=1) == 4
            done = "averaged" if state.rounds_completed else fleet.outcomes[0].reason
            outcome(f"exact mod 2^b, and without its part the honest sum; {done}")

    go(scenario())


@pytest.mark.parametrize("lie", ["wrong-length", "wrong-padding"])
def test_a_device_sends_no_packed_update(lie, stage, outcome):
    async def scenario():
        fleet = stage(4)
        async with among(fleet, lie) as (rogue, tap):
            deadlines = msgspec.structs.replace(PATIENT, collect_s=10.0)
            state = await fleet.play(fleet.run(patient(1, n=5, deadlines=deadlines)))
            assert state.rounds_completed == 1, fleet.outcomes[0].reason
            assert fleet.sums[1].survivors == tuple(fleet.names)
            assert fleet.honest_sum_is_right(1)
            assert await tap.hidden(fleet, rogue.keys, accomplices=1) == 4
            outcome("left out; the exact sum of the other 4")

    go(scenario())


@pytest.mark.parametrize("lie", ["wrong-reveal", "other-kind"])
def test_a_member_reveals_wrongly(lie, stage, outcome):
    """There is one share to spare: the sum is exact, and the liar is named."""

    async def scenario():
        fleet = stage(4)
        async with among(fleet, lie) as (rogue, tap):
            for seat in fleet.seats:  # t reveals are enough, and the liar's is to be among them
                reveal_after(seat.service, rogue)
            state = await fleet.play(fleet.run(patient(1, n=5)))
            assert state.rounds_completed == 1, fleet.outcomes[0].reason
            assert fleet.honest_sum_is_right(1)
            assert set(faults(fleet)) == {EVIL}
            machine = fleet.coordinator._play.machine
            assert machine._aggregator.liars == {EVIL}
            # Even with the coordinator's key beside its own: the share of s it gave away is one of t.
            assert await tap.hidden(fleet, [*rogue.keys, machine._reveal_key], accomplices=1) == 4
            outcome(f"the exact sum; named: {EVIL}")

    go(scenario())


@pytest.mark.parametrize("lie", ["other-shares", "sealed-shut"])
def test_a_device_deals_bad_shares(lie, stage, outcome):
    """Costs one round, whose reason names it; the next goes on without it."""

    async def scenario():
        fleet = stage(4)
        async with among(fleet, lie) as (rogue, tap):
            # The second round is one device short of its goal, and takes what there is in time.
            deadlines = msgspec.structs.replace(PATIENT, gather_s=4.0)
            state = await fleet.play(fleet.run(patient(2, n=5, deadlines=deadlines)))
            first, second = fleet.outcomes
            assert first.completed is None
            assert EVIL in first.reason
            assert first.after_uploads == (lie == "other-shares")
            assert state.rounds_completed == 1, second.reason
            assert second.completed.survivors == tuple(fleet.names)
            assert fleet.honest_sum_is_right(2)
            assert set(faults(fleet)) == {EVIL}
            n = 8 if lie == "other-shares" else 4
            machine = fleet.coordinator._play.machine
            assert await tap.hidden(fleet, [*rogue.keys, machine._reveal_key], accomplices=1) == n
            outcome(f"abandoned: {first.reason}; then an exact sum without it")

    go(scenario())
