"""Whole fleets over real brokers: exact sums, whoever vanishes at whatever moment."""

import os
import signal
from pathlib import Path

import msgspec
import psutil

from covey_coordinator.broker import BrokerKind
from covey_coordinator.round import Moved, Phase
from covey_fleet.faults import Moment
from covey_fleet.seats import ProcessSeat
from small_fleet import DEADLINES, device_names, go, script, small_fleet

SENT_ITS_UPDATE = {
    Moment.AFTER_UPLOAD,
    Moment.BEFORE_VIEW_VOTE,
    Moment.BEFORE_REVEAL,
    Moment.AFTER_REVEAL,
}


def test_rounds_with_dropouts_give_exact_sums(broker_kind: BrokerKind, tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = {"dropout": 0.2, "seed": 3}
        async with small_fleet(tmp_path, broker_kind, devices=5, settings=settings) as played:
            state = await played.play()
            fleet = played.fleet
        assert (state.rounds_completed, state.rounds_abandoned) == (3, 0)
        assert [v.round for v in fleet.vanished] == [1, 2, 3]
        assert fleet.sums_checked == 3
        assert fleet.sum_mismatches == 0
        assert fleet.traffic.up > 3 * 5 * 10_000
        assert fleet.ear.overheard is not None
        assert abs(fleet.ear.overheard.correlation) < 0.1

    go(scenario())


def test_a_device_may_vanish_at_any_moment(one_kind: BrokerKind, tmp_path: Path) -> None:
    moments = list(Moment)
    names = device_names(4)
    victims = {i + 1: names[i % 4] for i in range(len(moments))}
    faults = script({(i + 1, victims[i + 1]): moment for i, moment in enumerate(moments)})

    async def scenario() -> None:
        settings = {"faults": faults}
        rounds = len(moments)
        async with small_fleet(tmp_path, one_kind, rounds=rounds, settings=settings) as played:
            await played.play()
            fleet = played.fleet
        assert [v.moment for v in fleet.vanished] == moments
        assert fleet.sums_checked == rounds
        assert fleet.sum_mismatches == 0
        for number, moment in enumerate(moments, 1):
            kept = names if moment in SENT_ITS_UPDATE else set(names) - {victims[number]}
            assert set(played.survivors[number - 1]) == set(kept), moment

    go(scenario())


def test_too_few_of_the_committee_end_the_round_and_not_the_run(
    one_kind: BrokerKind, tmp_path: Path
) -> None:
    # Of four devices three are needed: two that vanish are one too many, at any moment.
    moments = [Moment.BEFORE_SHARES, Moment.BEFORE_UPDATE, Moment.BEFORE_REVEAL]
    faults = script(
        {(i + 1, name): moment for i, moment in enumerate(moments) for name in ("pi-1", "pi-4")}
    )

    async def scenario() -> None:
        settings = {"faults": faults}
        async with small_fleet(tmp_path, one_kind, rounds=4, settings=settings) as played:
            state = await played.play()
            fleet = played.fleet
        assert (state.rounds_completed, state.rounds_abandoned) == (1, 3)
        assert [o.reason for o in played.outcomes] == [
            "2 of the committee's 4 members sent their shares; 3 are needed",
            "2 updates arrived; at least 3 are needed",
            "2 of the committee's 4 members revealed their shares; 3 are needed",
            "",
        ]
        assert set(played.survivors[3]) == set(device_names(4))
        assert fleet.sum_mismatches == 0

    go(scenario())


def test_each_device_in_a_process_of_its_own(one_kind: BrokerKind, tmp_path: Path) -> None:
    faults = script({(1, "pi-2"): Moment.BEFORE_SHARES, (2, "pi-3"): Moment.IN_UPLOAD})
    killed: list[int] = []

    async def scenario() -> None:
        def on_event(event: object) -> None:
            if (
                isinstance(event, Moved)
                and event.phase is Phase.SHARE
                and len(started) == 3
                and not killed
            ):
                seat = played.fleet.seats[0]
                assert isinstance(seat, ProcessSeat)
                assert seat.pid is not None
                killed.append(seat.pid)
                os.kill(seat.pid, signal.SIGKILL)
            if isinstance(event, Moved) and event.phase is Phase.GATHER:
                started.append(event)

        started: list[Moved] = []
        settings = {"processes": True, "faults": faults}
        # Long enough for a process to be started again, however busy the machine.
        patient = msgspec.structs.replace(DEADLINES, gather_s=20.0, absent_grace_s=6.0)
        async with small_fleet(
            tmp_path, one_kind, rounds=3, deadlines=patient, on_event=on_event, settings=settings
        ) as played:
            seats = played.fleet.seats
            pids = [seat.pid for seat in seats if isinstance(seat, ProcessSeat)]
            assert len(set(pids) - {os.getpid(), None}) == 4
            state = await played.play()
            after = [seat.pid for seat in seats if isinstance(seat, ProcessSeat)]
        fleet = played.fleet
        assert (state.rounds_completed, state.rounds_abandoned) == (3, 0)
        assert [(v.round, v.device) for v in fleet.vanished] == [(1, "pi-2"), (2, "pi-3")]
        assert fleet.sums_checked == 3
        assert fleet.sum_mismatches == 0
        assert killed == [pids[0]]
        assert not set(after[:3]) & set(pids)  # vanished or killed, and back as new processes
        assert after[3] == pids[3]
        assert not any(psutil.pid_exists(pid) for pid in [*pids, *after] if pid)
        assert fleet.traffic.up > 3 * 3 * 10_000

    go(scenario())
