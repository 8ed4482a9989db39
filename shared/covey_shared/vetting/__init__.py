"""What must be true of a plan's graph before onnxruntime may see it.

A plan comes over the network and is run: so it has to be data that can do nothing but compute. `vet` reads
the bytes of a graph strictly (`protobuf`), holds it to the rules (`graph`, `operators`) and raises
MalformedError for anything else. `step_bytes` tells what a step takes at least (`shapes`). What a graph
that keeps every rule may still do, take long or crash onnxruntime, is the trial's business
(`covey_device.trial`).

Sans-IO: bytes in, a graph or an error out.
"""

from covey_shared.vetting.graph import BATCH, Graph, Node, Ports, Tensor, ports, vet
from covey_shared.vetting.protobuf import PUBLIC
from covey_shared.vetting.shapes import peak_bytes, step_bytes

__all__ = [
    "BATCH",
    "PUBLIC",
    "Graph",
    "Node",
    "Ports",
    "Tensor",
    "peak_bytes",
    "ports",
    "step_bytes",
    "vet",
]
