"""`covey demo`: loaded by the `covey` command through its entry point.

Slow imports stay inside the function: `covey --help` loads this module too.
"""

import asyncio
import signal
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from covey_shared.errors import ConfigError, CoveyError

if TYPE_CHECKING:
    from covey_fleet.demo import DemoOptions, Outcome

INTERRUPTED = 130
PROSE_COLUMNS = 100


def _split(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    from covey_fleet.digits import parse_split

    try:
        return parse_split(value)
    except ConfigError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def _broker(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    from covey_shared.mqtt import parse_broker_url

    if value in ("auto", "embedded", "mosquitto"):
        return value
    try:
        return parse_broker_url(value)
    except ConfigError as error:
        raise click.BadParameter(
            f"auto, embedded, mosquitto, or the URL of a broker ({error})", ctx, param
        ) from None


def _share(ctx: click.Context, param: click.Parameter, value: float) -> float:
    # Range checks let a NaN through.
    if not 0 <= value <= 1:
        raise click.BadParameter("a number from 0 to 1", ctx, param)
    return value


@click.command()
@click.option("--devices", type=click.IntRange(3, 128), default=10, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(1, 100_000), help="[default: 24, with --split labels 75]"
)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1),
    callback=_share,
    default=0.15,
    show_default=True,
    help="The share of the devices that vanish in each round, at random moments.",
)
@click.option(
    "--split",
    callback=_split,
    default="dirichlet:0.5",
    show_default=True,
    metavar="iid|labels|dirichlet:ALPHA",
    help="How the digits are spread: alike; a few digits to each device; one-sidedly by chance.",
)
@click.option("--model", type=click.Choice(["mlp", "cnn"]), default="mlp", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=7, show_default=True)
@click.option(
    "--broker",
    callback=_broker,
    default="auto",
    show_default=True,
    metavar="auto|embedded|mosquitto|mqtt://HOST",
    help="auto: mosquitto if it is installed, otherwise the embedded broker.",
)
@click.option("--processes", is_flag=True, help="Each device in a process of its own.")
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("covey-demo"),
    show_default=True,
    help="Where plot, model, metrics and summary go.",
)
@click.option("--verbose", is_flag=True, help="Log into the report's directory.")
def demo(**options: Any) -> None:
    """A fleet on this machine learns handwritten digits, and only sums are revealed.

    Starts a broker, a coordinator and simulated devices that run the code of real ones. Some of
    them vanish in every round. Every revealed sum is checked against the devices' plaintext, which
    only the simulation knows.
    """
    ctx = click.get_current_context()
    try:
        from rich.console import Console

        from covey_fleet.demo import DemoOptions
    except ImportError as error:
        click.echo(
            f"covey demo: {error.name} is not installed; run: pip install 'covey[demo]'", err=True
        )
        ctx.exit(1)
    console = Console()
    try:
        outcome = asyncio.run(_supervised(DemoOptions(**options), console))
    except CoveyError as error:
        click.echo(f"covey demo: {error}", err=True)
        ctx.exit(1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo("covey demo: stopped; nothing is left running, no report was written", err=True)
        ctx.exit(INTERRUPTED)
    for paragraph in outcome.text:
        click.echo("\n" + textwrap.fill(paragraph, min(console.width, PROSE_COLUMNS)))
    click.echo()
    for path in outcome.files:
        click.echo(path)
    summary = outcome.summary
    if summary.sum_mismatches or not summary.rounds_completed:
        ctx.exit(1)


async def _supervised(options: "DemoOptions", console: Any) -> "Outcome":
    """SIGTERM ends it like Ctrl-C: children and broker go, too."""
    from covey_fleet.demo import run_demo

    playing = asyncio.current_task()
    if playing is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, playing.cancel)
    return await run_demo(options, console)
