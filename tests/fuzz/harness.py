"""One input, one target, one verdict. Knows nothing of atheris.

An input is a finding if anything but the target's own errors comes out, if it takes more memory than the
target declares for an input of that size, or if an error is too long for a line of a log.
"""

import contextlib
import hashlib
import random
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from covey_shared.errors import RemoteProtocolError

HERE = Path(__file__).parent
CORPUS, FOUND = HERE / "corpus", HERE / "found"

MAX_ERROR_CHARS = 4096
"""Of an error that bytes from the network cause: it goes into a log as it is."""

Run = Callable[[bytes], Iterable[str] | None]
"""Reads an input. What it gives back is what came of the input, in words: one that brings about something
new is worth keeping, also where msgspec and OpenSSL decide, whose code is not instrumented."""

Mutate = Callable[[bytes, int], bytes]
"""(data, most bytes) -> data changed a little, by libFuzzer or in its place."""

Mutator = Callable[[bytes, int, random.Random, Mutate], bytes]
"""(input, most bytes, chance, for parts of it) -> another input."""

T = TypeVar("T")


class FindingError(AssertionError):
    """What must not happen did."""


@dataclass(frozen=True)
class Target:
    """Something that reads bytes from others.

    ready: makes what is needed once, and gives the function that reads; that one raises `allowed` for bad
    input. memory: most bytes at any moment of an input of n bytes. seeds: inputs to begin with. mutate: makes
    inputs that go deeper than changed bytes do. words: for libFuzzer's dictionary. longest: of an input.
    seconds: that one input may take; an instrumented, traced interpreter on a busy machine is slow.
    """

    name: str
    ready: Callable[[], contextlib.AbstractContextManager[Run]]
    memory: Callable[[int], int]
    seeds: Callable[[], Iterable[bytes]]
    mutate: Mutator | None = None
    words: tuple[bytes, ...] = ()
    allowed: tuple[type[Exception], ...] = (RemoteProtocolError,)
    longest: int = 4096
    seconds: int = 10


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Allocations are counted in here."""
    before = tracemalloc.is_tracing()
    if not before:
        tracemalloc.start(1)
    try:
        yield
    finally:
        if not before:
            tracemalloc.stop()


def check(target: Target, run: Run, data: bytes) -> list[str]:
    """One input; what came of it, in words. Raises FindingError, or what came out.

    Called while allocations are traced.
    """
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    outcome, words = [], ""
    try:
        outcome += run(data) or ()
    except target.allowed as error:
        words = str(error)
        outcome.append(f"{type(error).__name__}: {words}")
    _, peak = tracemalloc.get_traced_memory()
    most = target.memory(len(data))
    if peak - before > most:
        raise FindingError(
            f"{peak - before:,} bytes of memory for an input of {len(data):,}; at most {most:,}"
        )
    if len(words) > MAX_ERROR_CHARS and RemoteProtocolError in target.allowed:
        raise FindingError(f"an error of {len(words):,} characters: {words[:80]!a}...")
    return outcome


def refused(allowed: type[Exception], read: Callable[[], T]) -> T | None:
    """What `read` gives, or None if it raised the error that it may raise."""
    try:
        return read()
    except allowed:
        return None


def expect(condition: bool, what: str) -> None:
    """A property that no input may break."""
    if not condition:
        raise FindingError(what)


def name_of(data: bytes) -> str:
    """What an input's file is called."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def files_of(target: str) -> list[Path]:
    """Everything of a target that is kept: its corpus and what was found."""
    return [p for folder in (CORPUS, FOUND) for p in sorted((folder / target).glob("*"))]
