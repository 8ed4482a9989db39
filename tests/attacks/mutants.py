"""Take out every check of the protocol in turn, and see that a test notices.

    python tests/attacks/mutants.py            all of them, half an hour on two cores
    python tests/attacks/mutants.py rules      those with "rules" in their file's path or their own name
    python tests/attacks/mutants.py --list     only say what would be done

Not a test itself: `pytest` does not collect this file. It works on copies of the packages in a
temporary folder, one for each core. A mutant is the code with

* one `raise` replaced by `pass`,
* one statement that only calls a check (`....check(...)`, `_check_...(...)`, `_refuse_...(...)`) or
  `forget()` replaced by `pass`,
* one `if ...: return` that drops or reports a message taken out,
* one side of an `and` or `or` left out, or
* one comparison of sizes moved by one (`<` for `<=` and so on).

What no test notices is printed, unless SURVIVORS says why it makes no difference.
"""

import ast
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECAGG = "shared/covey_shared/secagg"
ROUND = "coordinator/covey_coordinator/round.py"
SESSION = "device/covey_device/session.py"
POLICY = "device/covey_device/policy.py"
TARGETS = [
    *(f"shared/covey_shared/{name}.py" for name in ("wire", "keys", "sharing", "masking")),
    *(f"{SECAGG}/{name}.py" for name in ("rules", "cohort", "bitmap", "parameters")),
    *(f"{SECAGG}/{name}.py" for name in ("participant", "committee", "aggregator")),
    ROUND,
    SESSION,
    POLICY,
]
# The quick ones first: most mutants do not live to see the last.
TESTS = [
    "tests/shared/test_wire.py",
    "tests/shared/test_keys.py",
    "tests/shared/test_sharing.py",
    "tests/shared/test_masking.py",
    "tests/shared/test_messages.py",
    "tests/shared/test_secagg_roles.py",
    "tests/shared/test_secagg_aggregator.py",
    "tests/device/test_session.py",
    "tests/device/test_unfinished.py",
    "tests/attacks/test_attack_restarts.py",
    "tests/device/test_pace.py",
    "tests/coordinator/test_round.py",
    "tests/attacks/test_attack_policy.py",
    "tests/device/test_policy.py",
    "tests/attacks/test_attack_votes.py",
    "tests/attacks/test_attack_manifest.py",
    "tests/attacks/test_attack_boxes.py",
    "tests/attacks/test_attack_reveals.py",
    "tests/attacks/test_attack_uploads.py",
    "tests/attacks/test_attack_network.py",
    "tests/shared/test_secagg_restarts.py",
    "tests/shared/test_secagg_machine.py",
    "tests/shared/test_secagg_rounds.py",
]
# Where most mutants of a file are noticed.
FIRST = {
    "wire": "test_wire",
    "keys": "test_keys",
    "sharing": "test_sharing",
    "masking": "test_masking",
    "participant": "test_secagg_roles",
    "aggregator": "test_secagg_aggregator",
    "rules": "test_attack_manifest",
    "cohort": "test_attack_manifest",
    "committee": "test_attack_votes",
    "round": "test_round",
    "session": "test_session",
    "policy": "test_policy",
}
CHECKS = ("check", "_check_", "check_", "_refuse_", "verified_", "forget")
SHIFTED = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}

# A mutant may loop for ever; no test here takes half as long on a busy machine.
ENDLESS = "--timeout=120"

# That a property fails is enough; the smallest example of it takes most of the time.
NO_SHRINKING = """
import hypothesis

hypothesis.settings.register_profile(
    "mutants", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)
hypothesis.settings.load_profile("mutants")
"""

# (file, function, what) -> why no test can notice.
SURVIVORS: dict[tuple[str, str, str], str] = {
    ("participant", "Participant.mask", "self.index < peer.index"): (
        "the two are never equal: our own index is left out above"
    ),
    ("round", "Round._end_unmask", 'raise LocalProtocolError("unmasking without a sum")'): (
        "there is one since the updates were collected, two phases before; it is said for mypy"
    ),
    ("aggregator", "Aggregator.finish", "i < j"): (
        "the two are never equal: the one survived, the other was dropped"
    ),
    (
        "aggregator",
        "Aggregator._combine_into",
        "if len(chosen) < t: return",
    ): "fewer shares give secrets that fit no commitment: all targets are left over, a little later",
}


@dataclass(frozen=True)
class Mutant:
    """One change. at: (first line, first column, last line, last column), all as `ast` counts."""

    path: str
    function: str
    what: str
    at: tuple[int, int, int, int]
    instead: str

    @property
    def key(self) -> tuple[str, str, str]:
        return Path(self.path).stem, self.function, self.what

    def apply(self, source: str) -> str:
        lines = source.encode().split(b"\n")
        first, column, last, end = self.at
        before, after = lines[first - 1][:column], lines[last - 1][end:]
        lines[first - 1 : last] = [before + self.instead.encode() + after]
        return b"\n".join(lines).decode()


