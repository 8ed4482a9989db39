"""The embedded broker: amqtt, in a process of its own. The only module that imports it.

Pure Python and MQTT 3.1.1: good for a first run on one machine. It forgets retained messages when
it ends, and puts no limit on a packet's size, so it is for clients that we started ourselves.
"""

import asyncio
import importlib.metadata
import importlib.util
import logging
import signal
from pathlib import Path

import msgspec

from covey_coordinator.broker.files import write_private


class _Configuration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: str
    port: int
    password_file: str


def available() -> bool:
    """Whether amqtt is installed."""
    return importlib.util.find_spec("amqtt") is not None


def prepare(directory: Path, host: str, port: int, users: dict[str, str]) -> tuple[list[str], str]:
    """Write password hashes and configuration -> the command (for `__main__`) and the version."""
    from pwdlib.hashers.argon2 import Argon2Hasher

    # Its default of 64 MiB and three passes takes 160 ms per login, during which amqtt serves
    # nobody: half a minute for a fleet of 200. Generated passwords do not need it.
    hasher = Argon2Hasher(time_cost=1, memory_cost=1024, parallelism=1)
    passwords = directory / "passwords"
    write_private(
        passwords,
        "".join(f"{name}:{hasher.hash(password)}\n" for name, password in users.items()),
    )
    configuration = directory / "embedded.json"
    write_private(
        configuration,
        msgspec.json.encode(_Configuration(host, port, str(passwords))).decode(),
    )
    return ["embedded", str(configuration)], importlib.metadata.version("amqtt")


def main(configuration: Path) -> None:
    """Run the broker until a signal ends it. Raises what amqtt raises if it cannot start."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s: %(levelname)s: %(message)s")
    asyncio.run(_serve(msgspec.json.decode(configuration.read_bytes(), type=_Configuration)))


async def _serve(configuration: _Configuration) -> None:
    from amqtt.broker import Broker

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    broker = Broker(
        {
            "listeners": {
                "default": {
                    "type": "tcp",
                    "bind": f"{configuration.host}:{configuration.port}",
                    "max_connections": 0,
                }
            },
            "plugins": {
                "amqtt.plugins.authentication.FileAuthPlugin": {
                    "password_file": configuration.password_file
                }
            },
        }
    )
    await broker.start()
    # No shutdown: there is nothing to save, and clients that stay connected would hold it up.
    await ended.wait()
