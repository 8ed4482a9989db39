"""Puts a model's parameters into its graph, in a process that may be lost.

``python -m covey_device.home.child``, started by `export`. Reads a request from its standard input, has
onnxruntime write one ONNX file into the descriptor that it was given, runs that once on an example of zeros,
and says on its standard output how it went. If onnxruntime crashes, allocates without end or never comes
back, this process ends, and the service that asked goes on.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from covey_device.confine import confine

if TYPE_CHECKING:
    from covey_shared.layout import Flat
    from covey_shared.plan import PlanHeader

FILES = 64
"""Descriptors that it may have: onnxruntime opens the file that it writes by its name."""


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What to put together. It is followed by the header's bytes, the graph's and the parameters'.

    output: the descriptor to write to. resident_bytes: how much more than an idle process this one may hold.
    """

    header_bytes: int
    graph_bytes: int
    output: int
    resident_bytes: int
    seconds: float


class Written(msgspec.Struct, tag=True):
    """It is written, and gives predictions of this shape."""

    shape: tuple[int, ...]


class Refused(msgspec.Struct, tag=True):
    """It is not. why: "memory", "refused" or "failed". detail: for the device's own log."""

    why: str
    detail: str


Answer = Written | Refused
MAX_DETAIL = 600


def file_bytes(header_bytes: int, graph_bytes: int, parameter_bytes: int) -> int:
    """The most that the file may have: what it is made of, spelled out, and some for names."""
    return parameter_bytes + 2 * graph_bytes + header_bytes + (1 << 20)


def _answer(output: int, header: "PlanHeader", graph: bytes, parameters: "Flat") -> Answer:
    from covey_shared.errors import MalformedError, TrainingError
    from covey_shared.runtime import OUT_OF_MEMORY, try_export

    try:
        return Written(try_export(header, graph, parameters, Path(f"/proc/self/fd/{output}")))
    except MemoryError:
        return Refused("memory", "out of memory")
    except MalformedError as error:
        return Refused("refused", str(error)[:MAX_DETAIL])
    except TrainingError as error:
        why = "memory" if error.public == OUT_OF_MEMORY else "failed"
        return Refused(why, str(error)[:MAX_DETAIL])


def main() -> None:
    """Serve one request."""
    # Not at the top: the service imports this module for what it says, and no onnxruntime with it.
    import numpy as np

    import covey_shared.runtime  # noqa: F401  before nothing can be loaded any more
    from covey_shared.plan import decode_header

    with open(0, "rb") as source:
        request = msgspec.json.decode(
            source.read(int.from_bytes(source.read(4), "big")), type=Request
        )
        header = decode_header(source.read(request.header_bytes))
        graph = source.read(request.graph_bytes)
        parameters = np.frombuffer(source.read(), "<f4").astype(np.float32, copy=False)
    # The unit's filter forbids it, whose priority is that already.
    with contextlib.suppress(OSError):
        os.nice(19)
    most = file_bytes(request.header_bytes, request.graph_bytes, parameters.nbytes)
    confine(request.resident_bytes, request.seconds, files=FILES, file_bytes=most)
    os.write(1, msgspec.json.encode(_answer(request.output, header, graph, parameters)))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # no more code of a graph's making: destructors may crash as well
