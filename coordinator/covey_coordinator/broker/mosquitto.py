"""mosquitto as a child: where it is, and the configuration written for it.

Options are those that 2.0 and 2.1 share. Measured reasons for the values stand beside them.
"""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

from covey_coordinator.broker.files import write_private
from covey_shared.errors import ConfigError
from covey_shared.transport import MAX_PAYLOAD_BYTES

# Debian installs it to /usr/sbin, which is not on an ordinary user's PATH.
_MORE_PATH = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/sbin")

# Room for the topic and MQTT's own header; equals the limit of AWS IoT.
MAX_PACKET_BYTES = MAX_PAYLOAD_BYTES + 8 * 1024


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


def _configuration(directory: Path, host: str, port: int, passwords: Path) -> str:
    if "\n" in str(directory):
        raise ConfigError(f"broker directory {str(directory)!r}: a line break in its name")
    lines = [
        "# Written anew at every start: changes here are lost.",
        f"listener {port} {host}",
        "allow_anonymous false",
        f"password_file {passwords}",
        # A client that ignores the limit is disconnected; ours never sends such a packet.
        f"max_packet_size {MAX_PACKET_BYTES}",
        "max_inflight_messages 20",
        # Per client; what overflows is dropped without a word, and asked for again by digest.
        "max_queued_messages 1000",
        "set_tcp_nodelay true",
        "persistence true",
        f"persistence_location {directory}/",
        # kill -9 loses the retained messages since the last save; the default is half an hour.
        "autosave_interval 30",
        "log_dest stderr",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
        *(f"log_type {kind}" for kind in ("error", "warning", "notice", "information")),
    ]
    if os.geteuid() == 0:
        # As root it would become another user, who could not read this private directory.
        lines.append(f"user {pwd.getpwuid(0).pw_name}")
    return "\n".join(lines) + "\n"


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
