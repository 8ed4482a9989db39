"""Certificates that renew themselves: when, how, and what a running device does with them."""

import asyncio
import contextlib
import itertools
import logging
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from covey_coordinator import pki
from covey_coordinator.fleet_ca import certify
from covey_device import enrol, renewal, tls
from covey_device.assembly import assemble, load_device
from covey_device.audit import AuditLog
from covey_device.renewal import (
    FIRST_S,
    LOOK_S,
    RETRY_BASE_S,
    RETRY_CAP_S,
    WAITING_CAP_S,
    WANTED_S,
    Life,
    Renewal,
    Schedule,
    renew,
)
from covey_device.session import Ended, Publish, Renew
from covey_shared import wire
from covey_shared.enrolment import IdentityRequest, RenewalWanted
from covey_shared.errors import ConfigError, CoveyError, RefusedError, StorageError
from covey_shared.keys import SigningKey
from covey_shared.messages import Certificate, Decline, DeviceId
from covey_shared.topics import Topics
from covey_shared.transport import Incoming
from enrolment_lab import HOST, Lab, context_of
from lab import Lab as Rounds

DAY_S = 86_400


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab") / "fleet") as lab:
        yield lab


@pytest.fixture
def device(lab: Lab, tmp_path: Path) -> Path:
    """The device.toml of a device that has joined."""
    np.savez(tmp_path / "data.npz", features=np.zeros(1), labels=np.zeros(1))
    name = f"pi-{os.urandom(4).hex()}"
    return enrol.join(lab.token(name), tmp_path / "device.toml").config


def pair_of(config: Path) -> Path:
    return config.parent / str(load_device(config).config.broker.cert_file)


def leaf_of(config: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pair_of(config).read_bytes())


# -- when --------------------------------------------------------------------------------------------


@given(st.floats(0, 1e9), st.floats(1, 1e9))
def test_two_thirds_of_a_life(began: float, lasts: float):
    life = Life(began, began + lasts)
    assert life.due_unix == pytest.approx(began + lasts * 2 / 3)


@given(st.integers(0, 2**32), st.floats(0, 1e6), st.lists(st.booleans(), max_size=40))
def test_the_back_off_grows_from_a_minute_to_hours_and_never_further(
    seed: int, now_s: float, waits: list[bool]
):
    schedule = Schedule(now_s, random.Random(seed).uniform)
    assert now_s <= schedule.next_s <= now_s + FIRST_S
    for number, waiting in enumerate(waits):
        now_s = schedule.next_s
        delay = schedule.failed(now_s, waiting=waiting)
        most = min(WAITING_CAP_S if waiting else RETRY_CAP_S, RETRY_BASE_S * 2**number)
        assert most / 2 <= delay <= most
        assert schedule.next_s == pytest.approx(now_s + delay)
    schedule.done(now_s, 5 * DAY_S)
    assert schedule.failed(now_s) <= RETRY_BASE_S  # forgotten


@given(st.integers(0, 2**32), st.floats(-1e9, 1e9))
def test_it_looks_again_when_something_is_due_and_once_a_day(seed: int, due_in_s: float):
    schedule = Schedule(0.0, random.Random(seed).uniform)
    schedule.done(100.0, due_in_s)
    wait = schedule.next_s - 100.0
    assert RETRY_BASE_S <= wait <= LOOK_S + FIRST_S
    assert wait <= max(due_in_s, RETRY_BASE_S) + FIRST_S


@given(st.lists(st.floats(0, 3 * WANTED_S), min_size=1, max_size=30))
def test_what_the_coordinator_asks_for_is_done_once_an_hour(gaps: list[float]):
    schedule, now_s, done = Schedule(0.0, lambda low, high: high), 0.0, []
    for gap in gaps:
        now_s += gap
        if schedule.wanted(now_s):
            done.append(now_s)
            assert (schedule.next_s, schedule.asked) == (now_s, True)
    assert done[0] == gaps[0]
    assert all(b - a >= WANTED_S for a, b in itertools.pairwise(done))


def test_what_others_say_of_the_time_hurries_nothing_that_fails():
    schedule = Schedule(0.0, lambda low, high: high)
    schedule.failed(0.0)
    schedule.due(1.0)
    assert schedule.next_s == RETRY_BASE_S
    schedule.done(100.0, DAY_S)
    schedule.due(101.0)  # they said so right after a renewal
    assert schedule.next_s > 101.0
    schedule.due(100.0 + WANTED_S)
    assert schedule.next_s == 100.0 + WANTED_S


