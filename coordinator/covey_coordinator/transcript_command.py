"""`covey transcript` shows and exports a round's transcript, `covey verify` checks one, anywhere."""

import hashlib
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from covey_coordinator.averaging import FEDAVG, FedAvg
from covey_coordinator.options import fleet_option
from covey_shared import wire
from covey_shared.config import unreadable
from covey_shared.errors import ConfigError, MalformedError, RemoteProtocolError, StorageError
from covey_shared.fixedpoint import DecodedSum
from covey_shared.layout import Flat
from covey_shared.messages import (
    CheckIn,
    Decline,
    Manifest,
    MaskedUpdate,
    Message,
    Result,
    Reveal,
    Roster,
    RosterVote,
    RoundCall,
    Shares,
    View,
    ViewVote,
    for_display,
)
from covey_shared.secagg.bitmap import from_bitmap
from covey_shared.transcript import (
    About,
    Ending,
    Kind,
    Note,
    Payload,
    Reader,
    Record,
    parsed,
    thinned,
)
from covey_shared.transcript_checks import Report, Verdict, verify

MAX_SHOWN = 8
WIDTH = 100


# -- covey transcript ------------------------------------------------------------------------------


@dataclass
class Summary:
    """What a transcript holds, read without checking any of it."""

    about: About | None = None
    ending: Ending | None = None
    messages: dict[type[Message], list[Any]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    payloads: int = 0
    payload_bytes: int = 0
    thinned: int = 0
    cut: str = ""

    def all(self, kind: type[Message]) -> list[Any]:
        """All messages of a kind."""
        return self.messages.get(kind, [])


def read_summary(path: Path) -> Summary:
    """Raises StorageError, or MalformedError for a file that is no transcript; one that was cut off
    is shown as far as it goes."""
    summary = Summary()
    try:
        with path.open("rb") as file:
            reader = Reader(file.read)
            try:
                for record in reader:
                    _sum_up(summary, record)
            except RemoteProtocolError as error:
                summary.cut = for_display(str(error))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except RemoteProtocolError as error:
        raise MalformedError(f"{path}: {error}") from error
    if summary.about is None:
        raise MalformedError(f"{path}: {summary.cut or 'the transcript is empty'}")
    return summary


def _sum_up(summary: Summary, record: Record | Payload) -> None:
    if isinstance(record, Payload):
        summary.payloads += 1
        summary.payload_bytes += record.size
        return
    match record.kind:
        case Kind.ABOUT:
            summary.about = parsed(About, record.body)
        case Kind.MESSAGE:
            message = wire.decode(record.body).message
            summary.messages.setdefault(type(message), []).append(message)
        case Kind.NOTE:
            summary.notes.append(parsed(Note, record.body))
        case Kind.THINNED:
            summary.thinned += 1
        case Kind.ENDING:
            summary.ending = parsed(Ending, record.body)
        case _:
            pass


def rows_of(summary: Summary) -> list[tuple[str, str]]:
    """A transcript for people: (what, how much of it)."""
    rows: list[tuple[str, str]] = []
    names: list[str] = []
    checked_in = {message.device for message in summary.all(CheckIn)}
    rows.append(("checked in", _names(sorted(checked_in))))
    for manifest in summary.all(Manifest)[:1]:
        inside = (wire.decode_as(CheckIn, envelope) for envelope in manifest.check_ins)
        names = [signed.message.device for signed in inside]
        head = manifest.head
        rows.append(
            ("cohort", f"{_names(names)}; at least {head.n_min} in a sum, quorum {head.threshold}")
        )
    if summary.all(Shares):
        rows.append(("shared", _names(sorted(s.device for s in summary.all(Shares)))))

    def members(bitmap: bytes) -> list[str]:
        return [names[i] for i in sorted(from_bitmap(bitmap, len(names)))] if names else []

    for roster in summary.all(Roster)[:1]:
        votes = max(len(summary.all(RosterVote)), len(roster.votes))
        rows.append(("roster", f"{_names(members(roster.u2))}; {votes} votes"))
    announced = sorted(update.device for update in summary.all(MaskedUpdate))
    if announced:
        rows.append(("updates", _names(announced)))
    for view in summary.all(View)[:1]:
        inside_view = members(view.u3)
        votes = len(summary.all(ViewVote))
        rows.append(("in the sum", f"{_names(inside_view)}; {votes} votes"))
        if late := [name for name in announced if name not in inside_view]:
            rows.append(("too late", _names(late)))
        for roster in summary.all(Roster)[:1]:
            lost = len(members(roster.u2)) - len(inside_view)
            rows.append(
                (
                    "revealed",
                    f"by {len(summary.all(Reveal))} members: the self masks of {len(inside_view)} "
                    f"devices in the sum, the mask keys of {lost} not in it",
                )
            )
    # The last word of each: a device may say it more than once.
    for name, reason in {m.device: m.reason for m in summary.all(Decline)}.items():
        rows.append(("declined", f"{name}: {for_display(reason)}"))
    rows += [("noted", f"{note.device}: {for_display(note.text)}") for note in summary.notes]
    for call in summary.all(RoundCall)[:1]:
        rows.append(("model before", call.model.hex()))
    for result in summary.all(Result)[:1]:
        rows.append(("next model", result.next_model.hex()))
    if summary.about is not None and summary.all(Result):
        rule = for_display(summary.about.rule)
        rows.append(("averaging", f"{rule}, server_lr {summary.about.server_lr:g}"))
    if summary.payloads:
        rows.append(
            ("payloads", f"{summary.payloads} masked updates, {summary.payload_bytes:,} bytes")
        )
    elif summary.thinned:
        rows.append(("payloads", f"taken out; the hashes of {summary.thinned} remain"))
    return rows


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_SHOWN])
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return f"{len(names)}: {shown}{more}" if names else "none"


