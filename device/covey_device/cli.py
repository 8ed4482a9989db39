"""`covey-device`: the device owner's command line."""

import asyncio
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import click

from covey_shared import __version__
from covey_shared.errors import ConfigError, CoveyError

log = logging.getLogger("covey.device")

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("/etc/covey/device.toml"),
    show_default=True,
    help="The device's configuration.",
)


class Commands(click.Group):
    """Errors end in one line on stderr and exit status 1, never in a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except CoveyError as error:
            click.echo(f"covey-device: {error}", err=True)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if os.environ.get("COVEY_DEBUG"):
                raise
            click.echo(
                f"covey-device: unexpected {type(error).__name__}: {error}. This is a bug in covey; "
                "with COVEY_DEBUG=1 in the environment it shows where",
                err=True,
            )
        raise click.exceptions.Exit(1)


@click.group("covey-device", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="covey-device")
def main() -> None:
    """A device of a fleet: trains on its own data, and lets only sums be learned."""
    os.umask(0o077)


@main.command(short_help="Serve until stopped.")
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


@main.command(short_help="Check the configuration and what it names.")
@config_option
def check(config_path: Path) -> None:
    """Check the configuration, the keys, the certificate, the state and the data files, without
    connecting."""
    from covey_device.assembly import concerns, load_device
    from covey_shared.mqtt import parse_broker_url

    parts = load_device(config_path)
    click.echo(f"device {parts.config.device} of fleet {parts.config.fleet}")
    click.echo(f"broker: {parse_broker_url(parts.config.broker.url)}")
    click.echo(f"last round: {parts.memory.load().last_round}")
    click.echo(f"policy: {parts.policy.path if parts.policy.path.exists() else 'the defaults'}")
    for line in parts.policy.current.in_words():
        click.echo(f"  {line}")
    if found := concerns(parts, time.time()):
        raise ConfigError("; ".join(found))
    click.echo("configuration, identity, certificate, state and data files are there and sound")


async def _serve(config_path: Path) -> None:
    from covey_device.footprint import keep_small

    keep_small()
    from covey_device.assembly import assemble, concerns, load_device
    from covey_shared.mqtt import parse_broker_url

    parts = load_device(config_path)
    with parts.memory.held():
        service = assemble(parts)
        config = parts.config
        log.info(
            "%s of fleet %s: broker %s; Ctrl-C stops",
            config.device, config.fleet, parse_broker_url(config.broker.url),
        )  # fmt: skip
        for concern in concerns(parts, time.time()):
            log.warning("%s: %s", config.device, concern)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, service.policy_may_have_changed)
        await service.run(stop)
        log.info("%s: stopped", config.device)
