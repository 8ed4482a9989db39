"""The enrolment port, over real TLS connections: whom it talks to, and what it puts up with."""

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from covey_coordinator import pki
from covey_coordinator.enrolment import EnrolmentListener
from covey_coordinator.enrolment import listener as listener_module
from covey_shared import wire
from covey_shared.enrolment import (
    MAX_FRAME_BYTES,
    Enrolled,
    EnrolRefused,
    FleetTrust,
    fingerprint,
    frame,
)
from covey_shared.errors import TransportError
from enrolling import Applicant, Bench, Client, new_csr, who_is_there


@contextlib.asynccontextmanager
async def opened(bench: Bench, path: Path, **settings: float) -> AsyncIterator[Client]:
    """The port of a bench, and somebody who can talk to it. Certificates are checked against the real
    clock, which the bench's is set to."""
    listener = EnrolmentListener(
        bench.desk, bench.fleet.tls.server_context, port=0, host="127.0.0.1",
        unix=lambda: bench.now, **settings,
    )  # fmt: skip
    async with listener:
        yield Client(listener.port, path, bench.fleet)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path / "fleet", now=int(time.time()))
    made.now = int(time.time())
    return made


async def join(bench: Bench, client: Client, name: str, applicant: Applicant) -> Path:
    """The whole way in over the network -> the file with key and certificate."""
    token = bench.token(name)
    trust = await client.ask(who_is_there(token), trusting=False)
    assert isinstance(trust, FleetTrust)
    assert trust.tls_ca == bench.fleet.tls.authority.der
    enrolled = await client.ask(applicant.asks(token))
    assert isinstance(enrolled, Enrolled)
    applicant.enrolled = enrolled
    return applicant.pair(client.directory)


