"""The broker and the enrolment port: name, connection, TLS, login.

A broker knows a device by one name, and a second login by that name ends the first one's connection. So
nobody logs in here while the service runs, nor when that cannot be found out: then the TLS handshake, with
the device's own certificate, is as far as it goes, and of the service's own connection it is said whether it
stands. Nothing is subscribed to, nothing published, and no will is left behind.
"""

import asyncio
import contextlib
import re
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from covey_device.doctor.enrolled import AS_ROOT, Enrolled
from covey_device.doctor.findings import Finding, combined
from covey_device.doctor.machine import Machine
from covey_device.doctor.unit import Running
from covey_device.present import Present
from covey_shared.errors import ConfigError, TransportError
from covey_shared.mqtt import BrokerUrl, parse_broker_url
from covey_shared.mqtt.connection import Connection, Settings
from covey_shared.mqtt.sockets import connect, explain

ANSWER_S = 15.0
"""For a name, a connection and TLS; and again for a login."""

REFUSAL_S = 1.0
"""In TLS 1.3 a server refuses a certificate only after the handshake; it does so at once."""


def service_runs(machine: Machine, state: Path) -> tuple[Running, int | None]:
    """Whether a process holds the state directory, by the kernel's list of locks: asking for the lock itself
    could keep a service from starting. -> and its number."""
    try:
        status = (state / "lock").stat()
    except FileNotFoundError:
        return "stopped", None
    except OSError:
        return "unknown", None
    table = machine.text("proc/locks")
    if table is None:
        return "unknown", None
    for line in table.splitlines():
        found = re.match(r"\d+: FLOCK\s+\S+\s+WRITE (-?\d+) [0-9a-f]+:[0-9a-f]+:(\d+) ", line)
        # By its number alone: what lies over other file systems shows another device here.
        if found is not None and int(found[2]) == status.st_ino:
            return "running", int(found[1])
    return "stopped", None


def service_is_connected(pid: int | None, port: int) -> bool | None:
    """Whether that process has a connection to the port; None if it cannot be found out."""
    import psutil

    if pid is None or pid <= 0:
        return None
    try:
        process = psutil.Process(pid)
        look = getattr(process, "net_connections", None) or process.connections
        found = look(kind="tcp")
    except (psutil.Error, OSError):
        return None
    return any(
        c.status == psutil.CONN_ESTABLISHED and c.raddr and c.raddr.port == port for c in found
    )


def broker(
    enrolled: Enrolled,
    running: tuple[Running, int | None],
    *,
    connected: Callable[[int | None, int], bool | None] = service_is_connected,
    answer_s: float = ANSWER_S,
) -> Finding:
    """Whether this device gets as far as its broker, and is let in."""
    from covey_device.assembly import password_of, tls_of

    check, table, base = "broker", enrolled.config.broker, enrolled.base
    try:
        url = parse_broker_url(table.url)
        context = tls_of(table, base)
        password = None if table.password_file is None else password_of(base / table.password_file)
    except ConfigError as error:
        fix = "see the lines `keys` and `certificates`, or run it as root"
        return Finding(check, "unknown", f"not tried: {error}", fix)
    context = _timed(context, enrolled, url.tls)
    config = enrolled.config
    settings = Settings(
        url=url,
        # A broker that knows its clients by certificates makes their names the client ids anyway.
        client_id=config.device if table.cert_file else f"{config.fleet}-{config.device}-doctor",
        username=table.username if table.username is not None else url.username,
        password=password if password is not None else url.password,
        tls=context,
        will=None,
        keepalive_s=table.keepalive_s,
        clean_session=True,
        timeout_s=answer_s,
    )
    try:
        reached = asyncio.run(_reach(url, context, answer_s, wait_for_refusal=True))
    except TransportError as error:
        fix = "bring the network and the broker up, or correct broker.url in device.toml"
        return Finding(check, "problem", str(error), fix)
    said = Finding(check, "ok", reached)
    state, pid = running
    if state == "running":
        stands = connected(pid, url.port)
        if stands is None:
            return combined(
                check,
                [
                    said,
                    Finding(check, "unknown", "whether the running service is connected", AS_ROOT),
                ],
            )
        if not stands:
            fix = "look into its log: journalctl -u covey-device -n 50"
            return combined(
                check,
                [said, Finding(check, "problem", "the running service is not connected", fix)],
            )
        return Finding(check, "ok", f"{reached}; the running service is connected")
    if state == "unknown":
        left = Finding(check, "unknown", "no login, as the service may be running", AS_ROOT)
        return combined(check, [said, left])
    try:
        asyncio.run(_log_in(settings))
    except TransportError as error:
        fix = "ask the operator whether this device is known there, and was not revoked"
        return Finding(check, "problem", str(error), fix)
    return Finding(check, "ok", f"{reached}; it lets this device in")


