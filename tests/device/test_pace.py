"""What a device does of a call's pace: when it answers, whether it does, and how it comes back."""

import asyncio
import itertools
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_coordinator.run import Run
from covey_device import session as device
from covey_device.session import Phase
from covey_shared import keys, wire
from covey_shared.messages import CheckIn, RoundCall
from covey_shared.transport import Incoming
from lab import Lab
from mallory import Mallory
from memory_fleet import Fleet, Seat, config, go, hasten, short


def draws(*values: float) -> Any:
    """Bytes from which `keys.uniform` makes these draws."""
    rest = iter(values)
    return lambda n: int(next(rest) * 2.0**64).to_bytes(n, "big")


def told(lab: Lab, name: Any, **call: Any) -> list[device.Action]:
    """What a device does when it is called."""
    envelope = wire.sign(lab.call(**call), lab.coordinator_key).envelope
    return lab.sessions[name].receive(envelope)


# -- drawing --------------------------------------------------------------------------------------


@given(st.binary(min_size=8, max_size=8))
def test_a_draw_is_at_least_zero_and_below_one(data: bytes):
    assert 0.0 <= keys.uniform(lambda n: data) < 1.0


def test_draws_fill_their_range_evenly():
    assert keys.uniform(lambda n: b"\xff" * n) == 1 - 2.0**-53
    assert keys.uniform(lambda n: b"\x80" + bytes(n - 1)) == 0.5
    assert keys.uniform(lambda n: bytes(n)) == 0.0


# -- whether it answers ---------------------------------------------------------------------------


def test_a_device_answers_with_the_chance_that_the_call_names():
    lab = Lab(4)
    name = lab.names[0]
    session = lab.sessions[name]
    session._rng = draws(0.2499, 0.25, 0.9)
    answers = [told(lab, name, round_id=r, chance=0.25) for r in (1, 2, 3)]
    assert [[type(a) for a in actions] for actions in answers] == [
        [device.Fetch],
        [device.Ended],  # of the first, which it was in
        [],
    ]
    assert session.phase is Phase.IDLE
    assert session.round_id is None


def test_a_certain_call_draws_nothing():
    lab = Lab(4)
    lab.sessions[lab.names[0]]._rng = draws()
    assert isinstance(told(lab, lab.names[0], chance=1.0)[0], device.Fetch)


def test_who_sits_a_round_out_does_not_draw_again_for_it():
    """A call is repeated every few seconds; with a draw at each, everybody would come in the end."""
    lab = Lab(4)
    name = lab.names[0]
    lab.sessions[name]._rng = draws(0.9, 0.1)
    for _ in range(5):
        assert told(lab, name, round_id=3, chance=0.5) == []
    assert told(lab, name, round_id=2, chance=0.5) == []  # an older one, played back
    assert isinstance(told(lab, name, round_id=4, chance=0.5)[0], device.Fetch)


def test_who_sits_a_round_out_serves_the_next():
    lab = Lab(4)
    for name in lab.names:
        lab.sessions[name]._rng = draws(0.9, *([0.1] * 20))
        assert told(lab, name, round_id=1, chance=0.5) == []
    mallory = Mallory(lab, 2, chance=0.5).gather()
    assert sorted(mallory.check_ins) == sorted(lab.names)


def test_every_device_is_as_likely_to_answer_as_any_other():
    lab = Lab(4)
    answered: Counter[str] = Counter()
    for round_id, name in itertools.product(range(1, 401), lab.names):
        actions = told(lab, name, round_id=round_id, chance=0.3)
        answered[name] += any(isinstance(a, device.Fetch) for a in actions)
    # 400 draws of 0.3 lie between 84 and 156 but for once in 10,000 times
    assert all(84 <= answered[name] <= 156 for name in lab.names), answered


# -- when it comes back ---------------------------------------------------------------------------


def test_a_pace_is_told_once_and_when_it_changes():
    lab = Lab(4)
    name = lab.names[0]
    paces = []
    for round_id, pace in enumerate((0.0, 5.0, 5.0, 7.5, 0.0), 1):
        actions = told(lab, name, round_id=round_id, reconnect_s=pace)
        paces.append([a.reconnect_s for a in actions if isinstance(a, device.Pace)])
    assert paces == [[], [5.0], [], [7.5], [0.0]]


def test_who_declines_or_sits_out_keeps_the_pace_too():
    lab = Lab(4)
    out, unwilling = lab.names[:2]
    lab.sessions[out]._rng = draws(0.9)
    assert told(lab, out, chance=0.5, reconnect_s=5.0) == [device.Pace(5.0)]
    lab.sessions[unwilling].certificate = b""
    actions = told(lab, unwilling, reconnect_s=5.0)
    assert [type(a) for a in actions] == [device.Pace, device.Publish, device.Ended]


def test_a_call_that_is_over_changes_no_pace():
    lab = Lab(4)
    name = lab.names[0]
    told(lab, name, round_id=5, reconnect_s=5.0)
    assert told(lab, name, round_id=4, reconnect_s=3600.0) == []


# -- the service ----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


def paced(run: Run, **pace: float) -> Run:
    """The same run, whose calls steer the pace."""
    plain = run.spec

    def spec(*args: Any, **more: Any) -> Any:
        made = plain(*args, **more)
        return replace(made, call=msgspec.structs.replace(made.call, **pace))

    run.spec = spec  # type: ignore[method-assign]
    return run


