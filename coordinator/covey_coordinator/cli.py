"""`covey`: the operator's command line. What it prints is for people; files are for programs."""

import asyncio
import faulthandler
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

from covey_coordinator.options import fleet_option
from covey_shared import __version__
from covey_shared.errors import CoveyError
from covey_shared.notify import Notifier

MAX_SHOWN = 20


# Where the larger commands are. Loaded when they are asked for: the compiler's pulls in torch.
ELSEWHERE = {
    "abort": "covey_coordinator.runs_command:abort",
    "backup": "covey_coordinator.runs_command:backup",
    "ca": "covey_coordinator.ca_command:ca",
    "broker": "covey_coordinator.broker.command:broker",
    "device": "covey_coordinator.device_command:device",
    "pause": "covey_coordinator.runs_command:pause",
    "plan": "covey_coordinator.plans.command:plan",
    "resume": "covey_coordinator.runs_command:resume",
    "rollback": "covey_coordinator.runs_command:rollback",
    "rounds": "covey_coordinator.runs_command:rounds",
    "runs": "covey_coordinator.runs_command:runs",
    "transcript": "covey_coordinator.transcript_command:transcript",
    "verify": "covey_coordinator.transcript_command:verify_command",
}


class Commands(click.Group):
    """`covey`'s commands, and those that other packages add through the entry-point group
    `covey.commands` (the demo does). Errors end in one line, never in a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Built in and added, by name."""
        added = {point.name for point in entry_points(group="covey.commands")}
        return sorted(added | ELSEWHERE.keys() | set(super().list_commands(ctx)))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Built in, or loaded now."""
        if cmd_name in ELSEWHERE:
            module, _, name = ELSEWHERE[cmd_name].partition(":")
            found: click.Command = getattr(importlib.import_module(module), name)
            return found
        command = super().get_command(ctx, cmd_name)
        if command is None:
            for point in entry_points(group="covey.commands", name=cmd_name):
                loaded: click.Command = point.load()
                return loaded
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """One line on stderr and exit status 1 for an error, ours or not."""
        try:
            return super().invoke(ctx)
        except CoveyError as error:
            click.echo(f"covey: {error}", err=True)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # the last: whoever reads has seen enough
        except Exception as error:
            if os.environ.get("COVEY_DEBUG"):
                raise
            click.echo(
                f"covey: unexpected {type(error).__name__}: {error}. This is a bug in covey; with "
                "COVEY_DEBUG=1 in the environment it shows where",
                err=True,
            )
        raise click.exceptions.Exit(1)


@click.group("covey", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="covey")
def main() -> None:
    """Federated learning for fleets of Raspberry Pis, with secure aggregation.

    The coordinator's side. On a device it is `covey-device`.
    """


@main.command(short_help="Make a fleet.")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), default=Path())
@click.option("--fleet", default="fleet", show_default=True, help="The fleet's name.")
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="HOST",
    help="This machine, as devices reach it over the network: they join with tokens, over TLS. "
    "Several may be given; devices are told the first.",
)
@click.option(
    "--ca",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="CA.PUB",
    help="The public key of a fleet CA on another machine, of `covey ca init`.",
)
@click.option(
    "--broker",
    type=click.Choice(["auto", "embedded", "mosquitto", "external"]),
    default="auto",
    show_default=True,
    help="Which broker `covey up` runs; external: one that is there already (give --broker-url).",
)
@click.option("--broker-url", help="mqtt://host:port of an external broker.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="Where the broker that `covey up` runs listens.  [default: 1883, on this machine alone; "
    "8883 with --address]",
)
@click.option(
    "--enrol-port",
    type=click.IntRange(1, 65535),
    default=8884,
    show_default=True,
    help="Where devices join, with --address.",
)
def init(
    directory: Path,
    fleet: str,
    addresses: tuple[str, ...],
    ca: Path | None,
    broker: Any,
    broker_url: str | None,
    port: int | None,
    enrol_port: int,
) -> None:
    """Make a fleet: its authorities, the coordinator's key and covey.toml, in DIRECTORY.

    Without --address it is for devices on this machine.
    """
    from covey_coordinator.config import BrokerConfig, EnrolConfig
    from covey_coordinator.fleet import FleetDirectory

    if (broker == "external") != (broker_url is not None):
        raise click.UsageError("--broker external and --broker-url go together")
    if ca is not None and not addresses:
        raise click.UsageError("--ca goes with --address: its devices join over the network")
    config = BrokerConfig(kind=broker, url=broker_url, port=port)
    made = FleetDirectory.create(
        directory,
        fleet,
        config,
        addresses=addresses,
        enrol=EnrolConfig(port=enrol_port),
        ca=ca,
    )
    click.echo(f"fleet {fleet} made in {made.path.absolute()}")
    there = "" if made.path.resolve() == Path.cwd() else f" in {made.path}"
    if addresses:
        _tell_networked(made)
        click.echo(f"next{there}: covey up, then covey device token --name NAME")
        return
    if broker == "external":
        click.echo(
            "the broker must know the user coordinator, with the password in "
            f"{made.password_file('coordinator')}"
        )
    click.echo(f"next{there}: covey device add NAME, then covey up")


def _tell_networked(fleet: Any) -> None:
    """Where a fleet's devices connect, and whom they will trust."""
    from covey_coordinator.config import load_fleet, normal_host
    from covey_shared.keys import in_groups

    config, trust = load_fleet(fleet.path), fleet.trust
    host = normal_host(config.addresses[0])
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"devices join at {shown}:{config.enrol.port}, rounds are at "
               f"{fleet.device_broker_url(config)}")  # fmt: skip
    click.echo(f"fleet CA: {in_groups(trust.ca)}{'' if fleet.ca_here else ', on another machine'}")
    click.echo(f"coordinator's key: {trust.coordinator.hex()}")


