"""`covey-device doctor` finds a primitive that is wrong, and names it; its vectors and its tiny plan are
those that everything else is held to."""

import hashlib
import json
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.resources import files
from typing import Any

import msgspec
import numpy as np
import pytest
from Crypto.Cipher import ChaCha20

from covey_device.doctor import children, first_step, known_answers, packages, vectors
from covey_device.doctor.children import Ended
from covey_device.doctor.findings import Finding
from covey_device.doctor.known_answers import PRIMITIVES
from covey_shared import fixedpoint, keys, masking, sharing, wire
from vectors import load

# -- the vectors ---------------------------------------------------------------------------------

X25519, ED25519, COVEY, MESSAGES = (load(n) for n in ("x25519", "ed25519", "covey", "messages"))

SOURCES: dict[str, Any] = {
    "SHA256": load("sha256")["cases"],
    "DIGEST": COVEY["keys"]["digest"],
    "HKDF_RFC_5869": load("hkdf")["cases"],
    "HKDF": COVEY["keys"]["hkdf"],
    "X25519": X25519["multiply"],
    "X25519_AGREEMENT": X25519["agreement"],
    "ED25519": ED25519["valid"],
    "ED25519_REFUSED": ED25519["refused"],
    "SIGNATURE": COVEY["keys"]["signature"],
    "ROUND_KEYS": COVEY["keys"]["round_keys"],
    "HPKE_RFC_9180": load("hpke"),
    "BOX": COVEY["keys"]["box"],
    "CHACHA20": load("chacha20")["blocks"],
    "PAIR": COVEY["masking"]["pair"],
    "SELF": COVEY["masking"]["self"],
    "MASKED": COVEY["masking"]["masked"],
    "ENCODED": COVEY["fixedpoint"]["encoded"],
    "PACKED": COVEY["fixedpoint"]["packed"],
    "SHARES": COVEY["sharing"],
    "MESSAGES": MESSAGES["messages"],
    "MESSAGES_REFUSED": MESSAGES["refused"],
    "SIGNING_SEEDS": MESSAGES["seeds"],
}


@pytest.mark.parametrize("name", SOURCES)
def test_vectors_are_the_projects_own(name: str):
    shipped, source = getattr(vectors, name), SOURCES[name]
    if isinstance(shipped, dict):
        assert shipped == source
        return
    assert len(shipped) >= 1
    assert all(case in source for case in shipped)


def test_no_vectors_are_of_unknown_origin():
    own = {name for name in vars(vectors) if name.isupper()}
    assert own == {*SOURCES, "LONG", "LONG_SIZE"}


@pytest.mark.parametrize("case", vectors.LONG, ids=lambda case: str(case["lane_bits"]))
def test_the_long_vector_by_another_implementation(case: dict[str, Any]):
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    lane = np.dtype(f"<u{case['lane_bits'] // 8}")
    plain = np.arange(vectors.LONG_SIZE).astype(lane)

    def stream(key: bytes) -> np.ndarray:
        cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
        return np.frombuffer(cipher.update(bytes(plain.nbytes)), lane)

    masked = plain + stream(bytes(range(32))) - stream(bytes(range(32, 64)))
    assert hashlib.sha256(masked.tobytes()).hexdigest() == case["digest"]
    assert plain.nbytes > masking.BLOCK_BYTES  # so that it takes more than one


def test_sha256_as_the_standard_has_it():
    for case in load("sha256")["cases"]:
        assert hashlib.sha256(bytes.fromhex(case["message"])).hexdigest() == case["digest"]
    assert load("sha256")["cases"][0]["digest"].startswith("ba7816bf8f01cfea")


# -- a broken primitive --------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    """With one bit wrong."""
    return data[:-1] + bytes([data[-1] ^ 1])


