"""Known answers: JSON files of inputs and the bytes that must come out, failing cases too.

``x25519``, ``ed25519``, ``hkdf``, ``chacha20`` and ``hpke`` are public values of the RFCs they name.
``covey`` and ``messages`` are this project's own: `make` wrote them once and the tests hold them
fixed, so that a change of any byte on the wire shows. Bytes are in hex unless a file says otherwise.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from covey_shared.keys import Rng

_HERE = Path(__file__).parent


def load(name: str) -> Any:
    """The content of one file of vectors, by its name without ``.json``."""
    return json.loads((_HERE / f"{name}.json").read_text())


def save(name: str, document: Any) -> None:
    """Write one file of vectors. Only `make` calls it."""
    (_HERE / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def seeded(label: str) -> Rng:
    """A generator that gives the same bytes every time: the SHAKE-256 stream of `label`."""
    taken = 0

    def rng(n: int) -> bytes:
        nonlocal taken
        taken += n
        return hashlib.shake_256(label.encode()).digest(taken)[taken - n :]

    return rng