def call_of(fleet: Fleet, **changes: Any) -> RoundCall:
    return msgspec.structs.replace(Lab(3).call(), fleet=fleet.trust.fleet, **changes)


def waits(seat: Seat, call: RoundCall, *, retained: bool) -> list[float]:
    seat.service._late = retained
    return [seat.service._spread_s(call) for _ in range(200)]


def test_devices_spread_their_answers(tmp_path: Path, quick: None):
    """Each waits for a part of the window of its own, and nobody beyond half of the gathering."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            run = fleet.run(config(rounds=1, deadlines=short(gather_s=20.0)))
            arrived: dict[str, float] = {}
            loop = asyncio.get_running_loop()
            called = loop.time()

            def tamper(delivery: Any) -> Any:
                data = delivery.incoming.payload
                if delivery.receiver.startswith("coordinator") and data[1:2] == b"\x03":
                    arrived.setdefault(delivery.sender, loop.time() - called)
                return (delivery,)

            fleet.network.tamper = tamper
            for i, seat in enumerate(fleet.seats):
                seat.service._rng = draws(*([(i + 1) / 5] * 9))
            called = loop.time()
            state = await fleet.play(paced(run, spread_s=1.5))
            assert state.rounds_completed == 1
            due = [1.5 * (i + 1) / 5 for i in range(4)]
            late = [arrived[seat.name] - s for seat, s in zip(fleet.seats, due, strict=True)]
            assert all(s >= 0 for s in late), late

    go(scenario())


def test_the_wait_ends_within_half_of_the_gathering(tmp_path: Path, quick: None):
    async def scenario() -> None:
        async with Fleet(tmp_path, n=1) as fleet:
            (seat,) = fleet.seats
            honest = waits(seat, call_of(fleet, gather_s=30.0, spread_s=6.0), retained=False)
            assert 0 <= min(honest) < 1 < 5 < max(honest) <= 6
            hostile = waits(seat, call_of(fleet, gather_s=30.0, spread_s=3600.0), retained=False)
            assert 14 < max(hostile) <= 15
            none = waits(seat, call_of(fleet, gather_s=30.0, spread_s=0.0), retained=False)
            assert set(none) == {0.0}

    go(scenario())


def test_who_finds_a_call_that_was_kept_for_it_answers_at_once(tmp_path: Path, quick: None):
    """The window may be over: how long ago the call was made it does not know."""

    async def scenario() -> None:
        async with Fleet(tmp_path, n=1) as fleet:
            (seat,) = fleet.seats
            call = call_of(fleet, gather_s=3000.0, spread_s=1000.0)
            assert set(waits(seat, call, retained=True)) == {0.0}
            envelope = wire.sign(call, fleet.key).envelope
            for retained in (True, False):
                seat.service._on_message(Incoming(fleet.topics.round, envelope, retained))
                await fleet.until(lambda r=retained: seat.service._late is r)  # type: ignore[misc]

    go(scenario())


def test_another_call_cuts_the_wait_short(tmp_path: Path, quick: None):
    """And the device takes part in that other round."""

    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            slow = fleet.run(config(rounds=1, deadlines=short(gather_s=40.0)), "slow")
            for seat in fleet.seats:
                seat.service._rng = draws(*([0.999] * 99))
            playing = asyncio.create_task(fleet.play(paced(slow, spread_s=3600.0)))
            await fleet.until(lambda: all(seat.service._round_tasks for seat in fleet.seats))
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)
            before = {seat.name: seat.service._session.round_id for seat in fleet.seats}
            assert set(before.values()) == {1}, "they wait, and have not left"
            done = await fleet.play(fleet.run(config(rounds=1), "next"))
            assert done.rounds_completed == 1
            assert len(fleet.outcomes[-1].completed.survivors) == 4  # type: ignore[union-attr]
            rounds = [
                wire.decode_as(CheckIn, data).message.round
                for _, topic, data in fleet.network.log
                if "/from/" in topic and data[1:2] == bytes((CheckIn.CODE,))
            ]
            assert set(rounds) == {2}

    go(scenario())


def test_the_transport_learns_the_pace(tmp_path: Path, quick: None):
    async def scenario() -> None:
        async with Fleet(tmp_path) as fleet:
            assert {seat.transport.pace_s for seat in fleet.seats} == {0.0}
            await fleet.play(paced(fleet.run(config(rounds=1)), reconnect_s=12.5))
            assert {seat.transport.pace_s for seat in fleet.seats} == {12.5}
            await fleet.boot(fleet.seats[0])  # a new process begins without
            assert fleet.seats[0].transport.pace_s == 0.0

    go(scenario())


def test_a_fleet_of_which_some_sit_out_completes_its_round(tmp_path: Path, quick: None):
    async def scenario() -> None:
        async with Fleet(tmp_path, n=6) as fleet:
            for i, seat in enumerate(fleet.seats):
                seat.service._session._rng = first(draws(0.9 if i < 2 else 0.1))
            run = paced(fleet.run(config(rounds=1, n=3)), chance=0.5)
            state = await fleet.play(run)
            assert state.rounds_completed == 1
            joined = {s for o in fleet.outcomes for s in o.completed.survivors}  # type: ignore[union-attr]
            assert joined <= {seat.name for seat in fleet.seats[2:]}

    go(scenario())


def first(draw: Any) -> Any:
    """One draw as told, then real ones."""
    made = []

    def rng(n: int) -> bytes:
        made.append(n)
        return draw(n) if len(made) == 1 else os.urandom(n)

    return rng
