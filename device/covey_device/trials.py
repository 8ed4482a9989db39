"""Has a plan tried before the service itself runs it.

What a graph does is found out by running it, and a graph may be made to crash onnxruntime, to ask for
terabytes or to compute for hours. So the first time that a plan is seen, a step of it is run in a child
process (`trial`) under limits taken from the owner's, with the sizes of batches that the service will use.
Since no size inside a plan's step depends on the values of the data (`covey_shared.vetting`), what went well
there will do so here.

Only successes are remembered, in the device's state directory: by the plan's hash, the limits, and the
release of onnxruntime. Several devices that share a directory, as a simulated fleet does, try each plan once.
"""

import contextlib
import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from covey_device.budget import ResidentBytes, resident_bytes
from covey_device.confine import minimal_environment
from covey_device.trial import Done, Failed, Line, Loaded, Passed, Request, encode_request
from covey_shared.errors import TrainingError
from covey_shared.plan import PlanHeader, encode_header, plan_hash
from covey_shared.runtime import VERSION
from covey_shared.vetting import step_bytes, vet

log = logging.getLogger("covey.device")

USUAL_BATCH = 32
SMALL_BATCH = 64
"""Up to this size of batch all smaller ones are tried at once: the last batch of an epoch is as small as the
data leave it, and data change."""

WANTED_S = 2.0
POLL_S = 0.02
MAX_OUTPUT = 1 << 16
MAX_REMEMBERED = 20

TOO_LARGE = "the plan needs more memory than the device gives"
TOO_SLOW = "the plan takes longer than the device gives it"
CRASHED = "the plan crashed in its trial"
FAILED = "the plan failed in its trial"


class CancelledError(TrainingError):
    """The round is over that a plan was tried for."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the owner gives. max_resident_bytes: of the service's process. seconds: for one trial."""

    max_resident_bytes: int
    seconds: float
    threads: int


class _Remembered(msgspec.Struct, forbid_unknown_fields=True):
    plan: str
    onnxruntime: str
    max_resident_bytes: int
    threads: int
    sizes: list[int]
    grown: dict[
        int, int
    ] = {}  # size of batch -> bytes; of trials that were remembered without: none


