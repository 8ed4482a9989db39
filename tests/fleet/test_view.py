"""What is shown of a run, on a terminal and elsewhere."""

import io

import numpy as np
import pytest
from rich.console import Console

from covey_coordinator.round import Completed, Moved, Phase
from covey_coordinator.run import RoundOutcome
from covey_coordinator.store import Progress
from covey_fleet.faults import Moment, Vanished
from covey_fleet.view import View
from covey_shared.fixedpoint import Encoding
from covey_shared.messages import DeviceId

ENCODING = Encoding(16, 4, 3, 1.0, 10)
ONE, TWO = DeviceId("pi-1"), DeviceId("pi-2")


def outcome(index: int, *, reason: str = "", accuracy: float = 0.5) -> RoundOutcome:
    completed = Completed(np.zeros(4, np.uint32), ENCODING, (ONE, TWO), ())
    return RoundOutcome(
        round_id=index,
        index=index,
        completed=None if reason else completed,
        reason=reason,
        after_uploads=False,
        cohort=2,
        seconds=1.25,
        phase_seconds={},
        bytes_in=0,
        bytes_out=0,
        metrics={} if reason else {"test_accuracy": accuracy},
    )


def shown(*, terminal: bool, width: int = 120) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, color_system=None)
    with View(console, 12, 10) as view:
        view.say("hello [bold]there")
        view.observe(Moved(Phase.GATHER, ""))
        view.observe(
            Progress(round=1, index=1, phase="collect", detail="", answered=7, awaited=9, present=8)
        )
        view._bar.refresh()
        view.observe(Vanished(ONE, 1, Moment.IN_UPLOAD))
        view.observe(Vanished(TWO, 2, Moment.BEFORE_REVEAL))
        view.observe(outcome(1, accuracy=0.876))
        view.observe(outcome(2, reason="2 updates arrived; at least 3 are needed"))
        for _ in range(5):
            view.observe(Vanished(ONE, 3, Moment.AFTER_UPLOAD))
        view.observe(outcome(3, accuracy=0.9))
        view._bar.refresh()
    return text.getvalue()


def test_elsewhere_than_on_a_terminal_there_are_whole_lines_and_nothing_else() -> None:
    assert shown(terminal=False, width=40).splitlines() == [
        "hello [bold]there",
        "round  1/12  sum of  2 devices   87.6% right   1.2 s  lost pi-1 in mid-upload",
        "round  2/12  abandoned: 2 updates arrived; at least 3 are needed   1.2 s  "
        "lost pi-2 before its reveal",
        "round  3/12  sum of  2 devices   90.0% right   1.2 s  "
        "lost pi-1 after its upload, pi-1 after its upload, pi-1 after its upload, 2 more",
    ]


@pytest.mark.parametrize(
    "words", ["devices train and upload", "7/9", "8 of 10 online", "3/12", "90.0% right"]
)
def test_on_a_terminal_bars_say_where_the_open_round_stands(words: str) -> None:
    assert words in shown(terminal=True)