async def refused_by_tls(client: Client, request: bytes, pair: Path) -> bool:
    """With TLS 1.3 a client hears of it when it reads."""
    try:
        await client.ask(request, pair)
    except (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
        return True
    return False


def test_a_device_joins_and_renews(bench: Bench, tmp_path: Path):
    async def main() -> None:
        async with opened(bench, tmp_path) as client:
            pi = Applicant(1)
            pair = await join(bench, client, "pi-1", pi)
            assert await client.ask(pi.renews("pi-1"), pair) == pi.enrolled
            answer = await client.ask(pi.renews("pi-1"))
            assert isinstance(answer, EnrolRefused)
            assert "over a connection with the device's certificate" in answer.reason

    asyncio.run(main())


def test_a_renewal_with_another_device_s_certificate(bench: Bench, tmp_path: Path):
    async def main() -> None:
        async with opened(bench, tmp_path) as client:
            pi, other = Applicant(1), Applicant(2)
            await join(bench, client, "pi-1", pi)
            theirs = await join(bench, client, "pi-2", other)
            for request in (pi.renews("pi-1"), other.renews("pi-1")):
                answer = await client.ask(request, theirs)
                assert isinstance(answer, EnrolRefused)
                assert answer.reason == "a renewal for pi-1 came with the certificate of pi-2"

    asyncio.run(main())


def test_a_revoked_device_is_refused_and_told(bench: Bench, tmp_path: Path):
    """At once, and whatever has become of the list that the broker reads."""

    async def main() -> None:
        async with opened(bench, tmp_path) as client:
            pi, other = Applicant(1), Applicant(2)
            pair = await join(bench, client, "pi-1", pi)
            theirs = await join(bench, client, "pi-2", other)
            bench.fleet.revoke("pi-1", bench.now)
            (bench.fleet.tls.path / "crl.pem").unlink()
            for request in (pi.renews("pi-1"), pi.renews("pi-1", b"")):
                answer = await client.ask(request, pair)
                assert isinstance(answer, EnrolRefused)
                assert answer.reason == "device pi-1 was revoked"
            assert isinstance(await client.ask(other.renews("pi-2"), theirs), Enrolled)

    asyncio.run(main())


def test_certificates_of_others_are_refused(bench: Bench, tmp_path: Path):
    """Of another authority of the same name; one that ended; a server's."""

    async def main() -> None:
        async with opened(bench, tmp_path) as client:
            pi = Applicant(1)
            await join(bench, client, "pi-1", pi)
            assert pi.enrolled is not None
            rogue = pki.make_authority("farm", bench.now)
            ours = bench.fleet.tls.authority
            for authority, days, issued in (
                (rogue, 90, bench.now),
                (ours, 1, bench.now - 3 * 86_400),
            ):
                pair = pki.client_pair(authority, "pi-1", days=days, now_unix=issued)
                path = tmp_path / "rogue.pem"
                path.write_bytes(pair.key + pair.certificate)
                assert await refused_by_tls(client, pi.renews("pi-1"), path)
            tls = bench.fleet.tls
            (tmp_path / "server.pem").write_bytes(tls.read("server.key") + tls.read("server.crt"))
            assert await refused_by_tls(client, pi.renews("pi-1"), tmp_path / "server.pem")

    asyncio.run(main())


def test_tls_1_2_is_the_oldest(bench: Bench, tmp_path: Path):
    """Older ones OpenSSL does not speak with its usual settings, which are not ours to rely on."""

    async def main() -> None:
        async with opened(bench, tmp_path) as client:
            context = client.context()
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            _, writer = await asyncio.open_connection("127.0.0.1", client.port, ssl=context)
            assert writer.get_extra_info("ssl_object").version() == "TLSv1.2"
            writer.close()

    for made in (bench.fleet.tls.server_context(), bench.fleet.tls.client_context()):
        assert made.minimum_version is ssl.TLSVersion.TLSv1_2
        assert made.verify_flags & ssl.VERIFY_X509_STRICT
    asyncio.run(main())


def test_a_man_in_the_middle_has_other_keys(bench: Bench, tmp_path: Path):
    """He can answer the first question, but not so that it fits the token; and what the device then
    connects to is vouched for by the authority in the right answer only."""

    async def main() -> None:
        middle = Bench(tmp_path / "middle", now=bench.now)
        async with opened(middle, tmp_path) as client:
            token = bench.token("pi-1")
            trust = await client.ask(who_is_there(token), trusting=False)
            assert isinstance(trust, FleetTrust)
            assert fingerprint(wire.body_of(trust)) != token.fingerprint
            victim = Client(client.port, tmp_path, bench.fleet)
            with pytest.raises(ssl.SSLCertVerificationError):
                await victim.ask(Applicant(1).asks(token))

    asyncio.run(main())


@pytest.mark.parametrize(
    "prefix",
    [b"\0\0\0\0", (MAX_FRAME_BYTES + 1).to_bytes(4, "big"), b"GET ", b"\xff\xff\xff\xff"],
)
def test_a_size_that_cannot_be_ends_the_talk(bench: Bench, tmp_path: Path, prefix: bytes):
    """Before anything of it is read."""

    async def main() -> None:
        async with opened(bench, tmp_path) as client:
            reader, writer = await client.connect()
            writer.write(prefix)
            answer = await client.read(reader)
            writer.close()
            assert isinstance(answer, EnrolRefused)
            assert "has 1 to 16384 bytes" in answer.reason

    asyncio.run(main())


@pytest.mark.parametrize("data", [b"", b"x", bytes(66), b"\x01\x42" + bytes(500)])
def test_garbage_in_a_frame_is_answered(bench: Bench, tmp_path: Path, data: bytes):
    async def main() -> None:
        async with opened(bench, tmp_path) as client:
            if data:
                assert isinstance(await client.ask(data), EnrolRefused)
            assert await alive(bench, client)

    asyncio.run(main())


async def alive(bench: Bench, client: Client) -> bool:
    question = who_is_there(bench.token("pi-9"))
    return isinstance(await client.ask(question, trusting=False), FleetTrust)


def test_who_speaks_no_tls_is_dropped(bench: Bench, tmp_path: Path):
    async def main() -> None:
        async with opened(bench, tmp_path) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            assert await alive(bench, client)

    asyncio.run(main())


@pytest.mark.parametrize("sent", [None, b"", b"\0", frame(bytes(100))[:50]])
def test_the_slow_are_cut_off(bench: Bench, tmp_path: Path, sent: bytes | None):
    """In the handshake (None), or at any point of the request."""

    async def main() -> None:
        async with opened(bench, tmp_path, limit_s=0.5) as client:
            if sent is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            else:
                reader, writer = await client.connect()
                writer.write(sent)
            async with asyncio.timeout(20):
                with contextlib.suppress(ConnectionError, ssl.SSLError):
                    assert await reader.read() == b""
            writer.close()

    asyncio.run(main())


def test_those_who_hold_connections_open_do_not_keep_others_out(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One address has a share of the connections; beyond it, it is sent away at once."""
    monkeypatch.setattr(listener_module, "MAX_PER_NETWORK", 3)

    async def main() -> None:
        async with opened(bench, tmp_path, limit_s=600) as client, asyncio.timeout(60):
            held = [await asyncio.open_connection("127.0.0.1", client.port) for _ in range(3)]
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""  # long before the time limit
            for _, other in (*held, (reader, writer)):
                other.close()
            while not await _tried(bench, client):
                await asyncio.sleep(0.02)

    asyncio.run(main())


async def _tried(bench: Bench, client: Client) -> bool:
    try:
        return await alive(bench, client)
    except (OSError, asyncio.IncompleteReadError):
        return False


def test_connections_beyond_the_limit_wait(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(listener_module, "MAX_CONNECTIONS", 2)

    async def main() -> None:
        async with opened(bench, tmp_path, limit_s=1.0) as client:
            held = [await asyncio.open_connection("127.0.0.1", client.port) for _ in range(2)]
            async with asyncio.timeout(30):
                assert await alive(bench, client)  # once the two were cut off
            for _, writer in held:
                writer.close()

    asyncio.run(main())


def test_a_crowd_joins(bench: Bench, tmp_path: Path):
    """A dozen at once, each gets its own."""

    async def main() -> None:
        async with opened(bench, tmp_path) as client:
            crowd = [Applicant(n) for n in range(1, 13)]
            tokens = [bench.token(f"pi-{a.seed}") for a in crowd]
            answers = await asyncio.gather(
                *(client.ask(a.asks(t)) for a, t in zip(crowd, tokens, strict=True))
            )
            assert [isinstance(answer, Enrolled) for answer in answers] == [True] * 12
            assert len(bench.fleet.devices()) == 12

    asyncio.run(main())


def test_a_bug_of_ours_costs_one_connection(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def main() -> None:
        async with opened(bench, tmp_path) as client:
            with monkeypatch.context() as patch:
                patch.setattr(bench.desk, "handle", lambda *_: 1 / 0)
                with pytest.raises(asyncio.IncompleteReadError):
                    await client.ask(b"x" * 70)
            assert await alive(bench, client)

    asyncio.run(main())
    assert "ZeroDivisionError" in caplog.text


def test_a_port_that_is_taken_is_named(bench: Bench):
    async def main(port: int) -> None:
        listener = EnrolmentListener(
            bench.desk, bench.fleet.tls.server_context, port=port, host="127.0.0.1"
        )
        with pytest.raises(
            TransportError, match=f"cannot listen for devices on port {port}: .*enrol"
        ):
            async with listener:
                pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        asyncio.run(main(taken.getsockname()[1]))


def test_it_listens_on_every_address(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """And IPv4 peers of an IPv6 socket go by their own address."""
    caplog.set_level(logging.WARNING)

    async def main() -> None:
        listener = EnrolmentListener(bench.desk, bench.fleet.tls.server_context, port=0)
        async with listener:
            client = Client(listener.port, tmp_path, bench.fleet)
            assert isinstance(await client.ask(b"x" * 70), EnrolRefused)

    asyncio.run(main())
    assert "refused at enrolment, 127.0.0.1: protocol version" in caplog.text


def test_a_new_server_certificate_is_shown_at_once(bench: Bench, tmp_path: Path):
    async def main() -> None:
        async with opened(bench, tmp_path) as client:
            pair = await join(bench, client, "pi-1", pi := Applicant(1))
            before = bench.fleet.tls.read("server.crt")
            done = bench.fleet.tls.refresh({"127.0.0.1"}, days=90, now_unix=bench.now)
            assert done == [
                "the broker's certificate is made anew: the fleet's hosts are now 127.0.0.1"
            ]
            assert bench.fleet.tls.read("server.crt") != before
            assert isinstance(await client.ask(pi.renews("pi-1", new_csr()[1]), pair), Enrolled)

    asyncio.run(main())