class Trials:
    """Trials of a device. directory: of its state, made if it is not there."""

    def __init__(
        self,
        directory: Path,
        allowed: Callable[[], Allowed],
        *,
        resident: ResidentBytes = resident_bytes,
    ) -> None:
        """allowed: asked anew for every trial, since the owner's limits may change."""
        self._path = directory / "trials.json"
        self._allowed, self._resident = allowed, resident
        self._generation = 0

    def cancel(self) -> None:
        """End the trial that runs: nobody waits for it any more. From any thread."""
        self._generation += 1

    def of(self, header: PlanHeader, graph: bytes) -> "PlanTrial":
        """What tries this plan. Call it before the plan takes memory in this process."""
        return PlanTrial(self, header, graph, self._resident())

    def require(
        self,
        trial: "PlanTrial",
        needed: Sequence[int],
        wanted: Sequence[int],
        stop: Callable[[], bool],
    ) -> None:
        """Return when steps on batches of the needed sizes are known to go well.

        Raises MalformedError or TrainingError, `CancelledError` if it was stopped.
        """
        generation = self._generation
        allowed = self._allowed()
        free = _room(trial, allowed, needed)

        def ended() -> bool:
            return stop() or self._generation != generation

        with self._locked(ended):
            entry = _Remembered(
                trial.plan, VERSION, allowed.max_resident_bytes, allowed.threads, []
            )
            remembered = self._load()
            known = next((e for e in remembered if _same(e, entry)), entry)
            missing = [size for size in needed if size not in known.sizes]
            if not missing:
                return
            request = Request(
                header_bytes=len(trial.header_bytes),
                resident_bytes=free,
                seconds=allowed.seconds,
                threads=allowed.threads,
                needed=missing,
                wanted=[size for size in wanted if size not in (*known.sizes, *missing)],
                wanted_s=min(WANTED_S, allowed.seconds / 4),
            )
            went = _run(request, trial, ended)
            known.sizes = sorted({*known.sizes, *(step.size for step in went.steps)})
            known.grown = {**known.grown, **{step.size: step.grown_bytes for step in went.steps}}
            self._save([*(e for e in remembered if not _same(e, entry)), known])

    def need_bytes(self, trial: "PlanTrial", size: int) -> int | None:
        """What training on batches of this size has yet to take of memory, going by its trial; None: not
        known. What the process took since the plan was loaded it has taken already."""
        allowed = self._allowed()
        entry = _Remembered(trial.plan, VERSION, allowed.max_resident_bytes, allowed.threads, [])
        known = next((e for e in self._load() if _same(e, entry)), entry)
        if size not in known.grown:
            return None
        taken = max(0, self._resident() - trial.resident_before)
        return max(0, known.grown[size] - taken)

    # -- memory -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, stop: Callable[[], bool]) -> Iterator[None]:
        """One trial at a time, among all that share the directory. Without a disk, just go on: then
        nothing is remembered, and each plan is tried whenever it is loaded."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(
                self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError:
            yield
            return
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if stop():
                        raise CancelledError("the round is over") from None
                    time.sleep(POLL_S)
            yield
        finally:
            os.close(fd)

    def _load(self) -> list[_Remembered]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[_Remembered])
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return []  # at worst a trial more

    def _save(self, remembered: list[_Remembered]) -> None:
        fresh = self._path.with_suffix(".new")
        data = msgspec.json.encode(remembered[-MAX_REMEMBERED:])
        try:
            fresh.unlink(missing_ok=True)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:  # noqa: PTH123
                file.write(data)
            fresh.replace(self._path)
        except OSError as error:
            log.warning("cannot remember the trial of a plan in %s: %s", self._path, error.strerror)


def _room(trial: "PlanTrial", allowed: Allowed, sizes: Sequence[int]) -> int:
    """Bytes that a trial may grow by. Raises TrainingError if the largest batch is sure to need more."""
    free = allowed.max_resident_bytes - trial.resident_before
    for size in sorted(sizes)[-1:]:
        least = step_bytes(trial.header, vet(trial.header, trial.graph, "train"), size)
        if least > free:
            raise TrainingError(
                f"plan {trial.header.name!r} needs at least {least / 1e6:,.1f} MB for a step on a "
                f"batch of {size}, and limits.max_memory_mb leaves {max(free, 0) / 1e6:.1f} MB beside "
                "what the process holds already: the device declines; a smaller batch_size may do",
                public=TOO_LARGE,
            )
    return free


def _same(one: _Remembered, other: _Remembered) -> bool:
    return (one.plan, one.onnxruntime, one.max_resident_bytes, one.threads) == (
        other.plan, other.onnxruntime, other.max_resident_bytes, other.threads,
    )  # fmt: skip


class PlanTrial:
    """A plan and where it is tried. Keeps the graph's bytes, for sizes that are asked for later."""

    def __init__(
        self, trials: Trials, header: PlanHeader, graph: bytes, resident_before: int
    ) -> None:
        self._trials = trials
        self.header, self.graph = header, graph
        self.header_bytes = encode_header(header)
        self.plan = plan_hash(self.header_bytes).hex()
        self.resident_before = resident_before

    def load(self, n_examples: int) -> None:
        """Before the service loads the plan: its graph can be, and a step on one example goes well."""
        usual = min(USUAL_BATCH, n_examples)
        wanted = [usual, *range(2, usual)] if usual > 1 else []
        self._trials.require(self, [1], wanted, lambda: False)

    def need_bytes(self, size: int) -> int | None:
        """Memory that training on batches of this size has yet to take; None: not known."""
        return self._trials.need_bytes(self, size)

    def batches(self, batch_size: int, n_examples: int, stop: Callable[[], bool]) -> None:
        """Before training: steps on every size of batch that this work has go well."""
        full = min(batch_size, n_examples)
        needed = [full, *([n_examples % full] if n_examples % full else [])]
        wanted = range(1, full) if full <= SMALL_BATCH else ()
        self._trials.require(self, needed, list(wanted), stop)


def measure(
    header: PlanHeader,
    graph: bytes,
    batch_size: int,
    repeats: int,
    allowed: Allowed,
    *,
    resident_before: int,
) -> "Went":
    """Time and memory of steps on batches of one size, in a trial that nothing remembers.

    The first step is the slowest, and always there; of the others as many as a few seconds allow.
    resident_before: what the service would hold already. Raises what a trial raises.
    """
    nowhere = Trials(Path(os.devnull), lambda: allowed, resident=lambda: resident_before)
    trial = nowhere.of(header, graph)
    request = Request(
        header_bytes=len(trial.header_bytes),
        resident_bytes=_room(trial, allowed, [batch_size]),
        seconds=allowed.seconds,
        threads=allowed.threads,
        needed=[batch_size],
        wanted=[batch_size] * repeats,
        wanted_s=min(WANTED_S, allowed.seconds / 4),
    )
    return _run(request, trial, lambda: False)