class Clock:
    def __init__(self, unix: float) -> None:
        self.unix, self.steady_s = unix, 50.0

    def make(self, path: Path = Path("none")) -> Renewal:
        async def nothing() -> None:
            pass

        return Renewal(
            path, "pi-1", nothing, waiting=False, uniform=lambda low, high: low,
            clock=lambda: self.unix, steady=lambda: self.steady_s,
        )  # fmt: skip


def test_now_is_the_latest_of_what_is_known():
    clock = Clock(60.0)  # 1970
    told = clock.make()
    assert told.now_unix == 60.0
    told.seen(1_800_000_000)
    assert told.now_unix == 1_800_000_000
    clock.steady_s += 10
    assert told.now_unix == 1_800_000_010  # what was seen goes on
    told.seen(1_700_000_000)  # an old message turns nothing back
    assert told.now_unix == 1_800_000_010
    clock.unix = 1_900_000_000.0  # the clock was set
    assert told.now_unix == 1_900_000_000


# -- how ---------------------------------------------------------------------------------------------


def test_nothing_is_renewed_before_two_thirds(device: Path):
    before, due = leaf_of(device), renewal.tls_life_of(pair_of(device)).due_unix
    report = renew(device, now_unix=due - 1)
    assert (report.renewed, report.waiting, report.due_unix) == ((), False, due)
    assert leaf_of(device) == before
    report = renew(device, now_unix=due)
    assert report.renewed == ("TLS certificate",)
    after = leaf_of(device)
    assert after.serial_number != before.serial_number
    assert after.public_key() != before.public_key()  # a new key each time
    assert load_device(device).tls is not None  # so that key and certificate fit
    assert pair_of(device).stat().st_mode & 0o777 == 0o600
    entry = AuditLog(parts_state(device)).last("renewed")
    assert entry["what"] == "TLS certificate"


def parts_state(device: Path) -> Path:
    return device.parent / load_device(device).config.state


def test_an_identity_certificate_is_renewed_for_the_same_key(lab: Lab, device: Path):
    parts = load_device(device)
    held = wire.decode_as(Certificate, parts.certificate).message
    lab.ahead_s = 61 * DAY_S
    try:
        report = renew(device, now_unix=held.issued_unix + 61 * DAY_S)
    finally:
        lab.ahead_s = 0
    assert report.renewed == ("TLS certificate", "identity certificate")
    fresh = wire.decode_as(Certificate, load_device(device).certificate).message
    assert fresh.identity == held.identity
    assert fresh.issued_unix >= held.issued_unix + 61 * DAY_S


def test_the_operator_can_have_both_renewed(lab: Lab, device: Path):
    parts = load_device(device)
    before = wire.decode_as(Certificate, parts.certificate).message
    lab.ahead_s = 5
    try:
        lab.fleet.want_renewal(parts.config.device, lab.now())
        report = renew(device, now_unix=time.time(), anyway=True)
    finally:
        lab.ahead_s = 0
    assert report.renewed == ("TLS certificate", "identity certificate")
    after = wire.decode_as(Certificate, load_device(device).certificate).message
    assert after.issued_unix > before.issued_unix


def files_of(config: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in config.parent.rglob("*") if p.is_file()}


