"""`covey-device`: the device owner's command line."""

import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from covey_device.audit_command import audit
from covey_device.doctor_command import doctor
from covey_device.installation.commands import install_service, join, uninstall
from covey_device.model_command import model, predict
from covey_device.owner import as_owner
from covey_device.status_command import explain, status
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
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # the last: whoever reads has seen enough
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


main.add_command(audit)
main.add_command(status)
main.add_command(explain)
main.add_command(doctor)
main.add_command(join)
main.add_command(install_service)
main.add_command(uninstall)
main.add_command(model)
main.add_command(predict)


@main.command(short_help="Serve until stopped.")
@config_option
@click.option("-v", "--verbose", is_flag=True, help="Log every message that is refused.")
def run(config_path: Path, verbose: bool) -> None:
    """Serve until stopped: check in to rounds, train, send masked updates."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        # The journal notes the time itself.
        format="%(message)s" if "JOURNAL_STREAM" in os.environ else "%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    as_owner(config_path)
    asyncio.run(_serve(config_path))


@main.command(short_help="Renew the certificates now.")
@config_option
@click.option("--if-due", is_flag=True, help="Only those that have spent two thirds of their life.")
def renew(config_path: Path, if_due: bool) -> None:
    """Renew this device's certificates over mutual TLS. A running covey-device does so by itself, and
    uses what was renewed by hand within a day, or when it is started again."""
    from covey_device.renewal import WAITS
    from covey_device.renewal import renew as renew_now

    as_owner(config_path)
    report = renew_now(config_path, now_unix=time.time(), anyway=not if_due)
    click.echo(f"renewed: {' and '.join(report.renewed) or 'nothing'}")
    due = time.strftime("%Y-%m-%d", time.gmtime(report.due_unix))
    click.echo(f"next renewal: {due}")
    if report.note:
        click.echo(report.note)
    if report.waiting:
        click.echo(f"waiting: {WAITS}")


@main.command(short_help="Check the configuration and what it names.")
@config_option
def check(config_path: Path) -> None:
    """Check the configuration, the keys, the certificate, the state and the data files, without
    connecting."""
    from covey_device.assembly import certificates_in_words, concerns, load_device
    from covey_shared.keys import in_groups
    from covey_shared.mqtt import parse_broker_url

    as_owner(config_path)
    parts = load_device(config_path)
    click.echo(f"device {parts.config.device} of fleet {parts.config.fleet}")
    click.echo(f"identity: {in_groups(parts.identity.public)}")
    click.echo(f"fleet CA: {in_groups(parts.trust.ca)}")
    click.echo(f"broker: {parse_broker_url(parts.config.broker.url)}")
    for line in certificates_in_words(parts, time.time()):
        click.echo(line)
    click.echo(f"last round: {parts.memory.load().last_round}")
    click.echo(f"policy: {parts.policy.path if parts.policy.path.exists() else 'the defaults'}")
    for line in parts.policy.current.in_words():
        click.echo(f"  {line}")
    if found := concerns(parts, time.time()):
        raise ConfigError("; ".join(found))
    certificate = "certificate" if parts.certificate else "TLS certificate"
    click.echo(f"configuration, identity, {certificate}, state and data files are there and sound")


async def _serve(config_path: Path) -> None:
    from covey_device.footprint import give_back, keep_small

    keep_small()
    from covey_device.assembly import assemble, concerns, load_device
    from covey_device.ceiling import bound_to_policy
    from covey_device.liveness import Supervised, supervisor
    from covey_shared.mqtt import parse_broker_url

    parts = load_device(config_path)
    with parts.memory.held():
        service = assemble(parts)
        service.give_back = give_back
        service.on_policy = bound_to_policy
        bounds = bound_to_policy(parts.policy.current)
        config = parts.config
        supervised = Supervised(service, supervisor())
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        # With a terminal it means that this was closed, and without one what it means to services.
        hung_up = stop.set if sys.stderr.isatty() else supervised.reload
        loop.add_signal_handler(signal.SIGHUP, hung_up)
        log.info(
            "%s of fleet %s: broker %s; Ctrl-C stops",
            config.device, config.fleet, parse_broker_url(config.broker.url),
        )  # fmt: skip
        log.info("%s: %s", config.device, bounds)
        for concern in concerns(parts, time.time()):
            log.warning("%s: %s", config.device, concern)
        await supervised.run(stop, f"starts; broker {parse_broker_url(config.broker.url)}")
        log.info("%s: stopped", config.device)
