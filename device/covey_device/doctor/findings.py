"""What a check says: a verdict, one line of why, and what to do."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "problem", "unknown"]

SEVERITY: tuple[Verdict, ...] = ("ok", "unknown", "note", "problem")
"""Rising."""


@dataclass(frozen=True, slots=True)
class Finding:
    """verdict: "ok"; "note", this device works, but better to know; "problem", it will not do its work;
    "unknown", it could not be found out. says: one line. fix: what to do about it; empty if nothing."""

    check: str
    verdict: Verdict
    says: str
    fix: str = ""

    def line(self) -> str:
        """For people."""
        fix = f" Fix: {self.fix}" if self.fix else ""
        end = "" if self.says.endswith((".", "?")) or not fix else "."
        return f"{self.verdict:<8} {self.check}: {self.says}{end}{fix}"


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The gravest of them; "ok" of none."""
    return max(verdicts, key=SEVERITY.index, default="ok")


def combined(check: str, parts: list[Finding]) -> Finding:
    """Several findings as the one line of a check: the gravest first."""
    ordered = sorted(parts, key=lambda part: -SEVERITY.index(part.verdict))
    fixes = dict.fromkeys(part.fix for part in ordered if part.fix)
    return Finding(
        check,
        worst(part.verdict for part in parts),
        "; ".join(part.says for part in ordered),
        "; ".join(fixes),
    )


def guarded(check: str, look: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """A check that fails itself must not keep the others from being made."""
    try:
        found = look()
    except Exception as error:
        says = f"this could not be found out: {type(error).__name__}: {error}"
        fix = "report this as a bug of covey"
        return [Finding(check, "unknown", says, fix)]
    return found if isinstance(found, list) else [found]
