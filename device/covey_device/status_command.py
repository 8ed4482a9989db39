"""`covey-device status` and `covey-device explain`: parsing and printing. The words are in `host.words`."""

from pathlib import Path
from typing import Any

import click

from covey_device.owner import as_owner

_config = click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("/etc/covey/device.toml"),
    show_default=True,
    help="The device's configuration.",
)
_json = click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")


@click.command(short_help="Show what the device is at.")
@_config
@_json
def status(config_path: Path, as_json: bool) -> None:
    """Show what this device is at, whether it would train now, and what its machine says of itself.

    Asks the service over its local socket; if none runs, judges from the machine as it is now.
    """
    import time

    from covey_device.host.words import status_lines

    facts = _facts(config_path)
    if as_json:
        _print_json(facts)
        return
    for line in status_lines(facts, now_unix=time.time()):
        click.echo(line)


@click.command(short_help="Show why the device did not take part.")
@_config
@click.option("--last", type=click.IntRange(min=1), default=10, show_default=True, metavar="N",
              help="Only the last N decisions; up to 50 are kept.")  # fmt: skip
@_json
def explain(config_path: Path, last: int, as_json: bool) -> None:
    """Show each decision of this device with its reason: why it declined a round, paused, ended early,
    or took part; and what it would decide now. Times are local."""
    import msgspec

    from covey_device.host.decisions import Decision
    from covey_device.host.words import decision_lines

    decisions, facts = _decisions(config_path)[-last:], _facts(config_path)
    host = facts["host"]
    if as_json:
        _print_json(
            {
                "device": facts["device"],
                "running": facts["running"],
                "decisions": decisions,
                "now": {name: host[name] for name in ("state", "why", "told")},
            }
        )
        return
    for line in decision_lines(msgspec.convert(decisions, list[Decision])) or [
        "nothing decided yet"
    ]:
        click.echo(line)
    why = "; ".join(host["why"]) or "nothing speaks against training"
    state = {"go": "would take part", "pause": "would wait", "stop": "would not train"}[
        host["state"]
    ]
    if not facts["running"]:
        click.echo("the service does not run; judged from the machine as it is now:")
    elif facts["round"] is None:
        state = {"go": state, "pause": "would decline", "stop": "would decline"}[host["state"]]
    click.echo(f"now: {state}: {why}")


def _facts(config_path: Path) -> dict[str, Any]:
    told = _asked(config_path, "status")
    return told if isinstance(told, dict) else _without_service(config_path)


def _decisions(config_path: Path) -> list[Any]:
    import msgspec

    from covey_device import config as configuration
    from covey_device.host.decisions import load

    told = _asked(config_path, "explain")
    if isinstance(told, list):
        return told
    state = config_path.parent / configuration.load(config_path).state
    return [msgspec.to_builtins(decision) for decision in load(state)]


def _asked(config_path: Path, what: str) -> Any:
    """What this device's service answers; None if none runs."""
    from covey_device import config as configuration
    from covey_device.host.port import DIRECTORY, FILE, ask, directory_of
    from covey_shared.errors import StorageError

    as_owner(config_path)
    device = configuration.load(config_path)
    state = config_path.parent / device.state
    closed: StorageError | None = None
    for directory in dict.fromkeys((directory_of(state), state, DIRECTORY)):
        try:
            facts = ask(directory / FILE, {"ask": "status"})
        except StorageError as error:
            closed = error
            continue
        # The one in /run may be another device's of this machine.
        if isinstance(facts, dict) and (facts.get("device"), facts.get("fleet")) == (
            device.device, device.fleet,
        ):  # fmt: skip
            return facts if what == "status" else ask(directory / FILE, {"ask": what})
    if closed is not None:
        raise closed
    return None


def _without_service(config_path: Path) -> dict[str, Any]:
    import os

    from covey_device import config as configuration
    from covey_device.config import PolicyFile
    from covey_device.host.care import care_of
    from covey_device.keystore import MemoryFile

    device = configuration.load(config_path)
    base = config_path.parent
    state = base / device.state
    care = care_of(PolicyFile(base / device.policy), state, os.environ)
    return {
        "device": device.device,
        "fleet": device.fleet,
        "running": False,
        "last_round": MemoryFile(state).load().last_round if state.is_dir() else 0,
        "host": care.facts(training=False),
    }


def _print_json(value: Any) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))