def wrong(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose bytes have one bit wrong."""
    return lambda *args, **kwargs: flipped(bytes(function(*args, **kwargs)))


class WrongHash:
    """SHA-256 of something else."""

    def __init__(self, data: bytes = b"") -> None:
        self._state = REAL_SHA256(b"x" + data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


REAL_SHA256 = hashlib.sha256


class WrongStream:
    """ChaCha20 that is off in the last byte of each piece."""

    def __init__(self, **options: Any) -> None:
        self._cipher = ChaCha20.new(**options)

    new = classmethod(lambda cls, **options: cls(**options))

    def seek(self, position: int) -> None:
        self._cipher.seek(position)

    def encrypt(self, data: bytes, output: Any = None) -> bytes | None:
        if output is None:
            return flipped(self._cipher.encrypt(data))
        self._cipher.encrypt(data, output=output)
        memoryview(output).cast("B")[-1] ^= 1
        return None


class WrongHpke:
    """HPKE whose boxes are other bytes, on both sides alike."""

    AEAD = keys.HPKE.AEAD

    @staticmethod
    def new(*, info: bytes, **options: Any) -> Any:
        return REAL_HPKE_NEW(info=info + b"x", **options)


REAL_HPKE_NEW = keys.HPKE.new


def swapped_words(vector: Any, plus: Any, minus: Any) -> None:
    """Masks with the signs the wrong way round."""
    REAL_ADD_MASKS(vector, minus, plus)


REAL_ADD_MASKS = masking.add_masks


def off_in_the_second_block(vector: Any, plus: Any, minus: Any) -> None:
    REAL_ADD_MASKS(vector, plus, minus)
    per_block = masking.BLOCK_BYTES // vector.dtype.itemsize
    vector[per_block : per_block + 1] += 1


def verify_anything(*arguments: Any, **options: Any) -> None:
    pass


def sloppy_decode(data: bytes) -> Any:
    try:
        return REAL_DECODE(data)
    except Exception:
        return None


REAL_DECODE = wire.decode


def no_stochastic_rounding(self: Any, delta: Any, weight: int, metrics: Any, rng: Any) -> Any:
    return REAL_ENCODE(self, delta, weight, metrics, lambda n: bytes(n))


REAL_ENCODE = fixedpoint.Encoding.encode

BREAKS: list[tuple[str, object, str, object]] = [
    ("SHA-256", hashlib, "sha256", WrongHash),
    ("SHA-256", keys, "digest", wrong(keys.digest)),
    ("HKDF", keys, "HKDF", wrong(keys.HKDF)),
    ("HKDF", known_answers, "HKDF", wrong(keys.HKDF)),
    ("HKDF", keys, "hkdf", wrong(keys.hkdf)),
    ("X25519", keys, "key_agreement", wrong(keys.key_agreement)),
    ("X25519", known_answers, "key_agreement", wrong(keys.key_agreement)),
    ("X25519", keys, "mask_key", lambda seed: keys.AgreementKey(bytes(31) + b"x")),
    ("Ed25519", keys, "_signed_text", lambda label, body: body),
    ("Ed25519", keys.SigningKey, "sign", wrong(keys.SigningKey.sign)),
    ("Ed25519", keys, "verify", verify_anything),
    ("HPKE", keys, "HPKE", WrongHpke),
    ("HPKE", known_answers, "HPKE", WrongHpke),
    ("HPKE", keys.AgreementKey, "open", lambda self, box, **options: box[:-16][32:]),
    ("ChaCha20", masking, "ChaCha20", WrongStream),
    ("ChaCha20", masking, "keystream", wrong(masking.keystream)),
    ("mask keys", masking, "pair_mask_key", wrong(masking.pair_mask_key)),
    ("mask keys", masking, "self_mask_key", wrong(masking.self_mask_key)),
    ("mask keys", keys, "self_mask_commitment", wrong(keys.self_mask_commitment)),
    ("masks", masking, "add_masks", swapped_words),
    ("masks", masking, "add_masks", off_in_the_second_block),
    ("fixed point", fixedpoint.Encoding, "encode", no_stochastic_rounding),
    ("fixed point", fixedpoint, "_round_into", lambda out, *a: out.fill(1)),
    ("packing", fixedpoint, "pack", wrong(fixedpoint.pack)),
    ("packing", fixedpoint, "unpack", lambda data, n, bits, lane: np.zeros(n, lane)),
    ("Shamir shares", sharing, "split", lambda *a: REAL_SPLIT(*a)[::-1]),
    ("Shamir shares", sharing, "combine", lambda shares, **o: [bytes(16)]),
    ("Shamir shares", sharing, "_REDUCTION", 0x1B),
    ("messages", wire, "decode", sloppy_decode),
    ("messages", wire, "body_of", wrong(wire.body_of)),
]
REAL_SPLIT = sharing.split


def test_all_of_them_are_right_here():
    (found,) = known_answers.known_answers()
    assert found == Finding("known-answers", "ok", f"right: {', '.join(PRIMITIVES)}")


@pytest.mark.parametrize(
    ("name", "where", "what", "instead"),
    BREAKS,
    ids=[f"{b[0]}-{b[2]}-{i}" for i, b in enumerate(BREAKS)],
)
def test_a_broken_primitive_is_named_first(
    monkeypatch: pytest.MonkeyPatch, name: str, where: object, what: str, instead: object
):
    if what == "_REDUCTION":
        monkeypatch.setattr(sharing, "_R", np.uint64(0x1B))
    monkeypatch.setattr(where, what, instead)
    found = known_answers.known_answers()
    monkeypatch.undo()
    assert {finding.verdict for finding in found} == {"problem"}
    assert found[0].says.startswith(f"{name}: "), [finding.says for finding in found]
    assert "anew" in found[0].fix


def test_every_primitive_is_broken_by_some_of_these():
    assert {name for name, *_ in BREAKS} == set(PRIMITIVES)


# -- the tiny plan -------------------------------------------------------------------------------


def test_the_tiny_plan_equals_a_fresh_compile():
    from covey_fleet.models import TINY, tiny_files

    fresh = tiny_files()
    shipped = {path.name: path.read_bytes() for path in TINY.iterdir()}
    for name in ("plan.json", "train.onnx", "initial.bin"):
        assert shipped[name] == fresh[name], "model or compiler changed: `make plans`"
    assert set(shipped) == set(fresh)
    known, anew = (json.loads(files_["expected.json"]) for files_ in (shipped, fresh))
    assert (known["features"], known["labels"]) == (anew["features"], anew["labels"])
    # Torch's own, to its last digits but one: they hang on the processor.
    for name in ("losses", "parameters"):
        np.testing.assert_allclose(known["numbers"][name], anew["numbers"][name], rtol=0, atol=1e-6)
    assert sum(map(len, shipped.values())) < 10_000


def test_it_trains_to_torchs_numbers_here():
    found = first_step.first_step()
    assert found.verdict == "ok"
    assert found.says.startswith("3 steps of a tiny plan give torch's numbers")


def test_another_number_is_found():
    known = first_step.expected().numbers
    assert first_step.compare(known, known).verdict == "ok"
    for found in (
        msgspec.structs.replace(known, losses=[known.losses[0] + 1e-3, *known.losses[1:]]),
        msgspec.structs.replace(known, parameters=[*known.parameters[:-1], 0.0]),
        msgspec.structs.replace(known, parameters=[*known.parameters[:-1], float("nan")]),
        msgspec.structs.replace(known, parameters=known.parameters[:-1]),
        first_step.Numbers([], []),
    ):
        told = first_step.compare(found, known)
        assert told.verdict == "problem"
        assert "other numbers than torch" in told.says


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        (Ended("", "this processor has not the instructions (SIGILL)", ""), "SIGILL"),
        (Ended("", "its process ended with status 1", "MemoryError"), "MemoryError"),
        (Ended("", "", ""), "it said nothing"),
    ],
)
def test_a_step_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch, ended: Ended, says: str):
    monkeypatch.setattr(first_step, "run", lambda module: ended)
    found = first_step.first_step()
    assert found.verdict == "problem"
    assert says in found.says


def test_the_plan_is_package_data():
    names = {path.name for path in files("covey_device.doctor").joinpath("plan").iterdir()}
    assert names == {"plan.json", "train.onnx", "initial.bin", "expected.json"}


# -- packages ------------------------------------------------------------------------------------


def test_what_is_installed_is_told():
    (found,) = packages.packages()
    assert found.verdict == "ok"
    assert f"numpy {metadata.version('numpy')}" in found.says
    assert "torch" not in found.says
    assert set(packages.required()) == set(packages.MODULES)
    assert packages.required()["onnxruntime"] >= (1, 28)


def test_what_is_missing_or_too_old_is_told(monkeypatch: pytest.MonkeyPatch):
    needed = {"click": (99, 1), "no-such-thing": (1,), "numpy": (1, 26)}
    monkeypatch.setattr(packages, "required", lambda: needed)
    found = packages.packages()
    assert [finding.verdict for finding in found] == ["problem", "problem"]
    assert "covey needs 99.1 or later" in found[0].says
    assert found[1].says == "no-such-thing is not installed"


def test_what_cannot_be_imported_or_ends_its_process_is_told(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, ...]] = []

    def run(module: str, *names: str) -> Ended:
        asked.append(names)
        if "numpy" in names:  # the second of three
            return Ended("failed click ImportError: no\n", "it crashed (SIGSEGV)", "")
        return Ended("".join(f"imported {name}\n" for name in names), "", "")

    monkeypatch.setattr(packages, "run", run)
    monkeypatch.setattr(
        packages, "required", lambda: {"click": (8,), "numpy": (1,), "psutil": (5,)}
    )
    found = packages.packages()
    assert [finding.says for finding in found] == [
        "click cannot be imported: ImportError: no",
        "importing numpy failed: it crashed (SIGSEGV)",
    ]
    assert asked == [("click", "numpy", "psutil"), ("psutil",)]


@pytest.mark.parametrize(
    ("line", "version"),
    [("2.0.0rc1", (2, 0, 0)), ("8.1", (8, 1)), ("x", (0,)), ("1.2.post3", (1, 2))],
)
def test_versions(line: str, version: tuple[int, ...]):
    assert packages._numbers(line) == version


def test_a_child_that_crashes_hangs_or_speaks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "crashing.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    (tmp_path / "hanging.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    (tmp_path / "failing.py").write_text("import os; print(sorted(os.environ)); raise KeyError(3)")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("SECRET", "x")
    ended = children.run("crashing")
    assert ended.why == ("this processor has not the instructions that it was built for (SIGILL)")
    assert children.run("hanging", seconds=1.0) == Ended("here\n", "not done after 1 s", "")
    ended = children.run("failing")
    assert (ended.why, ended.error) == ("its process ended with status 1", "KeyError: 3")
    assert "SECRET" not in ended.output
    assert "ORT_DISABLE_TELEMETRY" in ended.output
