"""python -m fuzz, from the folder `tests`: see docs/fuzzing.md."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.harness import CORPUS, FOUND, Target, check, files_of, name_of, traced
from fuzz.targets import NAMES, target

TESTS = Path(__file__).parents[1]
WORK = TESTS.parent / ".fuzz"
"""Inputs that runs came across and that are not in the repository: the next run begins with them."""

RSS_LIMIT_MB = 2048
MAX_KEPT_BYTES = 75_000
"""Of one target's corpus in the repository; the smallest inputs go first."""

_STAT = re.compile(r"#(\d+)\s+\w+ +cov: (\d+) ft: (\d+)")


@dataclass
class Outcome:
    """What a run did. points: libFuzzer's "cov", edges of instrumented code; features: its "ft"."""

    runs: int = 0
    points: int = 0
    features: int = 0
    found: list[Path] = field(default_factory=list)
    log: str = ""


def main() -> int:
    """0: nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument(
        "--targets", default=",".join(NAMES), help="only these, separated by commas"
    )
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument("--replay", nargs="+", type=Path, help="inputs to judge, without atheris")
    parser.add_argument(
        "--minimise",
        action="store_true",
        help="write the corpus anew: the fewest and smallest inputs",
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder of inputs that runs come across"
    )
    given = parser.parse_args()
    names = given.targets.split(",")
    if unknown := set(names) - set(NAMES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if given.replay:
        return replay(given.replay)
    if given.minimise:
        for name in names:
            print(f"{name}: {minimise(target(name), given.work)}")
        return 0
    found: list[Path] = []
    for name in names:
        outcome = fuzz(target(name), given.seconds, given.work)
        print(
            f"{name:<12}{outcome.runs:>12,} runs{outcome.points:>7,} edges{outcome.features:>8,} features"
            f"{len(outcome.found):>4} found"
        )
        if outcome.found:
            print(outcome.log)
        found += outcome.found
    for path in found:
        print(f"again: {command(path)}")
    return int(bool(found))


def command(path: Path) -> str:
    """What shows a finding again."""
    return f"cd tests && ../.venv/bin/python -m fuzz --replay {path.relative_to(TESTS)}"


def replay(paths: list[Path]) -> int:
    """Judge inputs, each by the target whose folder it lies in. 0: nothing is wrong with them."""
    for path in paths:
        it = target(path.resolve().parent.name)
        with it.ready() as run, traced():
            print(f"{path}: {'; '.join(check(it, run, path.read_bytes())) or 'accepted'}")
    return 0


def fuzz(it: Target, seconds: int, work: Path) -> Outcome:
    """Run libFuzzer over a target. A finding is kept under `found`."""
    folder = work / it.name
    folder.mkdir(parents=True, exist_ok=True)
    for data in it.seeds():
        if len(data) <= it.longest:
            (folder / name_of(data)).write_bytes(data)
    with tempfile.TemporaryDirectory() as scratch:
        known = [str(f / it.name) for f in (CORPUS, FOUND) if (f / it.name).is_dir()]
        output = _child(
            it,
            Path(scratch),
            f"-max_total_time={seconds}",
            "-print_final_stats=1",
            str(folder),
            *known,
        )
        outcome = Outcome(log=output.stdout[-4000:])
        for match in _STAT.finditer(output.stdout):
            outcome.runs = max(outcome.runs, int(match[1]))
            outcome.points, outcome.features = int(match[2]), int(match[3])
        if match := re.search(r"number_of_executed_units: (\d+)", output.stdout):
            outcome.runs = max(outcome.runs, int(match[1]))
        for artifact in Path(scratch).glob("finding-*"):
            kept = FOUND / it.name / name_of(artifact.read_bytes())
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact, kept)
            outcome.found.append(kept)
        if output.returncode and not outcome.found:
            raise SystemExit(f"the fuzzer of {it.name} failed:\n{outcome.log}")
    return outcome


def minimise(it: Target, work: Path) -> str:
    """Keep of corpus and working folder the fewest inputs that reach everything both reach."""
    kept = CORPUS / it.name
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "merged"
        merged.mkdir()
        sources = [str(f) for f in (kept, work / it.name) if f.is_dir()]
        # Without counters: how often a loop ran is worth an input to a fuzzer, and not to a repository.
        merge = ("-set_cover_merge=1", "-use_counters=0")
        output = _child(it, Path(scratch), *merge, str(merged), *sources)
        if output.returncode:
            raise SystemExit(f"merging {it.name} failed:\n{output.stdout[-4000:]}")
        inputs = sorted((path.read_bytes() for path in merged.iterdir()), key=len)
    found: dict[str, bytes] = {}
    room = MAX_KEPT_BYTES
    for data in inputs:
        room -= len(data)
        if room >= 0:
            found[name_of(data)] = data
    if not found:
        raise SystemExit(f"merging {it.name} left nothing")
    kept.mkdir(parents=True, exist_ok=True)
    for path in kept.iterdir():
        if path.name not in found:
            path.unlink()
    for name, data in found.items():
        (kept / name).write_bytes(data)
    return f"{len(found)} inputs of {len(inputs)}, {sum(map(len, found.values())):,} bytes"


def _child(it: Target, scratch: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = scratch / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in it.words))
    program = scratch / "child"
    start = [sys.executable, "-m", "fuzz.child", it.name, str(program)]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(start)} "$@"\n')
    program.chmod(0o700)
    longest = max([it.longest, *(path.stat().st_size for path in files_of(it.name))])
    return subprocess.run(
        [
            *start,
            f"-artifact_prefix={scratch}/finding-",
            f"-timeout={it.seconds}",
            f"-rss_limit_mb={RSS_LIMIT_MB}",
            f"-max_len={longest}",
            "-mutate_depth=2",  # a mutator makes several changes itself; more leave little whole
            *([f"-dict={words}"] if it.words else []),
            *options,
        ],
        cwd=TESTS,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
