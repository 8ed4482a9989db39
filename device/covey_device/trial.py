"""Loads a plan and runs its step, in a process that may be lost: ``python -m covey_device.trial``.

Started by `trials`. Reads a request from its standard input, gives up everything it does not need, loads
the graph and trains on zeros, and says on its standard output after each size of batch that it went well.
If onnxruntime crashes, allocates without end or never comes back, this process ends, and the service that
asked goes on. It imports only what a step needs.
"""

import os
import sys
import time

import msgspec
import numpy as np

from covey_device.confine import confine
from covey_shared.errors import MalformedError, TrainingError
from covey_shared.plan import PlanHeader, decode_header
from covey_shared.runtime import OUT_OF_MEMORY, TrainStep


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What to try. It is followed by the header's bytes and by the graph's.

    needed: sizes of batches that have to go well. wanted: further ones, as long as wanted_s has not passed.
    resident_bytes: how much more than an idle process this one may hold.
    """

    header_bytes: int
    resident_bytes: int
    seconds: float
    threads: int
    needed: list[int]
    wanted: list[int]
    wanted_s: float


class Loaded(msgspec.Struct, tag=True):
    """The graph was vetted and onnxruntime has it; it took so long."""

    seconds: float


class Passed(msgspec.Struct, tag=True):
    """A step on so many examples went well; it took so long, and so much memory at its highest."""

    size: int
    seconds: float
    grown_bytes: int


class Failed(msgspec.Struct, tag=True):
    """It did not. why: "memory", "refused" or "failed". detail: for the device's own log."""

    why: str
    detail: str


class Done(msgspec.Struct, tag=True):
    """Nothing more is to come."""


Line = Loaded | Passed | Failed | Done
MAX_DETAIL = 600


def encode_request(request: Request, header: bytes, graph: bytes) -> list[bytes]:
    """The parts of a request, in their order."""
    head = msgspec.json.encode(request)
    return [len(head).to_bytes(4, "big"), head, header, graph]


def _say(line: Line) -> None:
    os.write(1, msgspec.json.encode(line) + b"\n")


def _peak(status: int) -> int:
    """Highest resident memory so far, from /proc/self/status; 0 where there is none."""
    for line in os.pread(status, 1 << 14, 0).splitlines() if status >= 0 else ():
        if line.startswith(b"VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def _try(header: PlanHeader, graph: bytes, request: Request, status: int) -> None:
    start, idle = time.monotonic(), _peak(status)
    step = TrainStep(header, graph, threads=request.threads)
    _say(Loaded(time.monotonic() - start))
    parameters = np.zeros(header.n_params, np.float32)
    for number, size in enumerate([*request.needed, *request.wanted]):
        began = time.monotonic()
        if number >= len(request.needed) and began - start > request.wanted_s:
            break
        step.load(parameters)
        step.step(
            np.zeros((size, *header.features.shape), header.features.dtype),
            np.zeros((size, *header.labels.shape), header.labels.dtype),
        )
        step.parameters()
        grown = _peak(status) - idle
        if grown > request.resident_bytes:
            if number >= len(request.needed):
                break
            raise MemoryError
        _say(Passed(size, time.monotonic() - began, grown))
    _say(Done())


def main() -> None:
    """Serve one request."""
    with open(0, "rb") as source:
        head = msgspec.json.decode(source.read(int.from_bytes(source.read(4), "big")), type=Request)
        header = decode_header(source.read(head.header_bytes))
        graph = source.read()
    try:
        status = os.open("/proc/self/status", os.O_RDONLY)
    except OSError:
        status = -1
    confine(head.resident_bytes, head.seconds)
    try:
        _try(header, graph, head, status)
    except MemoryError:
        _say(Failed("memory", "out of memory"))
    except MalformedError as error:
        _say(Failed("refused", str(error)[:MAX_DETAIL]))
    except TrainingError as error:
        why = "memory" if error.public == OUT_OF_MEMORY else "failed"
        _say(Failed(why, str(error)[:MAX_DETAIL]))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # no more code of a graph's making: destructors may crash as well