def mutants_of(path: str, root: Path = ROOT) -> Iterator[Mutant]:
    source = (root / path).read_text()
    seen: Counter[tuple[str, str]] = Counter()

    def mutant(node: ast.AST, function: str, what: str, instead: str) -> Mutant:
        what = " ".join(what.split())
        seen[function, what] += 1
        if seen[function, what] > 1:
            what += f" ({seen[function, what]})"
        at = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        return Mutant(path, function, what, at, instead)

    def walk(node: ast.AST, function: str) -> Iterator[Mutant]:
        text = ast.get_source_segment(source, node) or ""
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                function = f"{function}.{name}".lstrip(".")
            case ast.Raise():
                yield mutant(node, function, text, "pass")
            case ast.Expr(value=ast.Call(func=called)):
                name = (
                    called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                )
                if name.startswith(CHECKS):
                    yield mutant(node, function, text, "pass")
            case ast.If(test=test, body=[ast.Return()], orelse=[]):
                condition = ast.get_source_segment(source, test) or ""
                yield mutant(test, function, f"if {condition}: return", "False")
            case ast.BoolOp(op=op, values=sides):
                neutral = "False" if isinstance(op, ast.Or) else "True"
                for side in sides:
                    left_out = ast.get_source_segment(source, side) or ""
                    yield mutant(side, function, f"without {left_out}", neutral)
            case ast.Compare(ops=[op], comparators=[right]) if type(op) in SHIFTED:
                left = ast.get_source_segment(source, node.left)
                other = ast.get_source_segment(source, right)
                yield mutant(node, function, text, f"({left} {SHIFTED[type(op)]} {other})")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(ast.parse(source), "")


def noticed_by(copy: Path, first: str) -> str | None:
    """The first test that fails in the copy; None if all pass. first: the file to begin with."""
    tests = sorted(TESTS, key=lambda test: Path(test).stem != first)
    folders = [str(copy / folder) for folder in ("shared", "coordinator", "device", "deploy")]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", ENDLESS, *tests],
            cwd=copy,
            env={"PYTHONPATH": ":".join(folders), "PATH": "/usr/bin:/bin", "HOME": str(copy)},
            capture_output=True,
            text=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        return "the clock"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    # 2: a test file could not even be read, which says nothing about the mutant.
    if done.returncode == 2 or (failed is None and done.returncode != 0):
        raise SystemExit(done.stdout + done.stderr)
    return failed and failed[1]


def copied(to: Path) -> Path:
    """A copy of what the tests need."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("shared", "coordinator", "device", "deploy", "tests", "docs"):
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", to)
    with (to / "tests" / "conftest.py").open("a") as conftest:
        conftest.write(NO_SHRINKING)
    return to


def main(arguments: list[str]) -> int:
    wanted = [argument for argument in arguments if not argument.startswith("-")]
    mutants = [
        mutant
        for path in TARGETS
        for mutant in mutants_of(path)
        if not wanted or any(word in " ".join((path, *mutant.key)) for word in wanted)
    ]
    if "--list" in arguments:
        for mutant in mutants:
            print(*mutant.key, sep=" :: ")
        return 0
    left: list[Mutant] = []
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for index in range(cores := os.cpu_count() or 1):
            copies.put(copied(Path(folder) / str(index)))
        if (failed := noticed_by(Path(folder) / "0", TESTS[0])) is not None:
            raise SystemExit(f"{failed} fails without any mutant")

        def tried(mutant: Mutant) -> tuple[Mutant, str | None]:
            copy = copies.get()
            target = copy / mutant.path
            original = target.read_text()
            try:
                target.write_text(mutant.apply(original))
                return mutant, noticed_by(copy, FIRST.get(mutant.key[0], TESTS[0]))
            finally:
                target.write_text(original)
                copies.put(copy)

        with ThreadPoolExecutor(cores) as pool:
            for mutant, test in pool.map(tried, (m for m in mutants if m.key not in SURVIVORS)):
                print(*mutant.key, test or "SURVIVES", sep=" :: ", flush=True)
                if test is None:
                    left.append(mutant)
    known = {mutant.key for mutant in mutants}
    stale = [key for key in SURVIVORS if not wanted and key not in known]
    for key in stale:
        print("EXPLAINED, BUT GONE", *key, sep=" :: ")
    explained = sum(mutant.key in SURVIVORS for mutant in mutants)
    print(f"{len(mutants)} mutants, {explained} explained, {len(left)} survive")
    return 1 if left or stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