def _find(fleet_dir: Path, run: str | None, index: int) -> tuple[str, Path]:
    """(run, file) of a round. Raises ConfigError."""
    runs = fleet_dir / "runs"
    from covey_coordinator.operating import chosen_run, store_of

    with store_of(fleet_dir) as store:
        run = chosen_run(store, run)
    directory = runs / run / "rounds" / f"{index:05}"
    for name in ("transcript", ".transcript.part"):
        if (directory / name).exists():
            return run, directory / name
    kept = [int(p.parent.name) for p in (runs / run / "rounds").glob("*/transcript")]
    there = f"there are those of rounds {min(kept)} to {max(kept)}" if kept else "there is none yet"
    raise ConfigError(f"run {run} has no transcript of round {index}; {there}")


@click.command(short_help="Show or export a round's transcript.")
@click.argument("round_number", metavar="ROUND", type=click.IntRange(1))
@click.option("--run", help="The run's name; by default the one queued last.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Copy it to this file."
)
@click.option("--signatures", is_flag=True, help="Copy it without the masked updates.")
@fleet_option
def transcript(
    round_number: int, run: str | None, output: Path | None, signatures: bool, fleet_dir: Path
) -> None:
    """Show what happened in a round, and export its transcript for others to verify.

    ROUND is its number within the run, as `covey run` prints it.
    """
    if signatures and output is None:
        raise click.UsageError("--signatures goes with --output")
    name, path = _find(fleet_dir, run, round_number)
    summary = read_summary(path)
    about = summary.about
    if about is None:  # `read_summary` refuses that
        return
    if summary.ending is not None:
        how: str = summary.ending.outcome
        if summary.ending.reason:
            how += f": {for_display(summary.ending.reason)}"
    else:
        how = f"not ended ({summary.cut or 'it still runs'})"
    click.echo(
        f"round {about.index} of run {name} (fleet {about.fleet}, number {about.round}): {how}"
    )
    for what, text in rows_of(summary):
        click.echo(_wrapped(f"{what:<14}", text))
    click.echo(f"{'file':<14}{path} ({path.stat().st_size:,} bytes)")
    for older in sorted(path.parent.glob("transcript-*")):
        click.echo(f"{'interrupted':<14}{older}")
    if output is None:
        click.echo(f"check it with: covey verify {path}")
        return
    _export(path, output, signatures)
    model = path.with_name("model-before.bin")
    click.echo(f"written to {output}")
    if model.exists() and not signatures:
        click.echo(f"whoever shall check the average needs {model}, too")


def _export(path: Path, output: Path, signatures: bool) -> None:
    try:
        with path.open("rb") as source, output.open("wb") as target:
            if signatures:
                thinned(source.read, lambda data: cast(None, target.write(data)))
            else:
                shutil.copyfileobj(source, target)
    except OSError as error:
        raise StorageError(
            f"cannot write {output}: {error.strerror}; choose another file"
        ) from error
    except RemoteProtocolError as error:
        raise MalformedError(f"{path}: {error}") from error


def _wrapped(head: str, text: str) -> str:
    lines = textwrap.wrap(text, max(20, WIDTH - len(head)), break_on_hyphens=False) or [""]
    return head + ("\n" + " " * len(head)).join(lines)


# -- covey verify ----------------------------------------------------------------------------------


def parse_key(option: str, value: str | None) -> bytes | None:
    """64 hexadecimal digits, or a file that holds them. Raises ConfigError."""
    if value is None:
        return None
    text = value
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        path = Path(value)
        try:
            with path.open(encoding="utf-8") as file:
                text = file.readline(200).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(f"{option} {path}", error) from error
        if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
            raise ConfigError(f"{option} {path} holds no key of 64 hexadecimal digits")
    return bytes.fromhex(text)


