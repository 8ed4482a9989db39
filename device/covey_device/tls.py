"""TLS as a device speaks it: one pinned authority, and a clock that may be wrong by decades.

A Raspberry Pi has no battery for its clock: until something sets it, it says 1970, or when it was
last switched off. So the *beginning* of a certificate's life is not judged here: "not yet valid" would
only say that this clock is behind, and a certificate of the pinned authority that lies in the future
gives nobody anything. Its *end* is judged, by the latest moment that must have passed: what the context's
clock says, or when the authority's own certificate began, whichever is later. For a device that joins, that
clock is its own: one that is far ahead refuses all, with a message that names it. A device that has joined
believes its clock only as far as the coordinator's signed time agrees (see `present`): a clock that is ahead
by a year keeps it from nothing, and one that is behind lets a broker's certificate live a little longer.
OpenSSL knows its own clock alone, so its test is switched off and replaced by this one, right
after each handshake and before anything is sent. Everything else is as strict as OpenSSL can be:
TLS 1.2 or later, the pinned authority and no other, the host's name, RFC 5280 to the letter.
"""

import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from covey_shared.config import unreadable
from covey_shared.errors import ConfigError

# X509_V_FLAG_NO_CHECK_TIME of <openssl/x509_vfy.h>, which the ssl module does not name.
_NO_CHECK_TIME = 0x200000


class PinnedContext(ssl.SSLContext):
    """A client's context that trusts the given authority; see `pinned`."""

    began_unix: float = 0.0
    """When the authority's certificate began: the present is later."""

    clock: Callable[[], float] = staticmethod(time.time)
    """Seconds since 1970 by this device, right or not."""


class _PinnedSocket(ssl.SSLSocket):
    """Judges the peer's certificate by the rule above as soon as it is known."""

    def do_handshake(self, block: bool = False) -> None:
        """As its base's. Raises SSLCertVerificationError for a certificate that has ended."""
        super().do_handshake(block)
        if isinstance(self.context, PinnedContext):
            now_unix = max(self.context.clock(), self.context.began_unix)
            check_end(self.getpeercert() or {}, now_unix)


def check_end(certificate: dict[str, Any], now_unix: float) -> None:
    """Raise SSLCertVerificationError if a certificate, as `getpeercert` shows it, has ended."""
    ends = certificate.get("notAfter")
    if ends is None or ssl.cert_time_to_seconds(ends) <= now_unix:
        error = ssl.SSLCertVerificationError(ssl.SSL_ERROR_SSL, "certificate verify failed")
        error.verify_code = 10  # X509_V_ERR_CERT_HAS_EXPIRED
        error.verify_message = (
            f"it ended on {ends}, and this device's clock says {in_words(now_unix)}"
        )
        raise error


def in_words(unix: float) -> str:
    """A moment for people, in UTC, by the minute."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix))


def pinned(authority: bytes | str, clock: Callable[[], float] = time.time) -> PinnedContext:
    """A client's context that trusts `authority` alone: DER in bytes or PEM in str.

    Raises ssl.SSLError or ValueError if that is no certificate.
    """
    context = PinnedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=authority)
    # An int, for the flags that the ssl module has no name for.
    flags = int(context.verify_flags) | int(ssl.VERIFY_X509_STRICT) | _NO_CHECK_TIME
    context.verify_flags = ssl.VerifyFlags(flags)
    known = context.get_ca_certs()
    if not known:
        raise ValueError("this certificate is not an authority's")
    context.clock = clock
    context.began_unix = max(ssl.cert_time_to_seconds(str(c["notBefore"])) for c in known)
    context.sslsocket_class = _PinnedSocket
    return context


def anybody() -> ssl.SSLContext:
    """A context that believes anyone: for the first question of all, whose answer proves itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def of_files(ca_file: Path, cert_file: Path, key_file: Path) -> PinnedContext:
    """A context from the files that device.toml names. Raises ConfigError that names the file."""
    try:
        context = pinned(ca_file.read_text(encoding="ascii"))
    except OSError as error:
        raise unreadable(f"broker.ca_file {ca_file}", error) from error
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"broker.ca_file {ca_file} is no authority's certificate in PEM"
        ) from error
    load_own(context, cert_file, key_file)
    return context


def load_own(context: ssl.SSLContext, cert_file: Path, key_file: Path) -> None:
    """What this device shows of itself in connections from now on. Raises ConfigError."""
    for key, path in (("cert_file", cert_file), ("key_file", key_file)):
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
        except OSError as error:
            raise unreadable(f"broker.{key} {path}", error) from error
    if mode & 0o077:
        raise ConfigError(
            f"broker.key_file {key_file} can be read by others (mode {mode:04o}); "
            f"run: chmod 600 {key_file}"
        )
    try:
        context.load_cert_chain(cert_file, key_file, password=lambda: "")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ConfigError(
            f"broker.cert_file {cert_file} and broker.key_file {key_file} are not a certificate and "
            "its private key in PEM; restore them, or enrol this device anew with `covey-device join`"
        ) from error