# -- the child -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Went:
    """How a trial went, if it went well. seconds: all of it, with the start of its process. loaded_s: until
    the graph was loaded. steps: the needed sizes among them, in the order they were asked for."""

    seconds: float
    loaded_s: float
    steps: list[Passed]


def _run(request: Request, trial: PlanTrial, stop: Callable[[], bool]) -> Went:
    """Run a trial. Raises TrainingError unless the needed sizes went well."""
    started = time.monotonic()
    with _file_of(encode_request(request, trial.header_bytes, trial.graph)) as source:
        # No preexec_fn: between fork and exec there may be no Python, since there are threads.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "covey_device.trial"],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=minimal_environment(os.pathsep.join(filter(os.path.isabs, sys.path))),
            start_new_session=True,
        )
    with child:
        try:
            output, ended_by = _watch(child, request, started, stop)
        finally:
            child.kill()
    seconds = time.monotonic() - started
    lines = _lines(output)
    passed = [line for line in lines if isinstance(line, Passed)]
    name = f"plan {trial.header.name!r} {trial.plan[:12]}"
    failed = next((line for line in lines if isinstance(line, Failed)), None)
    missing = sorted(set(request.needed) - {line.size for line in passed})
    if not missing:
        log.info(
            "%s: tried in %.1f s: at most %.0f MB, %.3f s a step",
            name, seconds, max(p.grown_bytes for p in passed) / 1e6, max(p.seconds for p in passed),
        )  # fmt: skip
        loaded_s = next((line.seconds for line in lines if isinstance(line, Loaded)), 0.0)
        return Went(seconds, loaded_s, passed)
    if ended_by == "stop":
        raise CancelledError(f"{name}: the round was over before its trial was")
    where = f"{name}, tried on a batch of {missing[0]}"
    room = f"limits.max_memory_mb leaves it {max(request.resident_bytes, 0) / 1e6:.0f} MB"
    if ended_by == "memory" or (failed and failed.why == "memory"):
        raise TrainingError(
            f"{where}: it needs more memory than there is ({room}): the device declines",
            public=TOO_LARGE,
        )
    if ended_by == "seconds" or child.returncode == -signal.SIGXCPU:
        raise TrainingError(
            f"{where}: not done after {seconds:.0f} s (limits.trial_seconds): the device declines",
            public=TOO_SLOW,
        )
    if failed is None:
        raise TrainingError(
            f"{where}: the process ended with status {child.returncode}: the device declines",
            public=CRASHED,
        )
    raise TrainingError(f"{where}: {failed.detail}: the device declines", public=FAILED)


def _watch(
    child: "subprocess.Popen[bytes]", request: Request, started: float, stop: Callable[[], bool]
) -> tuple[bytes, str]:
    """-> what the child said, at most `MAX_OUTPUT`, and what ended it: "", or why it is to be killed."""
    assert child.stdout is not None  # noqa: S101  a pipe was asked for
    pipe = child.stdout.fileno()
    os.set_blocking(pipe, False)
    output = bytearray()
    while True:
        ready = select.select([pipe], [], [], POLL_S)[0]
        if ready and len(output) <= MAX_OUTPUT:
            part = os.read(pipe, MAX_OUTPUT)
            output += part
            if not part or _is_done(output):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_S)
                return bytes(output), ""
        if stop():
            return bytes(output), "stop"
        if time.monotonic() - started > request.seconds:
            return bytes(output), "seconds"
        if len(output) > MAX_OUTPUT:
            return b"", "output"
        if _resident(child.pid) > max(request.resident_bytes, 0) + _IDLE_BYTES:
            return bytes(output), "memory"


_IDLE_BYTES = 80_000_000
"""What an idle child holds at most: an interpreter, numpy and onnxruntime. It judges its own growth
exactly; this bound is for what happens inside one operator."""


def _resident(pid: int) -> int:
    """Resident bytes of another process; 0 where they cannot be seen."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0


def _is_done(output: bytearray) -> bool:
    return output.endswith(b"\n") and any(
        isinstance(line, Done | Failed) for line in _lines(bytes(output))
    )


def _lines(output: bytes) -> list[Line]:
    """What the child said, as far as it makes sense: it may have been made to say anything."""
    lines: list[Line] = []
    for line in output.split(b"\n"):
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            lines.append(msgspec.json.decode(line, type=Line))
    return lines


@contextlib.contextmanager
def _file_of(parts: list[bytes]) -> Iterator[int]:
    """A file in memory that holds these, to be read from its start. No pipe: nobody has to feed it."""
    fd = os.memfd_create("covey-trial", os.MFD_CLOEXEC)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(fd, rest) :]
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)