class Models:
    """Models at hand, to be found by their hash. given: files that were named."""

    def __init__(self, transcript_file: Path, given: tuple[Path, ...]) -> None:
        self._files = (*given, transcript_file.with_name("model-before.bin"))
        self._given = given

    def find(self, digest: bytes, size: int) -> Flat | None:
        """Flat little-endian float32 values. Raises ConfigError for a named file that is not there."""
        for path in self._files:
            try:
                if path.stat().st_size != size:
                    continue
                data = path.read_bytes()
            except FileNotFoundError as error:
                if path in self._given:
                    raise unreadable(f"--model {path}", error) from error
                continue
            except OSError as error:
                raise unreadable(f"--model {path}", error) from error
            if len(data) == size and hashlib.sha256(data).digest() == digest:
                return np.frombuffer(data, "<f4").astype(np.float32)
        return None

    def named(self) -> dict[Path, bytes]:
        """The named files, and their hashes."""
        found = {}
        for path in self._given:
            with path.open("rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").digest()
        return found


def average(about: About, model: Flat, total: DecodedSum) -> Flat | None:
    """The next model, as the coordinator makes it; None for a rule that this covey does not know."""
    if about.rule != FEDAVG:
        return None
    return FedAvg(about.server_lr).step(model, total)


@click.command(name="verify", short_help="Check a round's transcript.")
@click.argument("file", metavar="TRANSCRIPT", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--fleet-ca", metavar="KEY", help="The fleet CA's public key: 64 digits, or a file.")
@click.option(
    "--coordinator", metavar="KEY", help="The coordinator's public key: 64 digits, or a file."
)
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A model, before or after the round; may be given several times.",
)
@click.option("--strict", is_flag=True, help="Fail if anything could not be checked, too.")
def verify_command(
    file: Path,
    fleet_ca: str | None,
    coordinator: str | None,
    models: tuple[Path, ...],
    strict: bool,
) -> None:
    """Check what a round's transcript says, on any machine, with no secret.

    Prints each check with its outcome, and what all of them prove. The exit status is 0 if none
    failed.
    """
    ca, key = parse_key("--fleet-ca", fleet_ca), parse_key("--coordinator", coordinator)
    for path in models:
        if not path.is_file():
            raise ConfigError(f"--model {path} does not exist")
    at_hand = Models(file, models)
    try:
        with file.open("rb") as source:
            report = verify(
                source.read, fleet_ca=ca, coordinator=key, find_model=at_hand.find, average=average
            )
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}") from error
    about = report.about
    if about is not None:
        click.echo(f"round {about.round} of fleet {about.fleet}, run {about.run.hex()}")
    for check in report.checks:
        click.echo(_wrapped(f"{check.verdict.value:<13}", check.what))
        click.echo(_wrapped(" " * 13, f"({check.detail})"))
    click.echo()
    for sentence in conclusions(report, at_hand.named()):
        click.echo(_wrapped("", sentence))
    if report.failed or (strict and not report.complete):
        sys.exit(1)


def conclusions(report: Report, models: dict[Path, bytes]) -> list[str]:
    """What it all proves, and what it does not. models: files that were named, and their hashes."""
    if report.failed:
        failed = [check.what for check in report.checks if check.verdict is Verdict.FAIL]
        return [
            f"This transcript does not hold: {len(failed)} of {len(report.checks)} checks failed.",
            "It proves nothing, not even who made it so: whoever had the file could have changed it.",
        ]
    said = []
    passed = {c.name for c in report.checks if c.verdict is Verdict.PASS}
    if "view" in passed:
        said.append(
            f"It proves that {report.summed} of {report.devices} devices with certificates of the "
            f"fleet CA are in the sum, at least {report.minimum} as wanted; that a quorum of them "
            "signed exactly that; and that of each device members gave shares of one kind only."
        )
    if "sum" in passed:
        said.append(
            "The sum was made again from what the devices signed, and is the published one."
        )
    elif "result" in passed:
        said.append("That the published sum is theirs was not checked.")
    if "model" in passed:
        said.append("The next model is exactly the one before and the average of that sum.")
        said += [f"{p} is that next model." for p, h in models.items() if h == report.next_model]
    elif "result" in passed:
        said.append("That the next model comes from that sum was not checked.")
    known = (report.model, report.next_model)
    said += [
        f"{path} is neither the model before this round nor the next one."
        for path, digest in models.items()
        if digest not in known
    ]
    if report.ending is not None and report.ending.outcome != "completed":
        said.append(
            f"The round was {report.ending.outcome}: it has no sum, and shows how far it came."
        )
    said.append(
        "It does not prove what the devices trained on, or whether a device lied about its update. "
        "It cannot show what was left out of it: a second view could only have found its quorum if "
        "at least a third of the members had signed twice."
    )
    if "ca" not in passed:
        said.append(
            "Whose fleet it is was taken on faith: anyone can make a fleet of their own. Name the "
            "fleet CA's key with --fleet-ca."
        )
    return said
