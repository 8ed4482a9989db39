"""`covey-device audit`: only parsing and printing. The words are in `audit_words`."""

import datetime
from pathlib import Path

import click


@click.command(short_help="Show what was joined, refused and sent.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("/etc/covey/device.toml"),
    show_default=True,
    help="The device's configuration.",
)
@click.option("--rounds", type=click.IntRange(min=1), help="Only the last N rounds.", metavar="N")
@click.option(
    "--since",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M"]),
    help="Only from this day on: 2026-11-21, or 2026-11-21T14:00.",
    metavar="DATE",
)
@click.option("--json", "as_json", is_flag=True, help="The log's own lines, one object each.")
@click.option("--verify", "checked", is_flag=True, help="Check that no line was changed since.")
def audit(
    config_path: Path,
    rounds: int | None,
    since: datetime.datetime | None,
    as_json: bool,
    checked: bool,
) -> None:
    """Show which rounds this device joined or refused and why, and what left it.

    Reads the log in the state directory, whether the service runs or not. Times are local.
    """
    from covey_device import config as configuration
    from covey_device.audit_words import latest, stories, told
    from covey_shared.errors import ConfigError

    directory = config_path.parent / configuration.load(config_path).state
    if checked:
        if rounds is not None or since is not None or as_json:
            raise ConfigError("--verify checks the whole log: leave the other options out")
        _verify(directory)
        return
    since_unix = 0.0 if since is None else since.timestamp()
    found = latest(stories(directory, since_unix=since_unix), rounds)
    if as_json:
        for line in (line for story in found for line in story.lines):
            click.echo(line)
        return
    story = next(found, None)
    if story is None:
        click.echo("nothing yet" if since is None else "nothing since then")
        return
    for following in found:
        click.echo(told(story))
        story = following
    click.echo(told(story, last=True))


def _verify(directory: Path) -> None:
    from covey_device.audit import verify

    verdict = verify(directory)
    if verdict is None:
        click.echo("the log is empty")
        return
    count = verdict.last - verdict.first + 1
    click.echo(f"{count:,} entries, {verdict.first} to {verdict.last}: each follows from the last")
    if verdict.first > 1:
        click.echo(f"the {verdict.first - 1:,} before them were removed to make room")
    if verdict.unfinished:
        click.echo("a line at the end is not finished: a power cut, or being written now")
    click.echo(
        f"entry {verdict.last} is {verdict.last_hash}; noted elsewhere, it shows later whether "
        "all of the log was replaced"
    )
