"""A connected socket, TLS included, without blocking the event loop, and why there is none."""

import asyncio
import errno
import ipaddress
import socket
import ssl
from typing import Any

from covey_shared.mqtt.url import BrokerUrl

# What asyncio says of a failed connect is only that it failed.
_REASONS = {
    errno.EHOSTUNREACH: "no route to it",
    errno.ENETUNREACH: "the network is unreachable",
    errno.ENETDOWN: "the network is down",
    errno.ECONNRESET: "it reset the connection",
    errno.EMFILE: "too many open files, raise the limit with `ulimit -n`",
}


async def connect(url: BrokerUrl, tls: ssl.SSLContext | None) -> socket.socket:
    """A connected non-blocking socket. Tries every address of the host in turn.

    Raises OSError, for `explain`. Look-ups of names, and nothing else, run in the event loop's
    default executor.
    """
    loop = asyncio.get_running_loop()
    failure = OSError(errno.EADDRNOTAVAIL, "the host has no address")
    for family, address in await _addresses(url):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            # votes and acknowledgements are small, and waited for
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, address)
            return sock if tls is None else await _handshake(sock, tls, url.host)
        except ssl.SSLError:
            sock.close()
            raise
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure


def explain(error: OSError, url: BrokerUrl) -> str:
    """A failed `connect` in the operator's words, with what to do next."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"TLS: the certificate of {url.address} does not verify ({error.verify_message}); "
            "check the file of the authority, and the host's name"
        )
    if isinstance(error, ssl.SSLError):
        return (
            # `reason` is OpenSSL's own; an error that Python makes has none
            f"TLS: the handshake with {url.address} failed "
            f"({getattr(error, 'reason', None) or error.strerror}); "
            "is this its TLS port?"
        )
    if isinstance(error, socket.gaierror):
        return (
            f"cannot look up the host {url.host} ({error.strerror}); "
            "check its name, and this machine's network"
        )
    if isinstance(error, ConnectionRefusedError):
        return f"no broker at {url.address}: connection refused; is it running?"
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return f"cannot reach {url.address}: {reason}"


async def _addresses(url: BrokerUrl) -> list[tuple[socket.AddressFamily, Any]]:
    try:
        version = ipaddress.ip_address(url.host).version
    except ValueError:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
        return [(family, address) for family, _, _, _, address in found]
    # an address needs no look-up, which would wait for a free thread
    return [(socket.AF_INET6 if version == 6 else socket.AF_INET, (url.host, url.port))]


async def _handshake(sock: socket.socket, tls: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    loop = asyncio.get_running_loop()
    secure = tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            ready: asyncio.Future[None] = loop.create_future()
            try:
                secure.do_handshake()
                return secure
            except ssl.SSLWantReadError:
                loop.add_reader(secure, _set_once, ready)
                remove = loop.remove_reader
            except ssl.SSLWantWriteError:
                loop.add_writer(secure, _set_once, ready)
                remove = loop.remove_writer
            try:
                await ready
            finally:
                remove(secure)
    except ConnectionError as error:
        secure.close()
        raise ssl.SSLError(ssl.SSL_ERROR_EOF, "the other side closed the connection") from error
    except BaseException:
        secure.close()
        raise


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
