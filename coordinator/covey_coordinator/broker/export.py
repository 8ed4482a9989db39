"""A networked fleet's broker configuration, for a mosquitto on another machine."""

from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from covey_coordinator import pki
from covey_coordinator.broker.files import private_directory
from covey_coordinator.broker.mosquitto import networked_configuration
from covey_coordinator.config import FleetConfig, normal_host
from covey_coordinator.files import storage_error, write_atomic
from covey_coordinator.fleet import FleetDirectory
from covey_coordinator.kept_broker import access_of
from covey_shared.errors import ConfigError, MalformedError
from covey_shared.mqtt import parse_broker_url

_REST = """
# Where Debian's mosquitto keeps what it retains; its log goes to the journal.
persistence_location /var/lib/mosquitto/
log_dest stderr
log_timestamp_format %Y-%m-%dT%H:%M:%S
"""


@dataclass(frozen=True, slots=True)
class Written:
    """names: of the files beside mosquitto.conf. ends_unix: when the broker's certificate ends."""

    names: tuple[str, ...]
    ends_unix: int
    revoked: tuple[str, ...]


def write_configuration(
    fleet: FleetDirectory,
    config: FleetConfig,
    directory: Path,
    installed: Path,
    *,
    days: int,
    now_unix: int,
) -> Written:
    """Write mosquitto.conf and the files that it names.

    An external broker gets a key and certificate of its own, for the host in `broker.url`: they are
    made in `directory`, and made anew when they are due. installed: where the files will be. Raises
    ConfigError, StorageError.
    """
    if not config.networked:
        raise ConfigError(
            "this fleet is local: its broker is on this machine alone. For devices elsewhere make one "
            "with `covey init --address HOST`"
        )
    if not installed.is_absolute():
        raise ConfigError(f"--install-dir {installed}: give the whole path, from / on")
    port = config.broker_port
    fleet.refresh_tls(config, now_unix)  # it may be what covey up would have done
    with fleet.book.held():
        access = access_of(fleet, config)
    if config.broker.url is not None:
        url = parse_broker_url(config.broker.url)
        port = url.port
        pair = _pair_for(fleet, directory, normal_host(url.host), days, now_unix)
        access = replace(access, certificate=pair.certificate, key=pair.key)
    access.check()
    text = networked_configuration(installed, port, access.connections) + _REST
    try:
        private_directory(directory)
    except OSError as error:
        raise storage_error("make", directory, error) from error
    for name, content in access.files().items():
        write_atomic(directory / name, content, mode=0o600)
    write_atomic(directory / "mosquitto.conf", text.encode(), mode=0o600)
    certificate = pki.load_certificate(directory / "server.crt")
    return Written(tuple(access.files()), pki.read_leaf(certificate).not_after_unix, access.revoked)


def _pair_for(
    fleet: FleetDirectory, directory: Path, host: str, days: int, now_unix: int
) -> pki.Pair:
    """The broker's pair as it was written before, if it still serves; otherwise a new one."""
    authority = fleet.tls.authority
    try:
        pair = pki.Pair(
            (directory / "server.crt").read_bytes(), (directory / "server.key").read_bytes()
        )
        certificate = x509.load_pem_x509_certificate(pair.certificate)
        key = serialization.load_pem_private_key(pair.key, password=None)
        leaf = pki.read_leaf(certificate)
    except (OSError, ValueError, TypeError, MalformedError):
        leaf = None
    if (
        leaf is None
        or leaf.due(now_unix)
        or leaf.hosts != {host}
        or key.public_key() != certificate.public_key()
        or certificate.issuer != authority.certificate.subject
    ):
        return pki.server_certificate(authority, [host], days=days, now_unix=now_unix)
    return pair