@main.command(short_help="Run the broker and the coordinator.")
@click.option("-v", "--verbose", is_flag=True, help="Log every phase and refusal.")
@fleet_option
def up(verbose: bool, fleet_dir: Path) -> None:
    """Run the broker and the coordinator, and play the runs that `covey run` queues."""
    notifier = _supervisor()
    from covey_coordinator.daemon import Daemon
    from covey_coordinator.fleet import FleetDirectory

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )

    def say(line: str) -> None:
        click.echo(f"{time.strftime('%H:%M:%S')} {line}")

    run_until_stopped(Daemon(FleetDirectory(fleet_dir), say, notifier).serve)


def _supervisor() -> Notifier:
    """Whoever started us as a service. The broker does not hear of it: it is not what is supervised."""
    notifier = Notifier.of(os.environ, os.getpid())
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        os.environ.pop(name, None)
    if notifier.watchdog_s is not None:
        # The watchdog ends a service that hangs with SIGABRT: then its log shows where it hung.
        faulthandler.enable()
    return notifier


def run_until_stopped(serve: Callable[[asyncio.Event], Any]) -> None:
    """Run a service until SIGINT or SIGTERM asks it to stop."""

    async def supervised() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await serve(stop)

    asyncio.run(supervised())


@main.command(short_help="Queue a run and follow it.")
@click.argument("plan", type=click.Path(exists=True, path_type=Path))
@click.option("--name", help="The run's name; by default its start time.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds to play.  [default: 20]")
@click.option(
    "--goal",
    type=click.IntRange(2, 128),
    help="Updates that are enough.  [default: the fleet, at most 10]",
)
@click.option("--minimum", type=click.IntRange(2, 128), help="Fewest in a sum.  [default: 3]")
@click.option(
    "--batches", type=click.IntRange(1), help="Batches per device and round.  [default: 10]"
)
@click.option("--batch-size", type=click.IntRange(1), help="Examples in a batch.  [default: 32]")
@click.option("--lr", type=float, help="The plan's learning rate, if not its default.")
@click.option(
    "--test",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A held-out .npz set (arrays features, labels) to evaluate every model on.",
)
@click.option("--detach", is_flag=True, help="Queue the run and return.")
@fleet_option
def run(plan: Path, name: str | None, detach: bool, fleet_dir: Path, **options: Any) -> None:
    """Queue a run of PLAN and follow it. PLAN: a plan's directory, or a run.toml for everything
    that the options do not cover."""
    from covey_coordinator.follow import follow
    from covey_coordinator.queueing import queue_run
    from covey_coordinator.status import read_status

    directory = queue_run(fleet_dir, plan, name, options)
    click.echo(f"run {directory.name} queued")
    status = read_status(fleet_dir)
    if status is None:
        click.echo("`covey up` does not run for this fleet: start it in another terminal")
    elif not status.present:
        click.echo("no device is online yet: start some with covey-device run")
    if not detach and not follow(directory, lambda: read_status(fleet_dir) is not None):
        sys.exit(1)


@main.command(short_help="The fleet at a glance.")
@fleet_option
def status(fleet_dir: Path) -> None:
    """The fleet at a glance: broker, devices, the open round, runs."""
    from rich.console import Console
    from rich.table import Table

    from covey_coordinator.config import load_fleet
    from covey_coordinator.fleet import FleetDirectory
    from covey_coordinator.runs_view import note_of, open_round, standing
    from covey_coordinator.status import read_status
    from covey_coordinator.store import FILE, RunDirectory, Store

    config, now = load_fleet(fleet_dir), read_status(fleet_dir)
    click.echo(f"fleet {config.fleet} in {fleet_dir.absolute()}")
    if now is None:
        click.echo("coordinator: not running (covey up)")
    else:
        connected = "connected" if now.connected else "not connected"
        click.echo(f"coordinator: running, {connected} to broker {now.broker}")
        click.echo(f"online: {_names(now.present) or 'no device'}")
    fleet = FleetDirectory(fleet_dir)
    if config.networked:
        _tell_networked(fleet)
    if fleet.ca_here:
        click.echo(
            "the fleet CA's key is on this machine, beside the coordinator's: whoever takes it over "
            "can invent devices, and sum one real device among them"
        )
    if not (fleet_dir / FILE).exists():
        click.echo("no runs yet: covey run PLAN")
        return
    with Store.open(fleet_dir / FILE) as store:
        records, opened = store.records(), store.opened()
        if not records:
            click.echo("no runs yet: covey run PLAN")
            return
        if opened is not None:
            directory = RunDirectory(fleet_dir / "runs" / opened.run, store)
            click.echo(f"open round: {open_round(opened, directory.progress(), now)}")
    table = Table(box=None)
    for column in ("run", "status", "rounds", "completed", "abandoned", "note"):
        table.add_column(column)
    for record in records:
        state = record.state
        table.add_row(
            record.name, standing(record, now is not None), str(state.rounds_done),
            str(state.rounds_completed), str(state.rounds_abandoned), note_of(record),
        )  # fmt: skip
    Console().print(table)


def _names(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more
