"""`covey plan`: compile a model into a plan, look at one, and sign one.

Only parsing and printing live here; `compile` does the work and is imported, with torch, when a
plan is compiled. What is printed is for people.
"""

import math
import os
from pathlib import Path
from typing import Any

import click

from covey_coordinator.plans.bundle import (
    GRAPH_NAMES,
    PlanBundle,
    check_target,
    graph_file,
    load_bundle,
    write,
)
from covey_coordinator.plans.sample import SPEC_FORM, build_model, load_sample, parse_model
from covey_coordinator.plans.signing import (
    SIGNATURES,
    make_owner_key,
    owner_of,
    read_owner_key,
    sign_plan,
)
from covey_shared.errors import ConfigError
from covey_shared.plan import TensorSpec


@click.group()
def plan() -> None:
    """Compile torch models into plans, look at plans and sign them."""


@plan.command("compile")
@click.argument("model", metavar="MODULE:CALLABLE")
@click.option(
    "--loss",
    type=click.Choice(["cross_entropy", "mse", "bce_with_logits"]),
    required=True,
    help="cross_entropy: class numbers; mse: real numbers; bce_with_logits: numbers in 0..1.",
)
@click.option("--optimizer", type=click.Choice(["sgd"]), default="sgd", show_default=True)
@click.option("--momentum", type=float, default=0.0, show_default=True)
@click.option("--nesterov", is_flag=True, help="Nesterov's momentum.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option(
    "--lr", type=float, default=0.1, show_default=True, help="A round may set another one."
)
@click.option(
    "--sample-batch",
    required=True,
    metavar="NPZ|SHAPES",
    help="An .npz file with arrays features and labels (its first 32 examples are used), or "
    f"their types and shapes to draw them at random: {SPEC_FORM}, where :10 means 0 to 9. "
    "Reals are drawn from 0..1 or from a range, as in float32[32,4]:-1..1.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Where the plan's files go: a directory of its own.",
)
@click.option("--name", help="The plan's name.  [default: DIR's]")
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="For the model's initial values and a sample drawn at random.",
)
@click.option("--force", is_flag=True, help="Replace the plan in DIR.")
def compile_command(
    model: str,
    loss: Any,
    optimizer: str,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    lr: float,
    sample_batch: str,
    output: Path,
    name: str | None,
    seed: int,
    force: bool,
) -> None:
    """Compile the torch module that CALLABLE returns into a plan.

    MODULE is imported with the current directory first; CALLABLE takes no arguments. The plan is
    compared with torch before anything is written. Needs torch: pip install 'covey[compile]'.

    \b
    Example, for a function build in model.py:
      covey plan compile model:build --loss cross_entropy --momentum 0.9 \\
          --sample-batch 'features=float32[32,1,8,8],labels=int64[32]:10' -o digits-plan
    """
    _require_torch()
    check_target(output, replace=force)
    sample = load_sample(sample_batch, seed=seed)
    import torch

    from covey_coordinator.plans.compile import compile_plan

    build = parse_model(model)
    torch.manual_seed(seed)
    compiled = compile_plan(
        build_model(build, model),
        sample.features,
        sample.labels,
        loss=loss,
        optimizer=optimizer,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        lr=lr,
        name=name or output.absolute().name,
    )
    signed = (output / SIGNATURES).exists()
    write(compiled, output, replace=force)
    if signed and not (output / SIGNATURES).exists():
        click.echo(f"{output} was signed, as another plan; that is gone: have it signed again")
    report = compiled.verification
    click.echo(
        f"{output}: {compiled.header.n_params:,} parameters, plan {compiled.hash.hex()[:12]}\n"
        f"verified: {report.steps} steps in batches of {_listed(report.batch_sizes)} agree with "
        f"torch to {report.parameter_difference:.0e}, evaluation and prediction to "
        f"{max(report.evaluation_difference, report.prediction_difference):.0e}"
    )


@plan.command("show")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def show_command(directory: Path) -> None:
    """Print what the plan in DIR is made of."""
    bundle = load_bundle(directory)
    from rich.console import Console

    console = Console(highlight=False, markup=False)  # shapes in brackets are no markup
    for table in _tables(bundle):
        console.print(table)


@plan.command("sign")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--key",
    "key_file",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="The owner's private key, from covey plan owner-key.",
)
def sign_command(directory: Path, key_file: Path) -> None:
    """Sign the plan in DIR as a model's owner.

    Devices whose own owners trust some model owners only run no other plans. Several owners may sign
    one plan; a plan that is compiled anew has to be signed anew.
    """
    key = read_owner_key(key_file)
    bundle = load_bundle(directory)
    path = sign_plan(directory, bundle.hash, key)
    click.echo(f"{path}: plan {bundle.hash.hex()[:12]}, signed by {key.public.hex()}")


@plan.command("owner-key")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
def owner_key_command(file: Path) -> None:
    """Make a model owner's private key in FILE, and print its public half.

    The key signs plans with covey plan sign. The public half goes into owners of devices'
    policy.toml. Keep FILE away from the coordinator, if that is not to be trusted with it.
    """
    public = make_owner_key(file, os.urandom(32))
    click.echo(f"private key: {file}; whoever reads it signs as you")
    click.echo(f'for policy.toml on devices: owners = ["{public.hex()}"]')


def _tables(bundle: PlanBundle) -> list[Any]:
    from rich import box
    from rich.table import Table

    header = bundle.header
    facts = Table("plan", box=box.SIMPLE_HEAD)
    facts.add_column(header.name, overflow="fold")
    classes = f", classes 0 to {header.classes - 1}" if header.classes else ""
    state = sum(math.prod(spec.shape) for spec in header.state)
    for what, value in (
        ("hash", bundle.hash.hex()),
        ("features", _described(header.features)),
        ("labels", _described(header.labels) + classes),
        ("loss", header.loss),
        ("optimizer", header.optimizer),
        ("defaults", ", ".join(f"{h.name} {h.default:g}" for h in header.hyperparameters)),
        ("parameters", f"{header.n_params:,} ({4 * header.n_params:,} bytes)"),
        ("state", f"{state:,} numbers, kept on the device for one round"),
        ("metrics", ", ".join(header.metrics)),
        ("made with", ", ".join(f"{k} {v}" for k, v in sorted(header.versions.items()))),
        *(("signed by", owner_of(envelope).hex()) for envelope in bundle.signatures),
    ):
        facts.add_row(what, value)
    slots = Table("slot", "shape", "role", box=box.SIMPLE_HEAD)
    slots.add_column("numbers", justify="right")
    slots.add_column("from", justify="right")
    for slot in header.layout.slots:
        shape = "x".join(map(str, slot.shape)) or "scalar"
        slots.add_row(slot.name, shape, slot.role, f"{slot.size:,}", f"{slot.offset:,}")
    graphs = Table("graph", box=box.SIMPLE_HEAD)
    graphs.add_column("bytes", justify="right")
    graphs.add_column("SHA-256", overflow="fold")
    for name in GRAPH_NAMES:
        graphs.add_row(graph_file(name), f"{bundle.ref(name).size:,}", bundle.ref(name).sha256)
    return [facts, slots, graphs]


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype}[{', '.join(['batch', *map(str, spec.shape)])}]"


def _listed(numbers: tuple[int, ...]) -> str:
    texts = [str(number) for number in sorted(numbers)]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _require_torch() -> None:
    try:
        import onnx
        import onnxscript
        import torch
    except ImportError as error:
        raise ConfigError(
            f"compiling a plan needs {error.name}, which is not installed: "
            "pip install 'covey[compile]'"
        ) from error
    del onnx, onnxscript, torch