@pytest.mark.parametrize("step", [0, 1])
def test_a_full_disk_leaves_what_there_was(
    lab: Lab, device: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    """At the first write nothing changed, at the second the TLS pair is new and whole."""
    before, count = files_of(device), iter(range(10))
    write = renewal.write_durably

    def full(path: Path, data: bytes) -> None:
        if next(count) == step:
            raise StorageError("cannot write: No space left")
        write(path, data)

    monkeypatch.setattr(renewal, "write_durably", full)
    lab.ahead_s = 61 * DAY_S
    try:
        with pytest.raises(StorageError):
            renew(device, now_unix=lab.now())
    finally:
        lab.ahead_s = 0
    changed = {p for p, data in files_of(device).items() if before.get(p) != data}
    assert changed == ({pair_of(device)} if step else set())
    assert load_device(device).tls is not None


def test_a_tls_certificate_that_ended_cannot_be_renewed(device: Path):
    ends = renewal.tls_life_of(pair_of(device)).ends_unix
    with pytest.raises(ConfigError, match=r"ended on .*run `covey-device join --force`"):
        renew(device, now_unix=ends)


def test_a_broker_that_moved_is_told(lab: Lab, device: Path):
    text = device.read_text().replace(":8883", ":8999")
    device.write_text(text)
    note = renew(device, now_unix=time.time(), anyway=True).note
    assert note == f"the fleet's broker is now at mqtts://{HOST}:8883: set `broker.url` to that"
    assert device.read_text() == text


def test_a_device_that_did_not_join_has_nothing_to_renew(tmp_path: Path):
    config = tmp_path / "device.toml"
    config.write_text(
        'fleet = "f"\ndevice = "d"\n[broker]\nurl = "mqtt://h"\n[data]\nkind = "npz"\nfile = "d"\n'
        f'[trust]\nfleet_ca = "{"a" * 64}"\ncoordinator = "{"b" * 64}"\n'
    )
    with pytest.raises(ConfigError, match="was not enrolled with a token"):
        renew(config, now_unix=0.0)


def test_no_coordinator_is_one_error(lab: Lab, device: Path):
    with socket.create_server((HOST, 0)) as server:
        free = server.getsockname()[1]
    device.write_text(device.read_text().replace(f"port = {lab.port}", f"port = {free}"))
    before = files_of(device)
    with pytest.raises(CoveyError, match="does `covey up` run there"):
        renew(device, now_unix=time.time(), anyway=True)
    assert files_of(device) == before


# -- in a running device -----------------------------------------------------------------------------


def shown_by(context: ssl.SSLContext, authority: str, pair: Path) -> int:
    """The serial number of the certificate that a connection with this context shows."""
    server = context_of_file(authority, pair)
    with socket.create_server((HOST, 0)) as listener:
        found: list[int] = []

        def accept() -> None:
            plain, _ = listener.accept()
            with plain, server.wrap_socket(plain, server_side=True) as secure:
                der = secure.getpeercert(binary_form=True)
                assert der is not None
                found.append(x509.load_der_x509_certificate(der).serial_number)
                secure.sendall(b"x")

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        with (
            socket.create_connection(listener.getsockname(), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=HOST) as secure,
        ):
            assert secure.recv(1) == b"x"
        thread.join(10)
    return found[0]


def context_of_file(authority: str, pair: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    context.load_verify_locations(cadata=authority)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def test_a_running_device_renews_when_it_is_asked_to(
    lab: Lab, device: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """By the coordinator's message, in a child process; the next connection and round use it."""
    caplog.set_level(logging.INFO)
    parts = load_device(device)
    assert parts.tls is not None
    authority = lab.fleet.tls.authority
    server = pki.server_certificate(authority, [HOST], days=30, now_unix=int(time.time()))
    context_of(server, tmp_path / "server")
    pair, pem = tmp_path / "server" / "server.pem", authority.pem.decode()
    before = leaf_of(device)
    assert shown_by(parts.tls, pem, pair) == before.serial_number
    key = lab.fleet.coordinator_key()
    name = DeviceId(parts.config.device)
    wanted = wire.sign(RenewalWanted(fleet="farm", device=name, issued_unix=lab.now()), key)

    async def scenario() -> None:
        service = assemble(parts)
        assert service.renewal is not None
        service.renewal._schedule.next_s = float("inf")  # by itself it would not
        await service.start()
        try:
            inbox = Topics("farm").inbox(name)
            service._on_message(Incoming(inbox, wanted.envelope))
            service._on_message(Incoming(inbox, wanted.envelope))  # an hour has not passed
            async with asyncio.timeout(30):
                while "renewed: TLS certificate" not in caplog.text:
                    await asyncio.sleep(0.02)
            held = service._session.certificate
            assert held == load_device(device).certificate
        finally:
            await service.close()

    asyncio.run(scenario())
    after = leaf_of(device)
    assert after.serial_number != before.serial_number
    assert shown_by(parts.tls, pem, pair) == after.serial_number
    assert caplog.text.count("the coordinator asks for a renewal") == 1


def test_what_fails_is_one_line_and_nothing_else_suffers(
    lab: Lab, device: Path, caplog: pytest.LogCaptureFixture
):
    with socket.create_server((HOST, 0)) as server:
        free = server.getsockname()[1]
    device.write_text(device.read_text().replace(f"port = {lab.port}", f"port = {free}"))
    before = files_of(device)

    async def scenario() -> None:
        told = Clock(time.time()).make(device)
        told._schedule.next_s = 0.0
        told.wanted()
        task = asyncio.create_task(told.run())
        async with asyncio.timeout(30):
            while "certificates were not renewed" not in caplog.text:
                await asyncio.sleep(0.02)
        assert told._schedule.asked  # it is still to be done
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert files_of(device) == before
    assert len(caplog.messages) == 1
    assert "does `covey up` run there?; next attempt in 30 s" in caplog.messages[0]


def test_a_device_without_a_certificate_waits_and_then_joins_rounds(tmp_path: Path):
    ca = SigningKey(os.urandom(32))
    (tmp_path / "ca.pub").write_text(ca.public.hex())
    with Lab(tmp_path / "fleet", ca=tmp_path / "ca.pub") as lab:
        config = enrol.join(lab.token("pi-1"), tmp_path / "pi" / "device.toml").config
        parts = load_device(config)

        async def scenario() -> None:
            service = assemble(parts)
            told = service.renewal
            assert told is not None
            assert service._session.certificate == b""
            await told._act()
            assert service._session.certificate == b""
            wait = told._schedule.next_s - time.monotonic()
            assert RETRY_BASE_S / 2 - 1 <= wait <= RETRY_BASE_S
            request = IdentityRequest(
                fleet="farm", device=DeviceId("pi-1"), identity=parts.identity.public, days=90
            )
            lab.fleet.book.install("pi-1", certify(ca, request, lab.now()).envelope)
            lab.fleet.want_renewal("pi-1", lab.now() + 2)  # an operator in a hurry
            await told._act()
            assert service._session.certificate == load_device(config).certificate != b""
            assert told._schedule.next_s - time.monotonic() > DAY_S / 2
            await service.close()

        asyncio.run(scenario())


# -- what the session makes of it --------------------------------------------------------------------


def called(rounds: Rounds, round_id: int) -> bytes:
    return wire.sign(rounds.call(round_id), rounds.coordinator_key).envelope


def test_without_a_certificate_no_round_is_joined():
    rounds = Rounds(3)
    session = rounds.sessions[rounds.names[0]]
    held, session.certificate = session.certificate, b""
    actions = session.receive(called(rounds, 1))
    said = [a.message.message for a in actions if isinstance(a, Publish)]
    assert [type(message) for message in said] == [Decline]
    assert said[0].reason == "the fleet CA has yet to sign this device's identity"  # type: ignore[attr-defined]
    assert [type(a) for a in actions][-1] is Ended
    session.certificate = held
    assert Ended not in [type(a) for a in session.receive(called(rounds, 2))]


def test_a_renewal_is_only_for_whom_it_names_and_by_the_coordinator():
    rounds = Rounds(3)
    name, session = rounds.names[0], rounds.sessions[rounds.names[0]]
    fleet = rounds.trust.fleet

    def said(fleet: str, device: str, key: object = rounds.coordinator_key) -> bytes:
        message = RenewalWanted(fleet=fleet, device=DeviceId(device), issued_unix=7)
        return wire.sign(message, key).envelope  # type: ignore[arg-type]

    assert session.receive(said(fleet, name)) == [Renew(7)]
    for wrong in (said("other", name), said(fleet, rounds.names[1])):
        with pytest.raises(RefusedError):
            session.receive(wrong)
    with pytest.raises(CoveyError, match="not signed by the coordinator"):
        session.receive(said(fleet, name, rounds.identities[name]))


def test_in_words():
    assert tls.in_words(0) == "1970-01-01 00:00 UTC"


def test_the_service_of_an_enrolled_device_holds_no_x509_library(device: Path):
    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from covey_device.assembly import assemble, load_device, concerns\n"
        "async def main():\n"
        "    parts = load_device(Path(sys.argv[1]))\n"
        "    service = assemble(parts)\n"
        "    assert service.renewal is not None and parts.tls is not None\n"
        "    assert concerns(parts, 0.0) == []\n"
        "    report = await service.renewal._child(True)\n"
        "    assert report.renewed == ('TLS certificate',), report\n"
        "    await service.renewal._renewed()\n"
        "asyncio.run(main())\n"
        "assert 'cryptography' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(device)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
