"""Someone who reads all traffic of real rounds, and knows more and more of what it must not."""

from attacks.programs.wiretap import Wiretap, unmask_attempt
from live_fleet import connection, patient
from memory_fleet import go


def tapped(fleet):
    return Wiretap(connection(fleet.url, "wiretap"), fleet.trust.fleet)


def test_an_eavesdropper_unmasks_nobody(stage, outcome):
    """All traffic of a real round. With the secrets handed over as well, the attempt succeeds."""

    async def scenario():
        async with stage(4) as fleet, tapped(fleet) as tap:
            state = await fleet.play(fleet.run(patient(1)))
            assert state.rounds_completed == 1
            await tap.until_uploads(4)
            await tap.caught_up()
            view = tap.view()
            (seen,) = view.rounds.values()
            assert set(seen.payloads) == set(fleet.names)
            for name in fleet.names:
                assert view.smallest_sum(seen, name) is None
                assert unmask_attempt(view, name) is None
                assert view.n_shares(seen, "b", name) == view.n_shares(seen, "s", name) == 0
            assert await tap.hidden(fleet) == 4
            # What the coordinator knows is the sum of all, and of no fewer.
            machine = fleet.coordinator._play.machine
            coordinator = tap.view([machine._reveal_key])
            seen = coordinator.rounds[machine.cohort.h]
            total = fleet.sum_of(1, fleet.names, seen.head.bits)
            for name in fleet.names:
                who, ring = coordinator.smallest_sum(seen, name)
                assert who == set(fleet.names)
                assert (ring == total).all()
            assert await tap.hidden(fleet, [machine._reveal_key]) == 4

    go(scenario())
    outcome("all traffic: nothing; with the coordinator's key: the sum of all, nothing less")
