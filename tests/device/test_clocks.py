"""Clocks that are wrong by a year, either way or both in one round, and devices that were away for a month:
nothing in the protocol hangs on what a device's clock says."""

import contextlib
import itertools
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from covey_device import tls
from covey_device.assembly import assemble, load_device
from covey_device.enrol import join
from covey_device.keystore import MemoryFile
from covey_device.policy import DAY_S, Policy
from covey_device.present import Present
from covey_device.renewal import Renewal, renew
from covey_shared.messages import CheckIn, Decline, Manifest
from enrolment_lab import Lab as Enrolment
from lab import NOW_UNIX, Lab, Play
from mallory import Mallory

YEAR_S = 365 * DAY_S
NUMBERS = itertools.count(1)


# -- rounds ----------------------------------------------------------------------------------------


class Wandering:
    """A clock that jumps each time it is looked at."""

    def __init__(self, *jumps: float) -> None:
        self.unix, self.jumps, self.looked = float(NOW_UNIX), jumps, 0

    def __call__(self) -> float:
        self.unix += self.jumps[self.looked % len(self.jumps)]
        self.looked += 1
        return self.unix


CLOCKS: dict[str, Callable[[], Callable[[], float]]] = {
    "a year behind": lambda: Wandering(-YEAR_S, 0.0, 0.0),
    "a year ahead": lambda: Wandering(YEAR_S, 0.0, 0.0),
    "to and fro": lambda: Wandering(YEAR_S, -2 * YEAR_S, YEAR_S),
    "in 1970": lambda: lambda: 60.0,
    "before 1970": lambda: lambda: -1e9,
}


def with_clock(lab: Lab, name: Any, clock: Callable[[], float], policy: Policy) -> None:
    session = lab.session(name, lab.saved[name][-1] if lab.saved[name] else None, policy)
    session._clock = clock
    lab.sessions[name] = session


@pytest.mark.parametrize("what", CLOCKS)
def test_rounds_go_on_whatever_the_clock_says(what: str):
    lab = Lab(4, n_params=8)
    clock = CLOCKS[what]()
    with_clock(lab, lab.names[1], clock, Policy(rounds_per_day=10))
    for round_id in range(1, 7):
        lab.model = bytes([round_id]) * 32
        play = lab.round(lab.spec(round_id)).run()
        assert play.mismatches() == 0
        assert play.completed is not None
        assert play.completed.survivors == tuple(lab.names)
    # And none was forgotten: it has counted six, but for those that a jump forward took with it.
    assert 1 <= lab.saved[lab.names[1]][-1].day.rounds <= 6


@pytest.mark.parametrize("jump", [YEAR_S, -YEAR_S])
def test_a_jump_of_a_year_neither_lifts_the_owners_limit_nor_locks_out(jump: float):
    """Between two starts; while a process runs its clock cannot be set."""
    lab = Lab(4, n_params=8)
    name, now = lab.names[1], [float(NOW_UNIX)]

    def joined(round_id: int) -> bool:
        lab.model = bytes([round_id]) * 32
        play = lab.round(lab.spec(round_id)).run()
        return bool(play.sent(CheckIn, name))

    with_clock(lab, name, lambda: now[0], Policy(rounds_per_day=2))
    assert [joined(r) for r in (1, 2, 3)] == [True, True, False]
    now[0] += jump
    with_clock(lab, name, lambda: now[0], Policy(rounds_per_day=2))
    once_more = [joined(r) for r in (4, 5, 6)]
    assert once_more == ([True, True, False] if jump > 0 else [False] * 3)
    now[0] -= jump  # it is set right; that lifts nothing if it was ahead
    with_clock(lab, name, lambda: now[0], Policy(rounds_per_day=2))
    again = [joined(r) for r in (7, 8, 9)]
    assert again == ([False] * 3 if jump > 0 else [True, True, False])
    now[0] += DAY_S  # a day later at most it is over
    assert joined(10)


def test_a_device_that_was_off_for_a_month_and_500_rounds_takes_part_in_the_next(tmp_path: Path):
    lab = Lab(4, n_params=8)
    name = lab.names[1]
    assert lab.round(lab.spec(1)).run().mismatches() == 0
    memory = MemoryFile(tmp_path)
    memory.save(lab.saved[name][-1])
    lab.model = b"501 " * 8
    session = lab.session(name, MemoryFile(tmp_path).load(), Policy(rounds_per_day=1))
    session._clock = lambda: NOW_UNIX + 30 * DAY_S
    lab.sessions[name] = session
    play = Play(lab, lab.round(lab.spec(501)).machine).run()
    assert play.mismatches() == 0
    assert play.completed is not None
    assert play.completed.survivors == tuple(lab.names)
    assert play.sent(Decline) == []
    assert lab.saved[name][-1].last_round == 501


@pytest.mark.parametrize("days_left", [1, -1])
def test_its_certificate_counts_by_the_coordinators_time_and_what_to_do_is_said(days_left: int):
    """It lasts, or it ended while the device was off; what the device's own clock says is nothing."""
    lab = Lab(4, n_params=8)
    name = lab.names[1]
    ends = NOW_UNIX + days_left * DAY_S
    lab.certificates[name] = lab.certify(name, lab.identities[name], not_after=ends)
    for clock in (0.0, 60.0, NOW_UNIX + YEAR_S):
        lab.sessions[name] = lab.session(name)
        lab.sessions[name]._clock = lambda clock=clock: clock
        play = lab.round(lab.spec(1)).run()
        assert play.completed is not None
        assert (name in play.completed.survivors) == (days_left > 0)
        ended = play.ended[name]
        if days_left < 0:
            assert ended.outcome == (
                "not in the cohort: this device's identity certificate ended 1 days ago; "
                "`covey-device renew` asks for another, or ask your operator"
            )
        for other in lab.names:
            lab.sessions[other] = lab.session(other)


