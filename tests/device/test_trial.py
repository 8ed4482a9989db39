"""A plan is tried in a process of its own, under its owner's limits, before the service runs it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from covey_device import confine, trials
from covey_device.data import NpzData
from covey_device.trainer import Work, load_trainer
from covey_device.trials import Allowed, CancelledError, Trials
from covey_shared.errors import MalformedError, TrainingError
from covey_shared.plan import decode_header
from covey_shared.runtime import OUT_OF_MEMORY, TrainStep
from hostile_plans import INT64, bundle_of, constant, examples, node, train_model

PLANS = Path(str(files("covey_fleet"))) / "plans"
MB = 1_000_000
GIVEN = Allowed(400 * MB, 30.0, 1)


@pytest.fixture
def children(monkeypatch):
    """Every child process that is started."""
    started = []
    real = subprocess.Popen

    class Counted(real):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append((self, options))

    monkeypatch.setattr(trials.subprocess, "Popen", Counted)
    return started


def trials_in(directory, given=GIVEN, **options):
    options = {"resident": lambda: 60 * MB} | options
    return Trials(directory, lambda: given, **options)


def shipped(name="mlp"):
    header = decode_header((PLANS / name / "plan.json").read_bytes())
    return header, (PLANS / name / "train.onnx").read_bytes()


def plan(*extra, constants=()):
    bundle = bundle_of(train_model(*extra, constants=constants))
    return bundle.header, bundle.graphs["train"]


def slow_plan(side, n=1, name="slow"):
    """Products of square matrices: of side 1000, some 10 ms each."""
    nodes = [node("ConstantOfShape", ["s"], ["m0"]), node("Mul", ["m0", "hyper.lr"], ["a0"])]
    nodes += [node("MatMul", ["a0", f"a{i}"], [f"a{i + 1}"]) for i in range(n)]
    nodes += [node("Neg", [f"a{n}"])]
    constants = [constant("s", [side, side])]
    bundle = bundle_of(train_model(*nodes, constants=constants), name)
    return bundle.header, bundle.graphs["train"]


HUGE = [
    node("Shape", ["features"], ["n"], start=0, end=1),
    node("Mul", ["n", "many"], ["total"]),
    node("ConstantOfShape", ["total"]),
]
"""As many numbers as examples, times `many`."""


# -- what is remembered ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_plan_is_tried_once_with_all_the_usual_sizes(tmp_path, children, name):
    given = trials_in(tmp_path / "state")
    tried = given.of(*shipped(name))
    tried.load(1000)
    assert len(children) == 1
    tried.batches(32, 1000, lambda: False)
    tried.batches(17, 100, lambda: False)
    assert len(children) == 1
    again = trials_in(tmp_path / "state").of(*shipped(name))  # after a restart
    again.load(1000)
    again.batches(32, 1000, lambda: False)
    assert len(children) == 1
    again.batches(300, 1000, lambda: False)  # 300 and, at the end of an epoch, 100
    again.batches(300, 1000, lambda: False)
    assert len(children) == 2
    (entry,) = json.loads((tmp_path / "state" / "trials.json").read_text())
    assert set(entry["sizes"]) >= {*range(1, 33), 100, 300}
    assert (tmp_path / "state" / "trials.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "given",
    [Allowed(401 * MB, 30.0, 1), Allowed(400 * MB, 30.0, 2)],
)
def test_other_limits_are_another_trial(tmp_path, children, given):
    trials_in(tmp_path).of(*shipped()).load(8)
    trials_in(tmp_path, given).of(*shipped()).load(8)
    trials_in(tmp_path).of(*shipped()).load(8)
    assert len(children) == 2


def test_what_a_plan_grew_by_is_remembered_as_its_need(tmp_path, children):
    trials_in(tmp_path).of(*shipped("cnn")).load(1000)
    held = [100 * MB]
    again = Trials(tmp_path, lambda: Allowed(400 * MB, 30.0, 1), resident=lambda: held[0])
    tried = again.of(*shipped("cnn"))  # after a restart
    need = tried.need_bytes(32)
    assert need is not None
    assert MB < need < 200 * MB
    held[0] += MB  # of which the process has taken this much since
    assert tried.need_bytes(32) == need - MB
    held[0] += 1000 * MB
    assert tried.need_bytes(32) == 0
    assert tried.need_bytes(300) is None  # not tried
    remembered = json.loads((tmp_path / "trials.json").read_text())
    for entry in remembered:
        del entry["grown"]  # as an earlier release left it
    (tmp_path / "trials.json").write_text(json.dumps(remembered))
    assert tried.need_bytes(32) is None
    assert len(children) == 1


def test_another_onnxruntime_is_another_trial(tmp_path, children, monkeypatch):
    trials_in(tmp_path).of(*shipped()).load(8)
    monkeypatch.setattr(trials, "VERSION", "99.0")
    trials_in(tmp_path).of(*shipped()).load(8)
    assert len(children) == 2


@pytest.mark.parametrize("damage", [b"", b"[]", b"not json", b'[{"plan":1}]', b"\xff" * 40])
def test_a_damaged_memory_costs_a_trial_and_no_more(tmp_path, children, damage):
    (tmp_path / "trials.json").write_bytes(damage)
    trials_in(tmp_path).of(*shipped()).load(8)
    trials_in(tmp_path).of(*shipped()).load(8)
    assert len(children) == 1


def test_without_a_disk_a_plan_is_tried_each_time(tmp_path, children):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        trials_in(tmp_path / "file" / "state").of(*shipped()).load(8)
    assert len(children) == 2


def test_a_failure_is_not_remembered(tmp_path, children):
    bad = plan(node("Gather", ["features", "nine"], axis=0), constants=[constant("nine", [10**6])])
    for _ in range(2):
        with pytest.raises(TrainingError, match="indices") as caught:
            trials_in(tmp_path).of(*bad).load(8)
        assert caught.value.public == trials.FAILED
    assert len(children) == 2
    assert not (tmp_path / "trials.json").exists()


def test_devices_that_share_a_directory_try_a_plan_once(tmp_path, children):
    def one(_):
        trials_in(tmp_path).of(*shipped()).load(100)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(16)))
    assert len(children) == 1


# -- what is declined ------------------------------------------------------------------------------


def test_a_device_that_is_too_small_declines_before_anything_is_tried(tmp_path, children):
    small = trials_in(tmp_path, Allowed(100 * MB, 30.0, 1), resident=lambda: 99_900_000)
    with pytest.raises(TrainingError, match=r"needs at least 0\.\d MB .* leaves 0\.1 MB") as caught:
        small.of(*shipped("cnn")).load(8)
    assert caught.value.public == trials.TOO_LARGE
    assert children == []


def test_a_batch_that_is_too_large_is_declined_and_a_smaller_one_is_not(tmp_path, children):
    given = trials_in(tmp_path, Allowed(120 * MB, 30.0, 1))
    tried = given.of(*plan(*HUGE, constants=[constant("many", [100_000])]))  # 0.4 MB an example
    tried.load(8)
    with pytest.raises(TrainingError, match="a smaller batch_size") as caught:
        tried.batches(1000, 1000, lambda: False)
    assert caught.value.public == trials.TOO_LARGE
    tried.batches(64, 64, lambda: False)


def test_a_terabyte_in_plain_sight_is_not_tried(tmp_path, children):
    with pytest.raises(TrainingError, match=r"at least 4,000,000\.0 MB"):
        trials_in(tmp_path).of(*plan(*HUGE, constants=[constant("many", [10**12])])).load(8)
    assert children == []


HIDDEN = [
    # Its value is not followed, so its size is not known before it runs.
    node("Cast", ["many"], ["real"], to=1),
    node("Sqrt", ["real"], ["root"]),
    node("Mul", ["root", "root"], ["square_"]),
    node("Cast", ["square_"], ["total"], to=INT64),
    node("ConstantOfShape", ["total"]),
]


@pytest.mark.parametrize("numbers", [10**12, 2 * 10**8])
def test_memory_that_nobody_could_foresee_ends_the_child(tmp_path, children, numbers):
    """A terabyte fails at once; 800 MB go beyond the 340 MB that are left."""
    with pytest.raises(TrainingError, match=r"needs more memory than there is .* 340 MB") as caught:
        trials_in(tmp_path).of(*plan(*HIDDEN, constants=[constant("many", [numbers])])).load(8)
    assert caught.value.public == trials.TOO_LARGE
    assert len(children) == 1


def test_one_operator_that_takes_long_ends_with_the_child(tmp_path, children):
    start = time.monotonic()
    with pytest.raises(TrainingError, match=r"limits\.trial_seconds") as caught:
        trials_in(tmp_path, Allowed(2000 * MB, 1.5, 1)).of(*slow_plan(9000)).load(8)
    assert caught.value.public == trials.TOO_SLOW
    assert time.monotonic() - start < 6
    assert children[0][0].returncode == -signal.SIGKILL


def test_a_crash_is_the_childs_alone(tmp_path, children, monkeypatch):
    monkeypatch.setattr(
        trials, "minimal_environment", lambda path: {"PYTHONPATH": str(tmp_path) + ":" + path}
    )
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("import os; os.abort()\n")
    with pytest.raises(TrainingError, match="status -6") as caught:
        trials_in(tmp_path / "state").of(*shipped()).load(8)
    assert caught.value.public == trials.CRASHED


@pytest.mark.parametrize(
    "says",
    [
        "os.write(1, b'x' * (1 << 22))",
        'os.write(1, b\'{"type":"Passed","size":77,"seconds":0,"grown_bytes":0}\\n\' * 9)',
        "os.write(1, b'[' * 60000)",
        'os.write(1, b\'{"type":"Done"}\\n\')',
    ],
)
def test_whatever_a_child_says_is_bounded_and_no_success(tmp_path, monkeypatch, says):
    monkeypatch.setattr(
        trials, "minimal_environment", lambda path: {"PYTHONPATH": str(tmp_path) + ":" + path}
    )
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(f"import os; {says}; os._exit(0)\n")
    with pytest.raises(TrainingError) as caught:
        trials_in(tmp_path / "state", Allowed(400 * MB, 3.0, 1)).of(*shipped()).load(8)
    assert caught.value.public in (trials.CRASHED, trials.TOO_SLOW)


def test_a_graph_that_breaks_the_rules_is_not_tried(tmp_path, children):
    with pytest.raises(MalformedError, match="NonZero"):
        trials_in(tmp_path).of(*plan(node("NonZero", ["features"]))).load(8)
    assert children == []


@pytest.mark.parametrize("how", ["stop", "cancel"])
def test_a_trial_ends_with_its_round(tmp_path, children, how):
    given = trials_in(tmp_path, Allowed(2000 * MB, 60.0, 1))
    tried, over = given.of(*slow_plan(9000)), threading.Event()
    threading.Timer(0.6, over.set if how == "stop" else given.cancel).start()
    start = time.monotonic()
    with pytest.raises(CancelledError):
        tried.batches(8, 8, over.is_set)
    assert time.monotonic() - start < 5
    # Nor is one waited for that another device tries.
    with given._locked(lambda: False), pytest.raises(CancelledError):
        tried.batches(8, 8, lambda: True)


# -- the child -------------------------------------------------------------------------------------


def test_a_child_has_nothing_of_its_parents(tmp_path, children, monkeypatch):
    monkeypatch.setenv("COVEY_PASSWORD", "secret")
    trials_in(tmp_path).of(*shipped()).load(8)
    ((child, options),) = children
    assert options.get("close_fds", True)
    assert "secret" not in str(options["env"])
    assert set(options["env"]) <= {
        "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LANG", "OPENBLAS_NUM_THREADS",
        "OMP_NUM_THREADS", "MALLOC_ARENA_MAX",
    }  # fmt: skip
    assert (options["cwd"], options["start_new_session"]) == ("/", True)
    assert child.returncode is not None


CONFINED = """
import json, os, resource, socket, sys
import numpy as np
from covey_device.confine import confine
found = {}
confine(50_000_000, 2.0)
for name, attempt in {
    "file": lambda: open("/etc/passwd"),
    "socket": lambda: socket.socket(),
    "memory": lambda: bytearray(400_000_000),
}.items():
    try:
        attempt()
        found[name] = "worked"
    except (OSError, MemoryError, ValueError) as error:
        found[name] = type(error).__name__
