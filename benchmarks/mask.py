"""What masking costs one device, beside the keystream that no implementation can do without.

For 10^6 parameters of 16 value bits and 10, 50 and 100 peers: encode, mask (all peers' streams and
the device's own) and pack, against the bare ChaCha20 keystream of the same number of bytes. Both run
in turn within one process, so that a busy machine slows both; what is compared are the medians.
Also the size of one masked update on the wire, with the frames it travels in.

    python benchmarks/mask.py [--json FILE]

Ends with status 1 if a bound is broken.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from _report import Row, report
from Crypto.Cipher import ChaCha20

from covey_shared import chunks, fixedpoint, keys, masking, messages, wire
from covey_shared.fixedpoint import Encoding

N_PARAMS = 10**6
VALUE_BITS = 16
LARGEST_RATIO = {10: 2.0, 50: 1.5, 100: 1.5}
"""Peers -> how many times the keystream's own time the whole may take."""
REPEATS = {10: 15, 50: 9, 100: 7}
MOST_BITS_PER_PARAMETER = 23 * 1.01


def encoding_for(n_devices: int) -> Encoding:
    """The encoding of a cohort of n_devices, with one metric."""
    return Encoding(VALUE_BITS, n_devices, N_PARAMS, 1.0, 1000, (10.0,))


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare_keystream(streams: list[bytes], n_bytes: int) -> None:
    """n_bytes of every stream into one buffer that stays in cache: the least there is to do."""
    zeros, out = bytes(masking.BLOCK_BYTES), bytearray(masking.BLOCK_BYTES)
    for key in streams:
        cipher = ChaCha20.new(key=key, nonce=bytes(12))
        for start in range(0, n_bytes, masking.BLOCK_BYTES):
            size = min(masking.BLOCK_BYTES, n_bytes - start)
            cipher.encrypt(memoryview(zeros)[:size], output=memoryview(out)[:size])


def time_rows(n_peers: int) -> list[Row]:
    """Encode + mask + pack of one device against the keystream, for one number of peers."""
    encoding = encoding_for(n_peers + 1)
    delta = np.random.default_rng(1).normal(0, 0.1, N_PARAMS).astype(np.float32)
    streams = [os.urandom(32) for _ in range(n_peers + 1)]  # the last is the device's own
    plus, minus = [*streams[: n_peers // 2], streams[-1]], streams[n_peers // 2 : -1]
    n_bytes = encoding.n_coordinates * encoding.lane.itemsize

    def device() -> bytes:
        ring = encoding.encode(delta, 500, (1.0,), os.urandom)
        masking.add_masks(ring, plus, minus)
        return fixedpoint.pack(ring, encoding.bits)

    def bare() -> None:
        bare_keystream(streams, n_bytes)

    device()  # warm up
    bare()
    ours, theirs = [], []
    for _ in range(REPEATS[n_peers]):
        ours.append(seconds(device))
        theirs.append(seconds(bare))
    whole, least = statistics.median(ours), statistics.median(theirs)
    most = LARGEST_RATIO[n_peers]
    name = f"{n_peers} peers"
    return [
        Row(f"{name}: encode + mask + pack", whole * 1e3, "ms", "", True),
        Row(f"{name}: keystream alone", least * 1e3, "ms", "", True),
        Row(f"{name}: ratio", whole / least, "times", f"<= {most}", whole / least <= most),
    ]


def size_rows(n_devices: int) -> list[Row]:
    """Bytes on the wire of one masked update: the packed vector in its frames, and the message."""
    encoding = encoding_for(n_devices)
    payload = fixedpoint.pack(np.zeros(encoding.n_coordinates, encoding.lane), encoding.bits)
    frames = list(chunks.split(chunks.blob_of(payload)))
    message = messages.MaskedUpdate(
        h=messages.ManifestDigest(bytes(32)),
        device=messages.DeviceId("d" * 32),
        u2=bytes(messages.MAX_COHORT // 8),
        payload=bytes(32),
        payload_bytes=len(payload),
    )
    envelope = wire.sign(message, keys.SigningKey(bytes(32))).envelope
    total = sum(map(len, frames)) + len(envelope)
    bits = 8 * total / N_PARAMS
    name = f"{n_devices} devices"
    return [
        Row(f"{name}: masked update, {len(frames)} frames and message", total, "bytes", "", True),
        Row(
            f"{name}: on the wire",
            bits,
            "bits/parameter",
            f"<= {MOST_BITS_PER_PARAMETER:g}",
            bits <= MOST_BITS_PER_PARAMETER,
        ),
    ]


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows here.")
def main(json_path: Path | None) -> None:
    """Measure one device's masking for 10^6 parameters of 16 value bits."""
    rows = [row for n_peers in LARGEST_RATIO for row in time_rows(n_peers)]
    rows += size_rows(100)
    sys.exit(0 if report(rows, json_path) else 1)


if __name__ == "__main__":
    main()
