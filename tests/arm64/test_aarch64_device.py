"""What the installed package is worth on aarch64: its libraries, its primitives, its arithmetic.

Everything of the device's comes from the package; only the tests of its primitives, and pytest, do not.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from arm64.conftest import each, timed
from arm64.userlands import GUEST, ROOT, Userland, fetch_pytest

pytestmark = [pytest.mark.arm64, pytest.mark.timeout(600)]

PLANS = ROOT / "deploy" / "covey_fleet" / "plans"
STEPS = 5

PRIMITIVES = ("keys", "masking", "sharing", "fixedpoint", "messages")
"""Tests of these hold them to the RFCs' known answers, and to covey's own: every byte on the wire."""


def primitives(userland: Userland) -> None:
    binds = {"tools": fetch_pytest(userland), "tests": ROOT / "tests", "guest": GUEST}
    inside = {name: f"/run/covey-tests/{name}" for name in binds}
    with timed(f"{userland.release}: the tests of {', '.join(PRIMITIVES)}"):
        done = userland.run(
            *("/usr/bin/env", f"PYTHONPATH={':'.join(inside.values())}"),
            *("PYTHONDONTWRITEBYTECODE=1", "/opt/covey/bin/python", "-m", "pytest", "-q"),
            *("-p", "fewer_examples", "-p", "no:cacheprovider", "-c", "/dev/null"),
            *("--noconftest", "--import-mode=importlib", f"--rootdir={inside['tests']}"),
            *(f"{inside['tests']}/shared/test_{name}.py" for name in PRIMITIVES),
            seconds=400,
            **binds,
        )
    said = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, said
    last = done.stdout.strip().splitlines()[-1].split()
    assert last[1] == "passed", said
    assert int(last[0]) > 400, said
    assert "skipped" not in last, said


def test_primitives_give_the_known_answers(userlands: list[Userland]) -> None:
    each(userlands, primitives)


def trained(command: list[str], seconds: float) -> tuple[np.ndarray, str]:
    """What a run of guest/step.py gives -> float32 values, and on which machine."""
    # The path is for this machine's Python; an emulated one gets an environment of its own.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, timeout=seconds, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, "<f4"), done.stderr.decode().splitlines()[-1]


@pytest.mark.parametrize("plan", ["mlp", "cnn"])
def test_training_gives_the_same_numbers_as_here(plan: str, userlands: list[Userland]) -> None:
    """onnxruntime has other code for each processor, and sums in another order: not the same bits."""
    native = [sys.executable, str(GUEST / "step.py"), str(PLANS / plan), str(STEPS)]
    expected, _ = trained(native, 120)

    def emulated(userland: Userland) -> tuple[np.ndarray, str]:
        program = ("/opt/covey/bin/python", "/run/covey-tests/guest/step.py")
        arguments = (f"/run/covey-tests/plans/{plan}", STEPS)
        with timed(f"{userland.release}: {STEPS} steps of {plan}, its start included"):
            return trained(userland.command(*program, *arguments, guest=GUEST, plans=PLANS), 200)

    initial = np.fromfile(PLANS / plan / "initial.bin", "<f4")
    assert np.abs(expected[STEPS:] - initial).max() > 1e-2  # so there is something to agree on
    for userland, (found, machine) in zip(userlands, each(userlands, emulated), strict=True):
        assert machine.startswith(f"aarch64 {userland.python}.")
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_installed_is_for_aarch64(userlands: list[Userland]) -> None:
    """Every library of the package, by its ELF header: 64 bits, machine 183."""
    for userland in userlands:
        libraries = [p for p in (userland.root / "opt/covey").rglob("*.so*") if p.is_file()]
        assert len(libraries) > 20
        heads = {path.read_bytes()[:20] for path in libraries}
        assert {(head[:5], head[18:20]) for head in heads} == {(b"\x7fELF\x02", b"\xb7\x00")}
        done = userland.run("/usr/bin/dpkg", "--verify", "covey-device", seconds=120)
        assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
