"""What every benchmark prints: a row for each figure, with the bound it has to keep."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. bound: as people read it, "<= 1.5", empty if there is none. holds: is it kept?"""

    name: str
    value: float
    unit: str
    bound: str
    holds: bool


def report(rows: Sequence[Row], json_path: Path | None = None) -> bool:
    """Print the rows as a table, and write {"rows": [...]} too. Returns whether all bounds hold."""
    table = Table("figure", "value", "unit", "bound", "")
    for row in rows:
        verdict = "" if not row.bound else "[green]holds[/]" if row.holds else "[red]broken[/]"
        value = f"{row.value:,.0f}" if abs(row.value) >= 1000 else f"{row.value:.4g}"
        table.add_row(row.name, value, row.unit, row.bound, verdict)
    Console().print(table)
    if json_path is not None:
        write(rows, json_path)
    return all(row.holds for row in rows)


def write(rows: Sequence[Row], json_path: Path) -> None:
    """Write {"rows": [...]}."""
    document = {"rows": [asdict(row) for row in rows]}
    json_path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1))
