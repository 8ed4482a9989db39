"""mosquitto as a child: where it is, and the configuration written for it.

Options are those that 2.0 and 2.1 share. Measured reasons for the values stand beside them.
"""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

from covey_coordinator.broker.access import Access
from covey_coordinator.broker.files import write_private
from covey_coordinator.files import write_atomic
from covey_shared.errors import ConfigError
from covey_shared.transport import MAX_PAYLOAD_BYTES

# Debian installs it to /usr/sbin, which is not on an ordinary user's PATH.
_MORE_PATH = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/sbin")

# Room for the topic and MQTT's own header; equals the limit of AWS IoT.
MAX_PACKET_BYTES = MAX_PAYLOAD_BYTES + 8 * 1024

# What any broker of ours has in common.
_SHARED = (
    "# A client that ignores the limit is disconnected; ours never sends such a packet.",
    f"max_packet_size {MAX_PACKET_BYTES}",
    "# Per client. What overflows is dropped without a word, and asked for again by digest.",
    "# A message counts for each client, and takes memory once for all that wait for it.",
    "max_inflight_messages 20",
    "max_queued_messages 1000",
    "max_queued_bytes 67108864",
    "# What waits for a device that is away. After five minutes it does not want it any more.",
    "persistent_client_expiration 1h",
    "# Votes and acknowledgements are small, and waited for.",
    "set_tcp_nodelay true",
    "# A crash loses the retained messages since the last save; the default is half an hour.",
    "persistence true",
    "autosave_interval 30",
)


def find(program: str = "mosquitto") -> Path | None:
    """The program's path, or None."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_MORE_PATH))
    found = shutil.which(program, path=path)
    return Path(found) if found else None


def prepare(directory: Path, host: str, port: int, users: dict[str, str]) -> tuple[list[str], str]:
    """Write passwords and configuration -> the command that runs it, and its version."""
    program = find()
    if program is None:
        raise ConfigError("mosquitto is not installed: `apt install mosquitto`")
    version = _version(program)
    passwords = directory / "passwords"
    write_private(passwords, "".join(f"{name}:{password}\n" for name, password in users.items()))
    _hash(passwords)
    configuration = directory / "mosquitto.conf"
    write_private(configuration, _configuration(directory, host, port, passwords))
    return [str(program), "-c", str(configuration)], version


def prepare_networked(
    directory: Path, host: str | None, port: int, access: Access
) -> tuple[list[str], str]:
    """Write a networked fleet's configuration and all it names -> the command, and the version."""
    program = find()
    if program is None:
        raise ConfigError("a networked fleet needs mosquitto: `apt install mosquitto`")
    version = _version(program)
    for name, content in access.files().items():
        write_atomic(directory / name, content, mode=0o600, durable=False)
    configuration = directory / "mosquitto.conf"
    text = networked_configuration(directory, port, access.connections, host=host)
    write_private(configuration, text + "\n".join(_child_lines(directory)) + "\n")
    return [str(program), "-c", str(configuration)], version


def networked_configuration(
    directory: Path, port: int, connections: int, *, host: str | None = None
) -> str:
    """mosquitto.conf of a networked fleet, without where it logs and what it persists to.

    directory: where the files of `Access.files` are, to mosquitto. host: None listens on all
    addresses, IPv4 and IPv6. connections: most at once.
    """
    _check_directory(directory)
    lines = [
        "# Made by covey, and made anew: changes here are lost.",
        f"listener {port}" if host is None else f"listener {port} {host}",
        "",
        "# Nobody without a certificate of the fleet's broker authority that is not revoked, and",
        "# everybody under the name in it, which is user name and client id at once: nobody can",
        "# pass for another, or throw another off by taking its client id.",
        "tls_version tlsv1.2",
        f"cafile {directory}/ca.crt",
        f"certfile {directory}/server.crt",
        f"keyfile {directory}/server.key",
        f"crlfile {directory}/crl.pem",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        f"acl_file {directory}/covey.acl",
        "",
        "# Strangers' handshakes count as well. mosquitto 2.0 counts a client that connects again as",
        "# one less: the limit of open files is what holds.",
        f"max_connections {connections}",
        "# Only of clients that speak MQTT 5; it is the longest that a device's configuration allows.",
        "max_keepalive 3600",
        "# Who else is here is nobody's business.",
        "sys_interval 0",
        "",
        *_SHARED,
    ]
    return "\n".join(lines) + "\n"


def _configuration(directory: Path, host: str, port: int, passwords: Path) -> str:
    _check_directory(directory)
    lines = [
        "# Written anew at every start: changes here are lost.",
        f"listener {port} {host}",
        "allow_anonymous false",
        f"password_file {passwords}",
        *_SHARED,
        *_child_lines(directory),
    ]
    return "\n".join(lines) + "\n"


def _child_lines(directory: Path) -> list[str]:
    lines = [
        f"persistence_location {directory}/",
        "log_dest stderr",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
        *(f"log_type {kind}" for kind in ("error", "warning", "notice", "information")),
    ]
    if os.geteuid() == 0:
        # As root it would become another user, who could not read this private directory.
        lines.append(f"user {pwd.getpwuid(0).pw_name}")
    return lines


def _check_directory(directory: Path) -> None:
    if "\n" in str(directory):
        raise ConfigError(f"broker directory {str(directory)!r}: a line break in its name")


def _hash(passwords: Path) -> None:
    """Replace the plain passwords in the file by hashes."""
    program = find("mosquitto_passwd")
    if program is None:
        raise ConfigError("mosquitto_passwd is not installed beside mosquitto: install it too")
    done = subprocess.run(
        [program, "-U", passwords], capture_output=True, text=True, check=False, umask=0o077
    )
    if done.returncode != 0:
        passwords.unlink(missing_ok=True)
        raise ConfigError(
            f"{program} cannot hash passwords: {(done.stderr or done.stdout).strip()}"
        )
    passwords.chmod(0o600)


def _version(program: Path) -> str:
    done = subprocess.run([program, "-h"], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    return words[2] if words[:2] == ["mosquitto", "version"] else "unknown"
