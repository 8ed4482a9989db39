"""Where a broker is: mqtt:// and mqtts:// URLs <-> their parts."""

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from covey_shared.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """Where a broker is and who we are to it. Neither str() nor repr() shows the password."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """host:port, for messages."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.address}"


def parse_broker_url(url: str) -> BrokerUrl:
    """mqtt://[user[:password]@]host[:port] or mqtts://... -> its parts.

    Ports default to 1883 and 8883; user and password may be percent-encoded. Raises ConfigError
    naming the part that is wrong, never the password.
    """
    # urlsplit would drop some of these without a word
    if any(character.isspace() or not character.isprintable() for character in url):
        raise ConfigError("broker URL: a space or control character; percent-encode it")
    scheme, separator, rest = url.partition("://")
    shown = f"{scheme}{separator}...@{rest.rpartition('@')[2]}" if "@" in rest else url
    if separator == "" or scheme not in ("mqtt", "mqtts"):
        # without the scheme's separator, what stands there may be a password
        shown = shown if separator else "..."
        raise ConfigError(f"broker URL {shown}: it starts with mqtt:// or, for TLS, mqtts://")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        username = unquote(parts.username, errors="strict") if parts.username else None
        password = unquote(parts.password, errors="strict") if parts.password else None
    except UnicodeDecodeError as error:
        raise ConfigError(f"broker URL {shown}: user or password is not UTF-8") from error
    except ValueError as error:
        raise ConfigError(
            f"broker URL {shown}: host or port is not valid; a port is a number up to 65535, "
            "an IPv6 address stands in [brackets], and / ? # in a password are percent-encoded"
        ) from error
    if not host:
        raise ConfigError(f"broker URL {shown}: the host is missing, as in mqtt://HOST:1883")
    if port == 0:
        raise ConfigError(f"broker URL {shown}: port 0 cannot be connected to")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(f"broker URL {shown}: nothing follows the port")
    if password is not None and username is None:
        raise ConfigError(f"broker URL {shown}: a password without a user")
    tls = scheme == "mqtts"
    return BrokerUrl(host, port or (8883 if tls else 1883), tls, username, password)