bytearray(50_000_000)
print(json.dumps(found | {"core": resource.getrlimit(resource.RLIMIT_CORE)[0],
                          "cpu": resource.getrlimit(resource.RLIMIT_CPU)[0]}))
"""


def confined():
    done = subprocess.run(
        [sys.executable, "-c", CONFINED],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_confined_process_opens_nothing_and_allocates_little():
    found = confined()
    assert found["file"] == found["socket"] == "OSError"
    assert found["memory"] == "MemoryError"
    assert (found["core"], found["cpu"]) == (0, 3)


IDLE = """
import json, sys
import covey_device.trial
with open("/proc/self/status") as status:
    peak = 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
print(json.dumps({"peak": peak, "modules": sorted({m.partition(".")[0] for m in sys.modules})}))
"""


def test_a_child_is_small():
    environment = confine.minimal_environment(os.pathsep.join(sys.path))
    done = subprocess.run(
        [sys.executable, "-c", IDLE], env=environment, capture_output=True, text=True, timeout=60
    )
    found = json.loads(done.stdout)
    assert found["peak"] < 60 * MB
    unneeded = {"psutil", "click", "paho", "asyncio", "cryptography", "Crypto", "onnx", "torch"}
    assert unneeded & set(found["modules"]) == set()


# -- in the service's own process -------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    features, labels = examples()
    np.savez(tmp_path / "d.npz", features=features, labels=labels)
    return NpzData(file="d.npz"), tmp_path


def train(trainer, **changes):
    work = Work(**({"batches": 6, "batch_size": 8, "max_seconds": 60.0, "max_resident_bytes": 2000 * MB}
                   | changes))  # fmt: skip
    return trainer.train(
        np.zeros(3, np.float32), work, clock=time.monotonic, rng=np.random.default_rng(0)
    )


def test_a_step_that_takes_too_long_is_interrupted_and_the_batches_before_count(data):
    """As when the machine is suddenly busy with something else."""
    trainer = load_trainer(*slow_plan(700, 60), *data)
    alone = train(trainer, batches=1)
    step, taken = trainer._step.step, []

    def third_time_endless(*arguments):
        taken.append(step(*arguments))
        while len(taken) > 2:
            step(*arguments)
        return taken[-1]

    trainer._step.step = third_time_endless
    start = time.monotonic()
    result = train(trainer, batches=10_000, max_seconds=30 * alone.seconds)
    assert (result.stopped_by, result.batches) == ("seconds", 2)
    assert time.monotonic() - start < 60 * alone.seconds + 2
    assert result.delta.any()


def test_a_first_step_that_takes_too_long_is_no_update(data):
    trainer = load_trainer(*slow_plan(700, 200), *data)
    start = time.monotonic()
    with pytest.raises(TrainingError, match=r"max_seconds of 0\.2 s was over") as caught:
        train(trainer, max_seconds=0.2)
    assert caught.value.public == "no batch fits its budget"
    assert time.monotonic() - start < 5
    del trainer
    assert train(load_trainer(*plan(), *data)).batches == 6


def test_a_step_is_interrupted_when_training_is_not_wanted_any_more(data):
    trainer, stop = load_trainer(*slow_plan(700, 300), *data), threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(TrainingError, match="asked to stop"):
        trainer.train(
            np.zeros(3, np.float32),
            Work(batches=9, batch_size=8, max_seconds=60.0, max_resident_bytes=2000 * MB),
            clock=time.monotonic,
            rng=np.random.default_rng(0),
            stop=stop.is_set,
        )


def test_memory_that_runs_out_in_a_step_costs_that_training_and_no_more(data):
    """Without a trial, as if one had gone well that should not have."""
    greedy = load_trainer(
        *plan(*HUGE, constants=[constant("many", [10**9])]), *data
    )  # 32 GB a step
    with pytest.raises(TrainingError, match="allocate memory") as caught:
        train(greedy)
    assert caught.value.public == OUT_OF_MEMORY
    other = load_trainer(*plan(), *data)
    before = train(other)
    assert before.batches == 6
    with pytest.raises(TrainingError):
        train(greedy)
    assert train(other).examples == before.examples


def test_memory_that_runs_out_while_loading_costs_that_plan_and_no_more(data):
    """onnxruntime computes constants when it loads a graph."""
    greedy = plan(
        node("ConstantOfShape", ["many"], ["big"]),
        node("ReduceSum", ["big"], keepdims=0),
        constants=[constant("many", [4 * 10**9])],
    )
    try:
        load_trainer(*greedy, *data, max_resident_bytes=10**9)
    except (TrainingError, MalformedError) as error:
        assert error.public in (OUT_OF_MEMORY, "the plan's graph cannot be loaded")  # noqa: PT017
    assert train(load_trainer(*plan(), *data)).batches == 6


def test_the_bound_on_memory_ends_with_what_it_was_for():
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with confine.bounded_data(10 * MB):
        inner = resource.getrlimit(resource.RLIMIT_DATA)[0]
        assert inner != before[0]
        with pytest.raises(MemoryError):
            bytearray(2000 * MB)
        with confine.bounded_data(5 * MB):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] >= inner
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] >= inner
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(200 * MB)) == 200 * MB


def test_what_is_said_to_be_needed_is_near_what_is(tmp_path):
    """The estimate is a lower bound: onnxruntime itself, its working memory for convolutions and what its
    arena keeps come on top."""
    from covey_device.trial import Request
    from covey_shared.vetting import step_bytes, vet

    for name in ("mlp", "cnn"):
        header, graph = shipped(name)
        for size in (32, 2048):
            tried = trials_in(tmp_path).of(header, graph)
            request = Request(len(tried.header_bytes), 10**9, 60.0, 1, [size], [], 0.0)
            (passed,) = trials._run(request, tried, lambda: False).steps
            measured = passed.grown_bytes
            estimate = step_bytes(header, vet(header, graph, "train"), size)
            print(
                f"{name} {size}: estimate {estimate / MB:.1f} MB, measured {measured / MB:.1f} MB"
            )
            assert estimate < measured
            assert measured - 20 * MB < 3.5 * estimate


def test_an_interrupted_step_can_be_run_again():
    header, graph = plan()
    step = TrainStep(header, graph)
    step.load(np.zeros(3, np.float32))
    features, labels = examples(8)
    step.interrupt()
    with pytest.raises(TrainingError, match="terminate"):
        step.step(features, labels)
    step.load(np.zeros(3, np.float32))
    step.step(features, labels)
    assert step.parameters().any()


def test_a_measurement_says_how_long_and_how_much_and_remembers_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header, graph = shipped("mlp")
    allowed = Allowed(10**9, 60.0, 1)
    went = trials.measure(header, graph, 32, 5, allowed, resident_before=0)
    assert [step.size for step in went.steps] == [32] * len(went.steps)
    assert 1 <= len(went.steps) <= 6
    assert 0 < went.loaded_s < went.seconds
    assert all(step.seconds > 0 and step.grown_bytes > 0 for step in went.steps)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TrainingError, match=r"leaves 0\.0 MB"):
        trials.measure(header, graph, 32, 5, allowed, resident_before=10**9)
