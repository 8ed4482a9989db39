"""`covey-device`: the device owner's command line."""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import click

from covey_shared import __version__
from covey_shared.errors import ConfigError, CoveyError

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("/etc/covey/device.toml"),
    show_default=True,
    help="The device's configuration.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="covey-device")
def cli() -> None:
    """A device of a fleet: trains on its own data, and lets only sums be learned."""


@cli.command()
@config_option
@click.option("-v", "--verbose", is_flag=True, help="Log every message that is refused.")
def run(config_path: Path, verbose: bool) -> None:
    """Serve until stopped: check in to rounds, train, send masked updates."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    asyncio.run(_serve(config_path))


@cli.command()
@config_option
def check(config_path: Path) -> None:
    """Check the configuration, the keys, the certificate and the state, without connecting."""
    from covey_device.assembly import load_device

    parts = load_device(config_path)
    click.echo(f"device {parts.config.device} of fleet {parts.config.fleet}")
    click.echo(f"broker {parts.config.broker.url}")
    click.echo(f"last round {parts.memory.load().last_round}")
    click.echo("configuration, identity, certificate and state are sound")


async def _serve(config_path: Path) -> None:
    from covey_device.footprint import keep_small

    keep_small()
    from covey_device.assembly import assemble, load_device

    service = assemble(load_device(config_path))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await service.run(stop)


def main() -> None:
    """The entry point: errors of ours are one line and exit status 1."""
    os.umask(0o077)
    try:
        cli()
    except ConfigError as error:
        click.echo(f"covey-device: {error}", err=True)
        sys.exit(1)
    except CoveyError as error:
        click.echo(f"covey-device: {error}", err=True)
        sys.exit(1)
