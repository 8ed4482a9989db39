"""What a demo shows while it runs: one line a round and, on a terminal, where the open one stands."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from covey_coordinator.round import Moved, Phase
from covey_coordinator.run import RoundOutcome
from covey_coordinator.store import Progress as RoundProgress
from covey_fleet.faults import Vanished
from covey_fleet.fleet import FleetEvent

_DOING: dict[Phase, str] = {
    Phase.GATHER: "devices check in",
    Phase.SHARE: "secrets are shared",
    Phase.ROSTER: "the roster is voted on",
    Phase.COLLECT: "devices train and upload",
    Phase.VIEW: "the view is voted on",
    Phase.UNMASK: "the sum is unmasked",
}
_MAX_NAMED = 3


class View:
    """``with View(...) as view`` shows progress; `observe` is told what happens.

    Where the console is no terminal, only whole lines are printed.
    """

    def __init__(self, console: Console, rounds: int, devices: int) -> None:
        self.console = console
        self._rounds, self._devices = rounds, devices
        self._vanished: list[Vanished] = []
        self._accuracy: float | None = None
        self._bar = Progress(
            TextColumn("  {task.description:<24}"),
            BarColumn(bar_width=28, complete_style="green", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]:<16}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._bar.add_task("rounds", total=rounds, note="")
        self._phase = self._bar.add_task("the fleet starts", total=devices, note="")

    def __enter__(self) -> "View":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bars."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def observe(self, event: FleetEvent) -> None:
        """Show what happened."""
        match event:
            case RoundOutcome():
                self._outcome(event)
            case RoundProgress():
                self._progress(event)
            case Vanished():
                self._vanished.append(event)
            case Moved(phase, _) if phase in _DOING:
                self._bar.reset(self._phase, description=_DOING[phase], total=self._devices)

    def _progress(self, progress: RoundProgress) -> None:
        # between two rounds it is in none
        doing = _DOING.get(Phase(progress.phase)) if progress.round else progress.phase
        if doing is not None:
            self._bar.update(
                self._phase,
                description=doing,
                completed=progress.answered,
                total=max(progress.awaited, progress.answered),
                note=f"{progress.present} of {self._devices} online",
            )

    def _outcome(self, outcome: RoundOutcome) -> None:
        self._accuracy = outcome.metrics.get("test_accuracy", self._accuracy)
        so_far = "" if self._accuracy is None else f"{self._accuracy:.1%} right"
        self._bar.update(self._all, completed=outcome.index, note=so_far)
        width = len(str(self._rounds))
        line = Text(f"round {outcome.index:>{width}}/{self._rounds}  ")
        if outcome.completed is not None:
            summed = f"{len(outcome.completed.survivors):>{len(str(self._devices))}}"
            line.append(f"sum of {summed} devices  ")
            line.append(f"{self._accuracy or 0.0:>6.1%} right", "bold green")
        else:
            line.append(f"abandoned: {outcome.reason}", "yellow")
        line.append(f"  {outcome.seconds:4.1f} s")
        if (lost := self._lost(outcome.round_id)) != "":
            line.append(f"  {lost}", "dim")
        self.console.print(line, soft_wrap=True)

    def _lost(self, round_id: int) -> str:
        mine = [v for v in self._vanished if v.round <= round_id]
        self._vanished = [v for v in self._vanished if v.round > round_id]
        named = [f"{v.device} {v.moment.value}" for v in mine[:_MAX_NAMED]]
        if len(mine) > _MAX_NAMED:
            named.append(f"{len(mine) - _MAX_NAMED} more")
        return f"lost {', '.join(named)}" if named else ""