def test_the_latest_signed_time_is_remembered(tmp_path: Path):
    lab = Lab(4, n_params=8)
    name = lab.names[1]
    lab.round(lab.spec(1)).run()
    kept = lab.saved[name][-1]
    assert kept.signed_unix == NOW_UNIX
    MemoryFile(tmp_path).save(kept)
    assert MemoryFile(tmp_path).load() == kept
    # What a memory of before had not is nothing that is missed.
    path = tmp_path / "memory.json"
    path.write_text(path.read_text().replace(f',"signed_unix":{NOW_UNIX}', ""))
    assert MemoryFile(tmp_path).load() == replace(kept, signed_unix=0)
    # An earlier one turns nothing back.
    lab.sessions[name] = lab.session(name, kept)
    mallory = Mallory(lab, 2, model=bytes(32)).gather()
    old = mallory.manifest(issued_unix=1000)
    assert isinstance(old, Manifest)
    mallory.tell(name, old)
    assert lab.sessions[name]._memory.signed_unix == NOW_UNIX


# -- the present -----------------------------------------------------------------------------------


def test_only_what_both_clocks_say_has_surely_passed():
    unix, steady = [1000.0], [5.0]
    present = Present(clock=lambda: unix[0], steady=lambda: steady[0])
    assert (present.is_told, present.signed_unix, present.surely_unix) == (False, 0.0, 0.0)
    present.told(900)
    assert (present.is_told, present.surely_unix) == (True, 900.0)
    steady[0] += 50
    assert present.signed_unix == 950.0
    present.told(10)  # older: nothing goes back
    assert present.signed_unix == 950.0
    unix[0] += YEAR_S
    assert present.surely_unix == 950.0
    unix[0] -= 2 * YEAR_S
    assert present.surely_unix == unix[0]
    later = Present(700.0, clock=lambda: 10_000.0, steady=lambda: steady[0])
    steady[0] += 1000
    assert (later.is_told, later.surely_unix) == (False, 700.0)  # off for how long, nobody knows


def renewal(clock: Callable[[], float], steady: Callable[[], float]) -> Renewal:
    async def nothing() -> None:
        pass

    return Renewal(
        Path("none"), "pi-1", nothing, waiting=False, uniform=lambda low, high: low,
        clock=clock, steady=steady,
    )  # fmt: skip


@pytest.mark.parametrize("wrong_by", [YEAR_S, -YEAR_S])
def test_certificates_are_renewed_by_the_coordinators_time_once_it_is_known(wrong_by: float):
    unix, steady = [NOW_UNIX + wrong_by], [0.0]
    one = renewal(lambda: unix[0], lambda: steady[0])
    assert one.now_unix == unix[0]
    one.told(NOW_UNIX)
    steady[0] += 60
    assert one.now_unix == NOW_UNIX + 60
    unix[0] -= 2 * wrong_by  # it jumps the other way
    assert one.now_unix == NOW_UNIX + 60
    one.seen(int(NOW_UNIX + YEAR_S))  # an old or early word counts less than a manifest
    assert one.now_unix == NOW_UNIX + 60
    one.told(NOW_UNIX - 1000)
    assert one.now_unix == NOW_UNIX + 60


# -- TLS -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def enrolment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Enrolment]:
    with Enrolment(tmp_path_factory.mktemp("clocks") / "fleet") as lab:
        yield lab


def ahead() -> float:
    """A clock that is wrong by a year."""
    return time.time() + YEAR_S


def test_a_renewal_with_a_clock_that_is_a_year_ahead(
    enrolment: Enrolment, joined: Path, monkeypatch: pytest.MonkeyPatch
):
    """What counts is the time that the service tells it, which the coordinator signed."""
    monkeypatch.setattr(tls.pinned, "__defaults__", (ahead,))
    assert "TLS certificate" in renew(joined, now_unix=time.time(), anyway=True).renewed
    # The control: by this clock the coordinator's own certificate has ended.
    parts = load_device(joined)
    assert isinstance(parts.tls, tls.PinnedContext)
    with ended():
        handshake(enrolment, parts.tls)


@pytest.fixture
def joined(enrolment: Enrolment, tmp_path: Path) -> Path:
    path = tmp_path / "pi" / "device.toml"
    join(enrolment.token(f"clock-{next(NUMBERS)}"), path)
    return path


@contextlib.contextmanager
def ended() -> Iterator[None]:
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        yield
    assert caught.value.verify_message.startswith("it ended on")


def handshake(enrolment: Enrolment, context: ssl.SSLContext) -> None:
    with socket.create_connection(("127.0.0.1", enrolment.port), timeout=10) as plain:
        context.wrap_socket(plain, server_hostname="127.0.0.1").close()


def test_a_broker_is_reached_with_a_clock_that_is_a_year_ahead(enrolment: Enrolment, joined: Path):
    parts = load_device(joined)
    service = assemble(parts)
    service.present._clock = ahead
    assert parts.tls is not None
    handshake(enrolment, parts.tls)
    # Once the coordinator says so too, it has ended.
    service.present.told(int(ahead()))
    with ended():
        handshake(enrolment, parts.tls)
    # And what it said is known to the next process.
    memory = MemoryFile(joined.parent / parts.config.state)
    memory.save(replace(memory.load(), signed_unix=int(ahead())))
    parts = load_device(joined)
    assemble(parts).present._clock = ahead
    assert parts.tls is not None
    with ended():
        handshake(enrolment, parts.tls)
