"""Has a child process put parameters into a plan's graph, and bounds what that may cost.

Not in the service's own process: onnxruntime's session would stay in its memory between rounds, and a graph
that was never run here may crash it.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

import msgspec

from covey_device.confine import minimal_environment
from covey_device.home.child import Answer, Request, Written
from covey_shared.errors import TrainingError

POLL_S = 0.03
MAX_ANSWER_BYTES = 8192
IDLE_BYTES = 80_000_000
"""What an idle child holds at most: an interpreter, numpy and onnxruntime."""


class Exported(NamedTuple):
    """A model's file, in memory. fd: read it from its start; it is closed by who made it."""

    fd: int
    size: int
    shape: tuple[int, ...]


class UnfitError(TrainingError):
    """This model will never come to anything here, however often it is tried."""


@contextlib.asynccontextmanager
async def exported(
    header: bytes, graph: bytes, parameters: bytes, *, resident_bytes: int, seconds: float
) -> AsyncIterator[Exported]:
    """One ONNX file of a plan's header, its graph for inference and parameters.

    resident_bytes: how much more than an idle process the child may hold. Raises TrainingError if it comes to
    nothing, and UnfitError if it would come to nothing again.
    """
    with _memory("covey-model") as output, _memory("covey-request") as source:
        request = Request(len(header), len(graph), output, resident_bytes, seconds)
        head = msgspec.json.encode(request)
        for part in (len(head).to_bytes(4, "big"), head, header, graph, parameters):
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(source, rest) :]
        os.lseek(source, 0, os.SEEK_SET)
        del graph, parameters, part, rest
        # No preexec_fn: between fork and exec there may be no Python, since there are threads.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "covey_device.home.child"],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=minimal_environment(os.pathsep.join(filter(os.path.isabs, sys.path))),
            pass_fds=(output,),
            start_new_session=True,
        )
        with child:
            try:
                ended_by = await _watch(child, resident_bytes + IDLE_BYTES, seconds)
                answer = b"" if ended_by else _read(child)
            finally:
                child.kill()
        shape = _shape(answer, ended_by, child.returncode, resident_bytes, seconds)
        yield Exported(output, os.fstat(output).st_size, shape)


async def _watch(child: "subprocess.Popen[bytes]", resident_bytes: int, seconds: float) -> str:
    """Until it ends; what it is to be killed for: "" if nothing."""
    deadline = time.monotonic() + seconds
    while child.poll() is None:
        if time.monotonic() > deadline:
            return "seconds"
        if _resident(child.pid) > resident_bytes:
            return "memory"
        await asyncio.sleep(POLL_S)
    return ""


def _read(child: "subprocess.Popen[bytes]") -> bytes:
    """What it said, which is little and waits in the pipe."""
    assert child.stdout is not None  # noqa: S101  a pipe was asked for
    os.set_blocking(child.stdout.fileno(), False)
    with contextlib.suppress(BlockingIOError):
        return os.read(child.stdout.fileno(), MAX_ANSWER_BYTES)
    return b""


def _shape(
    data: bytes, ended_by: str, status: int, resident_bytes: int, seconds: float
) -> tuple[int, ...]:
    room = f"limits.max_memory_mb leaves it {max(resident_bytes, 0) / 1e6:.0f} MB"
    if ended_by == "memory":
        raise TrainingError(f"it needs more memory than there is ({room})")
    if ended_by == "seconds":
        raise TrainingError(f"it was not done after {seconds:.0f} s (limits.trial_seconds)")
    try:
        answer = msgspec.json.decode(data, type=Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # It may have been made to say anything.
        raise TrainingError(f"the process ended with status {status}") from None
    if isinstance(answer, Written):
        return answer.shape
    if answer.why == "memory":
        raise TrainingError(f"it needs more memory than there is ({room})")
    raise (UnfitError if answer.why == "refused" else TrainingError)(answer.detail)


def _resident(pid: int) -> int:
    """Resident bytes of another process; 0 where they cannot be seen."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0


@contextlib.contextmanager
def _memory(name: str) -> Iterator[int]:
    """A file in memory. No pipe: nobody has to feed it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
