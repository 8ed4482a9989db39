"""`covey-device predict` and `covey-device model`: the model at home, for people."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from covey_device.owner import as_owner
from covey_shared.errors import ConfigError, CoveyError

if TYPE_CHECKING:
    from covey_device.config import DeviceConfig
    from covey_device.home.files import ModelDirectory, Sidecar

DEFAULT_CONFIG = Path("/etc/covey/device.toml")

_config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="The device's configuration.",
)


@click.command(short_help="Run the kept model on a file, or on this device's data.")
@click.argument(
    "file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@_config_option
@click.option(
    "--model",
    "model_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another ONNX file than the kept model.",
)
@click.option("--own", is_flag=True, help="On the data that this device trains on, from [data].")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object an example.")
def predict(
    file: Path | None, config_path: Path, model_path: Path | None, own: bool, as_json: bool
) -> None:
    """Run the model that this device keeps on the examples in FILE (.npz, .npy or .csv, read as [data]
    says), or on its own data. Nothing of it leaves this device."""
    if (file is None) != own:
        raise click.UsageError("give a FILE, or --own")
    if own and model_path is not None:
        raise click.UsageError("--own goes with the kept model, not with --model")
    config = _config(config_path, optional=model_path is not None)
    from covey_device.home import predicting

    base = config_path.parent
    if model_path is not None:
        using = predicting.model_file(model_path)
    elif config is not None:
        using = predicting.kept_model(config, base)
    tally = predicting.Tally()
    if file is not None:
        blocks = predicting.on_file(using, file, config)
    elif config is not None:
        blocks = predicting.on_own(using, config, base)
    for block in blocks:
        tally.add(using, block)
        for found, words in predicting.lines(using, block):
            click.echo(json.dumps(found) if as_json else words)
    if summary := tally.in_words(using):
        click.echo(summary, err=True)


def _config(path: Path, *, optional: bool) -> "DeviceConfig | None":
    from covey_device import config as configuration

    context = click.get_current_context()
    chosen = context.get_parameter_source("config_path") != click.core.ParameterSource.DEFAULT
    if optional and not chosen and not path.exists():
        return None
    return configuration.load(path)


@click.group(short_help="The model that this device keeps.")
def model() -> None:
    """The model that this device keeps for its own applications."""


@model.command(short_help="Show which model is kept.")
@_config_option
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object.")
def show(config_path: Path, as_json: bool) -> None:
    """Show the current and the previous model: from which round, of which plan, its input and output."""
    directory = _directory(config_path)
    from covey_device.home.files import CURRENT, PREVIOUS, read_sidecar

    shown: dict[str, Any] = {}
    for link in (CURRENT, PREVIOUS):
        folder = directory.folder(link)
        if folder is None or (link == PREVIOUS and folder == directory.folder(CURRENT)):
            shown[link] = None
            continue
        sidecar = read_sidecar(folder)
        if as_json:
            shown[link] = {"folder": str(folder), **_facts(sidecar)}
        else:
            for line in _in_words(link, directory.path / f"{link}.onnx", sidecar):
                click.echo(line)
    if as_json:
        click.echo(json.dumps(shown))


@model.command(short_help="Check everything that vouches for the kept model.")
@_config_option
def verify(config_path: Path) -> None:
    """Check the kept models, offline: the coordinator's signatures on the plan and the model, this
    device's own on the file, and the file's hash."""
    as_owner(config_path)
    directory = _directory(config_path)
    from covey_device import config as configuration
    from covey_device.home.files import CURRENT, PREVIOUS
    from covey_device.home.files import verify as verify_model
    from covey_device.keystore import load_identity
    from covey_device.renewal import trust_of
    from covey_shared.messages import DeviceId

    config = configuration.load(config_path)
    identity = load_identity(config_path.parent / config.identity).public
    for link in (CURRENT, PREVIOUS):
        folder = directory.folder(link)
        if folder is None or (link == PREVIOUS and folder == directory.folder(CURRENT)):
            continue
        try:
            sidecar = verify_model(folder, trust_of(config), DeviceId(config.device), identity)
        except CoveyError as error:
            raise ConfigError(
                f"{directory.path / link} cannot be trusted: {error}; the next round's model replaces it"
            ) from error
        signed = "call" if sidecar.result is None else "call and result"
        click.echo(
            f"{link}: round {sidecar.round}, plan {sidecar.plan_name}: the coordinator signed its {signed}, "
            f"this device the file, sha256 {sidecar.onnx[:16]}..."
        )


@model.command(short_help="Go back to the previous model.")
@_config_option
def rollback(config_path: Path) -> None:
    """Make the previous model the current one, and the current one the previous, until the next round's
    comes."""
    as_owner(config_path)
    directory = _directory(config_path)
    sidecar = directory.rollback()
    click.echo(
        f"the model of round {sidecar.round} is the current one again, until the next round's comes; to "
        "stay with it, set `model.keep = false` and restart covey-device"
    )


def _directory(config_path: Path) -> "ModelDirectory":
    """Where models are kept. Raises ConfigError if there is none."""
    from covey_device import config as configuration
    from covey_device.home.files import ModelDirectory, none_yet

    config = configuration.load(config_path)
    directory = ModelDirectory(config.model_directory(config_path.parent), reserve_bytes=0)
    if directory.folder() is None:
        raise ConfigError(none_yet(directory.path, keep=config.model.keep))
    return directory


def _facts(sidecar: "Sidecar") -> dict[str, Any]:
    import msgspec

    facts = dict(msgspec.to_builtins(sidecar))
    return {name: value for name, value in facts.items() if name not in _UNSHOWN}


_UNSHOWN = {"format", "round_call", "result", "signature", "before"}


def _in_words(link: str, path: Path, sidecar: "Sidecar") -> list[str]:
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(sidecar.written_unix))
    came = "the result of" if sidecar.result is not None else "what began"
    ports = [
        f"{port.name} {port.type}[{', '.join(['batch', *map(str, port.shape)])}]"
        for port in (sidecar.input, sidecar.output)
    ]
    classes = f", {sidecar.classes} classes" if sidecar.classes is not None else ""
    return [
        f"{link}: {came} round {sidecar.round}, run {sidecar.run[:8]}, written {written}",
        f"  plan {sidecar.plan_name}, {sidecar.plan[:12]}: {ports[0]} -> {ports[1]}{classes}",
        f"  {path}, {sidecar.size:,} bytes, sha256 {sidecar.onnx[:16]}...",
    ]
