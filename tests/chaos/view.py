"""What is shown while it runs, and the table at its end."""

from collections import Counter, deque
from collections.abc import Sequence
from time import monotonic

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from chaos.monkey import Monkey
from chaos.parts import Part
from chaos.stage import Stage

COLOURS = {"up": "green", "down": "red", "ended": "bold red", "stopped": "yellow"}


class View:
    """``with`` shows it, on a terminal anew and anew; elsewhere a line for every fault."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.stage: Stage | None = None
        self.monkey: Monkey | None = None
        self.lines: deque[str] = deque(maxlen=12)
        self.position, self.rounds, self.completed = 0, 0, 0
        self._started = monotonic()
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=5, transient=True
        )

    def __enter__(self) -> "View":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def say(self, line: str) -> None:
        """One more line."""
        stamped = f"{monotonic() - self._started:7.1f} s  {line}"
        self.lines.append(stamped)
        if not self.console.is_terminal:
            self.console.print(stamped, highlight=False, soft_wrap=True, markup=False)

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 1))
        for column in ("", "state", "kills", "stops", "ailing", "online"):
            table.add_column(column)
        stage, monkey = self.stage, self.monkey
        for part in stage.parts if stage else ():
            table.add_row(*_row(part, monkey))
        head = Text(f"{self.title}: {self.position} of {self.rounds} rounds over", "bold")
        head.append(f", {self.completed} completed, {monotonic() - self._started:.0f} s", "")
        if monkey is not None:
            head.append(f"\nround {monkey.observer.round}, phase {monkey.observer.phase}; "
                        f"{len(monkey.done)} faults so far", "")  # fmt: skip
        return Group(head, table, Text("\n".join(self.lines), "dim"))


def _row(part: Part, monkey: Monkey | None) -> list[Text | str]:
    ails = monkey.ails[part.name] + monkey.ails["all"] if monkey else 0
    online = monkey is not None and part.name in monkey.observer.present
    return [
        part.name,
        Text(part.state, COLOURS[part.state]),
        str(part.kills),
        str(part.stops),
        Text("yes", "red") if ails else "",
        "yes" if online else "",
    ]


def counted(names: Sequence[str]) -> str:
    """Of each how many, the most frequent first."""
    return ", ".join(f"{name} {n}" for name, n in Counter(names).most_common())
