"""`covey runs`, `covey rounds`, and what changes a run: pause, resume, abort, rollback. And a backup."""

import time
from pathlib import Path

import click

from covey_coordinator.options import fleet_option

run_option = click.option("--run", "name", help="The run's name; by default the one queued last.")
json_option = click.option("--json", "as_is", is_flag=True, help="Print it as JSON, for programs.")


# -- covey runs ------------------------------------------------------------------------------------


@click.command(short_help="All runs of the fleet.")
@json_option
@fleet_option
def runs(as_is: bool, fleet_dir: Path) -> None:
    """All runs of the fleet, in the order they were queued: where each stands, of how many rounds, and
    how good its model is."""
    from rich.console import Console

    from covey_coordinator.config import load_fleet
    from covey_coordinator.operating import store_of
    from covey_coordinator.runs_view import as_json, run_json, runs_table
    from covey_coordinator.status import read_status

    load_fleet(fleet_dir)
    up = read_status(fleet_dir) is not None
    with store_of(fleet_dir) as store:
        records = store.records()
    if as_is:
        click.echo(as_json([run_json(record, up, fleet_dir) for record in records]))
        return
    Console().print(runs_table(records, up, fleet_dir))


# -- covey rounds ----------------------------------------------------------------------------------


@click.group(short_help="What rounds came to.")
def rounds() -> None:
    """What rounds came to, those included that were rolled back."""


@rounds.command("list", short_help="The rounds of a run.")
@click.argument("name", metavar="[RUN]", required=False)
@json_option
@fleet_option
def rounds_list(name: str | None, as_is: bool, fleet_dir: Path) -> None:
    """The rounds of RUN, oldest first; by default of the run queued last."""
    from covey_coordinator.config import load_fleet
    from covey_coordinator.follow import describe
    from covey_coordinator.operating import chosen_run, store_of
    from covey_coordinator.runs_view import as_json, open_round, round_json
    from covey_coordinator.status import read_status
    from covey_coordinator.store import RunDirectory

    load_fleet(fleet_dir)
    with store_of(fleet_dir) as store:
        run = chosen_run(store, name)
        history, opened = store.history(run), store.opened()
        directory = RunDirectory(fleet_dir / "runs" / run, store)
        progress, now = directory.progress(), read_status(fleet_dir)
    if as_is:
        click.echo(as_json([round_json(record) for record in history]))
        return
    for record in history:
        back = "" if record.rolled_back_unix is None else "  (rolled back)"
        click.echo(describe(record.line) + back)
    if opened is not None and opened.run == run:
        click.echo(f"open round: {open_round(opened, progress, now)}")
    elif not history:
        click.echo(f"run {run} has played no round yet")


@rounds.command("show", short_help="Everything that is known of a round.")
@click.argument("index", metavar="ROUND", type=click.IntRange(1))
@run_option
@json_option
@fleet_option
def rounds_show(index: int, name: str | None, as_is: bool, fleet_dir: Path) -> None:
    """Everything that is known of a round. ROUND is its number within the run, as `covey run` prints it."""
    from covey_coordinator.config import load_fleet
    from covey_coordinator.moments import moment
    from covey_coordinator.operating import chosen_run, find_round, shown, store_of
    from covey_coordinator.runs_view import as_json, open_round, round_json, round_rows
    from covey_coordinator.status import read_status
    from covey_coordinator.store import RunDirectory

    load_fleet(fleet_dir)
    with store_of(fleet_dir) as store:
        run = chosen_run(store, name)
        opened = store.opened()
        directory = RunDirectory(fleet_dir / "runs" / run, store)
        if opened is not None and (opened.run, opened.index) == (run, index) and not as_is:
            told = open_round(opened, directory.progress(), read_status(fleet_dir))
            click.echo(f"open round: {told}")
            return
        record, others = find_round(store, run, index)
        found = shown(directory, record)
    if as_is:
        click.echo(
            as_json(
                round_json(record)
                | {
                    "transcript": None if found.transcript is None else str(found.transcript),
                    "model_file": None if found.model is None else str(found.model),
                }
            )
        )
        return
    for what, value in round_rows(record):
        click.echo(f"{what:<14} {value}")
    click.echo(f"{'transcript':<14} {found.transcript or 'none'}")
    if record.line["outcome"] == "completed":
        click.echo(f"{'model file':<14} {found.model or 'not kept any more'}")
    for other in others:
        when = moment(other.rolled_back_unix or 0)
        click.echo(f"{'before':<14} number {other.line.get('round', '?')}, rolled back {when}")


# -- what changes a run ----------------------------------------------------------------------------


@click.command(short_help="Call no more rounds of a run.")
@click.argument("name", metavar="RUN")
@click.option("--now", is_flag=True, help="Abandon the open round, instead of waiting for its end.")
@fleet_option
def pause(name: str, now: bool, fleet_dir: Path) -> None:
    """Call no more rounds of RUN, until `covey resume`. Its open round goes on to its end."""
    from covey_coordinator.operating import Operator

    with Operator(fleet_dir) as operator:
        click.echo(operator.pause(name, now=now))


@click.command(short_help="Let a paused run go on.")
@click.argument("name", metavar="RUN")
@fleet_option
def resume(name: str, fleet_dir: Path) -> None:
    """Let RUN go on that was paused, or that failed or was stopped and can go on now."""
    from covey_coordinator.operating import Operator

    with Operator(fleet_dir) as operator:
        click.echo(operator.resume(name))


@click.command(short_help="End a run for good.")
@click.argument("name", metavar="RUN")
@fleet_option
def abort(name: str, fleet_dir: Path) -> None:
    """End RUN for good. Its open round is abandoned; its models and metrics stay."""
    from covey_coordinator.operating import Operator

    with Operator(fleet_dir) as operator:
        click.echo(operator.abort(name))


@click.command(short_help="Take a run back to an earlier round.")
@click.argument("name", metavar="RUN")
@click.option(
    "--to",
    type=click.IntRange(0),
    required=True,
    metavar="ROUND",
    help="The round whose model becomes the run's again; 0 for the plan's own.",
)
@fleet_option
def rollback(name: str, to: int, fleet_dir: Path) -> None:
    """Take RUN back to the model it had after one of its rounds, and go on from there.

    ROUND is a number within the run, as `covey run` prints it. Later rounds stay in the history, marked.
    """
    from covey_coordinator.operating import Operator

    with Operator(fleet_dir) as operator:
        click.echo(operator.roll_back(name, to, time.time()))


@click.command(short_help="Copy the database while it is in use.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@fleet_option
def backup(file: Path, fleet_dir: Path) -> None:
    """Write a copy of the fleet's database to FILE, whole even while `covey up` writes.

    An open round is not in the copy: its secret would outlive it there.
    """
    from covey_coordinator.config import load_fleet
    from covey_coordinator.operating import store_of

    load_fleet(fleet_dir)
    with store_of(fleet_dir) as store:
        store.back_up(file)
    click.echo(
        f"database copied to {file}; runs/ and the keys are beside it: docs/state.md says how"
    )
