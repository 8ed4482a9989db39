"""The enrolment port: TLS connections of one frame in and one frame out, in front of the desk.

Everybody may connect, so everything is bounded before it is believed: connections at once, altogether
and from one address, the time that one may take, the handshake included, and the size of a request.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable

from covey_coordinator import pki
from covey_coordinator.enrolment.desk import EnrolmentDesk, Peer, network_of
from covey_shared.enrolment import frame, frame_size
from covey_shared.errors import CoveyError, MalformedError, TransportError

log = logging.getLogger("covey.enrolment")

MAX_CONNECTIONS = 64
MAX_PER_NETWORK = 16
LIMIT_S = 10.0
_BACKLOG = 128
_RETRY_ACCEPT_S = 0.5


class EnrolmentListener:
    """desk: decides, in a thread, one request at a time. context: makes the TLS settings anew for each
    connection, so that what was revoked a moment ago counts. host: None for all addresses.

    limit_s: the longest that one connection may last. unix: seconds since 1970.
    """

    def __init__(
        self,
        desk: EnrolmentDesk,
        context: Callable[[], ssl.SSLContext],
        *,
        port: int,
        host: str | None = None,
        limit_s: float = LIMIT_S,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self._desk = desk
        self._context = context
        self._host, self._wanted_port = host, port
        self._limit_s = limit_s
        self._unix = unix
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._networks: Counter[str] = Counter()
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._one = asyncio.Lock()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._socket is not None  # noqa: S101
        return int(self._socket.getsockname()[1])

    async def __aenter__(self) -> "EnrolmentListener":
        """Listen. Raises ConfigError for damaged certificates, TransportError for a port that is taken."""
        self._context()
        try:
            self._socket = _listen(self._host, self._wanted_port)
        except OSError as error:
            raise TransportError(
                f"cannot listen for devices on port {self._wanted_port}: {error.strerror}; stop what "
                "listens there (`ss -tlnp` names it), or set `enrol.port` to another"
            ) from error
        self._accepting = asyncio.create_task(self._accept(self._socket))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop; whoever is being answered is cut off, and will ask again."""
        tasks = [t for t in (self._accepting, *self._serving) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Beyond the limit newcomers wait in the system's queue.
            await self._room.acquire()
            try:
                connection, address = await loop.sock_accept(listening)
            except OSError as error:  # out of files, or the peer has gone already
                self._room.release()
                log.warning("cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(_RETRY_ACCEPT_S)
                continue
            except BaseException:
                self._room.release()
                raise
            task = asyncio.create_task(self._connection(connection, str(address[0])))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _connection(self, connection: socket.socket, address: str) -> None:
        address = address.removeprefix("::ffff:")  # an IPv4 peer of an IPv6 socket
        network = network_of(address)
        self._networks[network] += 1
        try:
            if self._networks[network] > MAX_PER_NETWORK:
                log.warning("too many connections from %s at once", address)
                connection.close()
                return
            async with asyncio.timeout(self._limit_s):
                await self._serve(connection, address)
        except TimeoutError:
            log.warning("%s did not say anything sensible in %g s", address, self._limit_s)
        except ssl.SSLError as error:
            # A device whose certificate has ended comes no further either.
            log.warning("no TLS with %s: %s", address, error.reason or "it ended")
        except (OSError, asyncio.IncompleteReadError) as error:
            log.info("%s went away: %s", address, error)
        except CoveyError as error:
            log.error("enrolment cannot go on: %s", error)
        except Exception:
            # A bug of ours, which a stranger must not be able to use against the fleet.
            log.exception("a request of %s failed", address)
        finally:
            self._networks[network] -= 1
            if not self._networks[network]:
                del self._networks[network]
            self._room.release()

    async def _serve(self, connection: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            context = self._context()
        except CoveyError:
            connection.close()
            raise
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            connection,
            ssl=context,
            ssl_handshake_timeout=self._limit_s,
            ssl_shutdown_timeout=1,
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            peer = _peer(transport.get_extra_info("ssl_object"), address)
            try:
                request = await reader.readexactly(frame_size(await reader.readexactly(4)))
            except MalformedError as error:
                log.warning("refused at enrolment, %s: %s", address, error)
                answer = self._desk.refusal(str(error))
            else:
                async with self._one:
                    answer = await asyncio.to_thread(
                        self._desk.handle, request, peer, int(self._unix())
                    )
            writer.write(frame(answer))
            await writer.drain()
            writer.close()
            with contextlib.suppress(ssl.SSLError, OSError):
                await writer.wait_closed()
        finally:
            transport.abort()


def _listen(host: str | None, port: int) -> socket.socket:
    if host is not None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    elif socket.has_dualstack_ipv6():
        listening = socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
        )
    else:
        listening = socket.create_server(("", port), backlog=_BACKLOG)
    listening.setblocking(False)
    return listening


def _peer(tls: ssl.SSLObject, address: str) -> Peer:
    """Who is there: what OpenSSL verified of the client's certificate, if it showed one."""
    der = tls.getpeercert(binary_form=True)
    if der is None:
        return Peer(address)
    leaf = pki.read_leaf(der)
    return Peer(address, leaf.name, leaf.serial)