def enrolment_port(enrolled: Enrolled, *, answer_s: float = ANSWER_S) -> Finding | None:
    """Where certificates are renewed; None for a device without such a place. Nothing is asked there."""
    from covey_device.assembly import tls_of

    check, table = "enrolment-port", enrolled.config.enrol
    if table is None:
        return None
    try:
        context = _timed(tls_of(enrolled.config.broker, enrolled.base), enrolled, True)
    except ConfigError as error:
        fix = "see the lines `keys` and `certificates`, or run it as root"
        return Finding(check, "unknown", f"not tried: {error}", fix)
    url = BrokerUrl(table.host, table.port, tls=True)
    try:
        reached = asyncio.run(_reach(url, context, answer_s, wait_for_refusal=False))
    except TransportError as error:
        says = str(error).replace("no broker at", "nobody at")
        fix = "until it answers, certificates cannot be renewed: have the operator look after `covey up`"
        return Finding(check, "note", says, fix)
    return Finding(check, "ok", reached)


def _timed(context: ssl.SSLContext | None, enrolled: Enrolled, tls: bool) -> ssl.SSLContext | None:
    """With the clock that the service would judge certificates by."""
    from covey_device.tls import PinnedContext

    if context is None:
        return ssl.create_default_context() if tls else None
    if isinstance(context, PinnedContext):
        present = Present(enrolled.signed_unix)
        context.clock = lambda: present.surely_unix
    return context


async def _reach(
    url: BrokerUrl, context: ssl.SSLContext | None, answer_s: float, *, wait_for_refusal: bool
) -> str:
    """Connect, and go -> what was seen. Raises TransportError, which says what to do."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(answer_s):
            sock = await connect(url, context)
    except TimeoutError as error:
        raise TransportError(
            f"no answer from {url.address} within {answer_s:g} s; is this the right address and port, "
            "and no firewall in between?"
        ) from error
    except OSError as error:
        raise TransportError(explain(error, url)) from error
    took_ms = (time.monotonic() - began) * 1000
    with contextlib.closing(sock):
        where = url.address
        with contextlib.suppress(OSError):  # a refusal may have closed it already
            peer = sock.getpeername()[0]
            where = where if peer == url.host else f"{where} ({peer})"
        if not isinstance(sock, ssl.SSLSocket):
            return f"{where}: connected in {took_ms:.0f} ms, without TLS"
        if wait_for_refusal:
            await _no_refusal(sock, url)
        return f"{where}: {sock.version()} in {took_ms:.0f} ms"


async def _no_refusal(sock: ssl.SSLSocket, url: BrokerUrl) -> None:
    """Return if the other side does not end the connection soon. Raises TransportError."""
    ends = time.monotonic() + REFUSAL_S
    while time.monotonic() < ends:
        try:
            data = sock.recv(1)
        except (ssl.SSLWantReadError, BlockingIOError):
            await asyncio.sleep(0.02)
            continue
        except OSError as error:
            reason = getattr(error, "reason", None) or error.strerror
            raise TransportError(
                f"TLS: {url.address} refuses this device's certificate ({reason}); ask the operator "
                "whether it was revoked"
            ) from error
        if not data:
            raise TransportError(
                f"{url.address} closed the connection right after TLS; does it want another certificate?"
            )
        return


async def _log_in(settings: Settings) -> None:
    connection = Connection(settings, lambda incoming: None)
    try:
        await connection.open()
    finally:
        await connection.close(graceful=True)
