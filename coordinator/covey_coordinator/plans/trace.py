"""A torch module as plain tensor code: the training step, evaluation and prediction as fx graphs.

`Model` exports the user's module once in training and once in evaluation mode. The three
functions then trace it again together with loss, backward pass and optimiser, with every slot and
state tensor as an input and an output, until only operators are left that ONNX knows. Turning
those into ONNX is `lower`'s work.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.fx.traceback as fx_traceback
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch._aot_autograd.logging_utils import setup_stacktrace_preservation_hooks
from torch._guards import detect_fake_mode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from covey_coordinator.plans import diagnose
from covey_coordinator.plans.fuse import fuse, pool_first
from covey_coordinator.plans.losses import Loss
from covey_shared.errors import CompileError

Tensor = Any
Table = Mapping[Any, Callable[..., Any]]
Role = Literal["parameter", "buffer"]

BATCH = "batch"
_SIMPLIFY = "Compute it from shapes, or with torch.where, so that every batch runs the same code."

UNTRAINABLE = (
    "the model's output depends on no parameter that can be trained; check requires_grad, and "
    "torch.no_grad and detach in its code"
)


@dataclass(frozen=True, slots=True)
class Sgd:
    """Stochastic gradient descent as torch.optim.SGD defines it (no dampening)."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    @property
    def scales_early(self) -> bool:
        """Whether gradients arrive at `step` already multiplied by the learning rate.

        Everything is linear in the derivative by the model's output, which is smaller than any
        weight. Momentum, though, must not remember learning rates of the past.
        """
        return not self.momentum

    def step(
        self, parameter: Tensor, gradient: Tensor, velocity: Tensor | None, lr: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """-> (next parameter, next velocity). velocity: None without momentum."""
        if velocity is None:
            updated = parameter - gradient
            if self.weight_decay:
                updated = updated - parameter * (lr * self.weight_decay)
            return updated, None
        if self.weight_decay:
            gradient = gradient + parameter * self.weight_decay
        velocity = velocity * self.momentum + gradient
        update = gradient + velocity * self.momentum if self.nesterov else velocity
        return parameter - update * lr, velocity


@dataclass(frozen=True, slots=True)
class Traced:
    """A flat fx graph with what is needed to lower it.

    inputs, outputs: their names in ONNX. batched: how many of the leading inputs have the batch as
    their first dimension. constants: the values of the placeholders that follow the inputs.
    """

    graph: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batched: int
    constants: tuple[Tensor, ...]


class Model:
    """The user's module, exported in both modes. Its own copy: the user's stays as it was.

    slots: name -> (initial value, role), parameters first, then the buffers that training
    changes. trainable: the names that the optimiser updates. Frozen parameters, constant buffers
    and counters are no slots: they become constants of the graphs.
    """

    def __init__(self, module: Any, features: Tensor) -> None:
        """features: a sample of at least two examples."""
        self.module = module
        self.features = features
        self._canonical = _canonical_names(module)
        values = dict(module.named_parameters()) | dict(module.named_buffers())
        self.trainable = tuple(n for n, p in module.named_parameters() if p.requires_grad)
        self.slots: dict[str, tuple[Tensor, Role]] = {
            name: (values[name].detach().clone().contiguous(), "parameter")
            for name in self.trainable
        } | {
            name: (values[name].detach().clone().contiguous(), "buffer")
            for name in changing_buffers(module, features)
            if values[name].dtype == torch.float32
        }
        self.training = self._export(training=True)

    @cached_property
    def evaluation(self) -> Any:
        """The module exported in evaluation mode."""
        return self._export(training=False)

    def _name(self, target: str) -> str:
        return self._canonical.get(target, target)

    def _export(self, *, training: bool) -> Any:
        self.module.train(training)
        # torch prints the graph so far to stderr when it gives up.
        with tracing(), contextlib.redirect_stderr(io.StringIO()):
            try:
                program = torch.export.export(
                    self.module, (self.features,), dynamic_shapes=({0: torch.export.Dim(BATCH)},)
                )
            except Exception as error:  # torch raises dozens of classes here
                raise diagnose.failed(
                    "torch cannot export the model (does its code depend on the values or the "
                    "number of examples in a batch?)",
                    error,
                    hint=_SIMPLIFY,
                ) from error
        pool_first(program.graph_module)
        for node in program.graph.nodes:
            # The one thing that tracing hands on, also through the backward pass.
            node.meta["origin"] = node.meta.get("stack_trace", "")
            node.meta["stack_trace"] = node.name
        return program

    def train_step(self, labels: Tensor, loss: Loss, optimizer: Sgd, table: Table) -> Traced:
        """The training step: forward, loss, backward and optimiser."""
        names, slots = self._slot_arrays()
        velocities = self.trainable if optimizer.momentum else ()
        program = self.training

        def step(features: Tensor, labels: Tensor, lr: Tensor, *rest: Tensor) -> list[Tensor]:
            tensors = dict(zip(names, rest, strict=False))
            velocity = dict(zip(velocities, rest[len(names) :], strict=False))
            constants = rest[len(names) + len(velocities) :]
            for name in self.trainable:
                tensors[name] = tensors[name].detach().requires_grad_(True)
            output = self._run(program, features, tensors, constants)
            with torch.no_grad():
                value, by_output = loss.gradient(output, labels)
                if optimizer.scales_early:
                    by_output = by_output * lr
            gradients = _backward(output, [tensors[name] for name in self.trainable], by_output)
            results, next_velocities = [value], []
            with torch.no_grad():
                for name, gradient in zip(self.trainable, gradients, strict=True):
                    if gradient is None:  # torch's optimiser skips these, weight decay and all
                        updated, moved = tensors[name].clone(), velocity.get(name)
                        moved = None if moved is None else moved.clone()
                    else:
                        updated, moved = optimizer.step(
                            tensors[name], gradient, velocity.get(name), lr
                        )
                    results.append(updated)
                    if moved is not None:
                        next_velocities.append(moved)
            # The forward pass has changed the buffers in place.
            results += [tensors[name] for name in names[len(self.trainable) :]]
            return results + next_velocities

        state = [torch.zeros_like(self.slots[name][0]) for name in velocities]
        return self._trace(
            program,
            step,
            (self.features, labels, torch.tensor(0.0), *slots, *state),
            (
                "features",
                "labels",
                "hyper.lr",
                *(f"slot.{name}" for name in names),
                *(f"state.{momentum_of(name)}" for name in velocities),
            ),
            (
                "loss",
                *(f"next.slot.{name}" for name in names),
                *(f"next.state.{momentum_of(name)}" for name in velocities),
            ),
            2,
            table,
        )

    def evaluate(self, labels: Tensor, loss: Loss, table: Table) -> Traced:
        """Evaluation: sums over the batch."""
        names, slots = self._slot_arrays()

        def evaluate(features: Tensor, labels: Tensor, *rest: Tensor) -> list[Tensor]:
            with torch.no_grad():
                tensors = dict(zip(names, rest, strict=False))
                output = self._run(self.evaluation, features, tensors, rest[len(names) :])
                ones = torch.ones_like(labels, dtype=torch.int64)
                examples = ones.reshape(labels.shape[0], -1)[:, 0].sum()
                sums = [loss.mean(output, labels) * examples.to(torch.float32), examples]
                if loss.labels_are_classes:
                    sums.append((output.argmax(1) == labels).to(torch.int64).sum())
            return sums

        return self._trace(
            self.evaluation,
            evaluate,
            (self.features, labels, *slots),
            ("features", "labels", *(f"slot.{name}" for name in names)),
            ("loss_sum", "examples", *(["correct"] if loss.labels_are_classes else [])),
            2,
            table,
        )

    def predict(self, table: Table) -> Traced:
        """Prediction: the module's output."""
        names, slots = self._slot_arrays()

        def predict(features: Tensor, *rest: Tensor) -> list[Tensor]:
            with torch.no_grad():
                tensors = dict(zip(names, rest, strict=False))
                return [self._run(self.evaluation, features, tensors, rest[len(names) :])]

        return self._trace(
            self.evaluation,
            predict,
            (self.features, *slots),
            ("features", *(f"slot.{name}" for name in names)),
            ("predictions",),
            1,
            table,
        )

    def _slot_arrays(self) -> tuple[tuple[str, ...], list[Tensor]]:
        return tuple(self.slots), [value for value, _ in self.slots.values()]

    def _constants(self, program: Any) -> dict[str, Tensor]:
        """What the program reads besides features and slots, by the name it knows it by."""
        values = {**program.state_dict, **program.constants}
        return {
            spec.target: values[spec.target].detach()
            for spec in program.graph_signature.input_specs
            if spec.target is not None and self._name(spec.target) not in self.slots
        }

    def _run(
        self,
        program: Any,
        features: Tensor,
        tensors: Mapping[str, Tensor],
        constants: Sequence[Tensor],
    ) -> Tensor:
        """Interpret an exported program -> the module's output. Changes buffers in place."""
        fixed = dict(zip(self._constants(program), constants, strict=True))
        args = []
        for spec in program.graph_signature.input_specs:
            if spec.target is None:
                args.append(features)
            else:
                name = self._name(spec.target)
                args.append(tensors[name] if name in tensors else fixed[spec.target])
        with fx_traceback.preserve_node_meta():
            outputs = _Interpreter(program.graph_module).run(*args)
        return outputs[-1]

    def _trace(
        self,
        program: Any,
        function: Callable[..., list[Tensor]],
        args: tuple[Tensor, ...],
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        batched: int,
        table: Table,
    ) -> Traced:
        """Trace a function of fake tensors whose batch is symbolic into one flat fx graph."""
        constants = list(self._constants(program).values())
        example = next(
            node.meta["val"]
            for node in program.graph.nodes
            if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
        )
        fake_mode = detect_fake_mode([example])
        with fake_mode:
            fakes = [
                torch.empty([example.shape[0], *arg.shape[1:]], dtype=arg.dtype)
                if index < batched
                else torch.empty(arg.shape, dtype=arg.dtype)
                for index, arg in enumerate((*args, *constants))
            ]
        fakes[0] = example
        # The Python dispatcher knows decompositions (of recurrent layers, above all) that keep the
        # batch symbolic where the C++ ones would fix it.
        with tracing(), fake_mode, enable_python_dispatcher():
            # Twice: autograd wants torch's own operators, some of which work in place; the second
            # pass makes those functional and applies the rules.
            raw = make_fx(function, tracing_mode="real")(*fakes)
            functional = dispatch_functionalize(_replay(raw), FunctionalTensorMode())
            graph = make_fx(functional, decomposition_table=dict(table), tracing_mode="real")(
                *fakes
            )
        _restore_origins(graph, program)
        fuse(graph)
        return Traced(graph, inputs, outputs, batched, tuple(constants))


def momentum_of(parameter: str) -> str:
    """The name of a parameter's momentum among the plan's state tensors."""
    return f"momentum.{parameter}"


@contextmanager
def tracing() -> Iterator[None]:
    """Attention in plain matrix products, no fused inference kernels, no advice on the screen."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        for name in ("torch.onnx", "torch.export", "torch._export", "torch.fx"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        yield


def _backward(
    output: Tensor, parameters: Sequence[Tensor], by_output: Tensor
) -> Sequence[Tensor | None]:
    """Gradients by the parameters; None where the output does not depend on one."""
    if output.grad_fn is None:
        raise CompileError(UNTRAINABLE)
    setup_stacktrace_preservation_hooks([output.grad_fn])
    try:
        with fx_traceback.preserve_node_meta():
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                output, parameters, by_output, allow_unused=True
            )
    except CompileError:
        raise
    except Exception as error:  # torch raises dozens of classes here
        raise diagnose.failed("the backward pass cannot be traced", error) from error
    return gradients


class _Interpreter(torch.fx.Interpreter):  # type: ignore[misc]
    """Runs an exported graph under a tracer; names the user's line when a node fails."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # ``self.count += 1`` is exported as an addition in place and a copy of the sum to itself,
        # which would spoil what autograd has saved in between.
        if target is torch.ops.aten.copy_.default and args[0] is args[1]:
            return args[0]
        return super().call_function(target, args, kwargs)

    def run_node(self, n: Any) -> Any:
        # Anomaly mode makes autograd remember the forward node for the backward pass.
        with torch.autograd.detect_anomaly(check_nan=False):
            try:
                return super().run_node(n)
            except CompileError:
                raise
            except Exception as error:  # torch raises dozens of classes here
                raise diagnose.unsupported(
                    n, f"cannot be traced: {diagnose.reason(error)}"
                ) from error


def _replay(graph: Any) -> Callable[..., Any]:
    """A traced graph as a function that hands on where its nodes came from."""

    def replay(*args: Tensor) -> Any:
        with fx_traceback.preserve_node_meta(), torch.no_grad():
            return torch.fx.Interpreter(graph).run(*args)

    return replay


def _restore_origins(graph: Any, program: Any) -> None:
    """Give each traced node the source line and the module of the exported node it came from."""
    exported = {node.name: node for node in program.graph.nodes}
    for node in graph.graph.nodes:
        origin = exported.get(node.meta.get("stack_trace") or "")
        node.meta["stack_trace"] = origin.meta["origin"] if origin else ""
        node.meta["nn_module_stack"] = origin.meta.get("nn_module_stack", {}) if origin else {}
        node.meta["origin_operator"] = diagnose.operator(origin) if origin else ""


def _canonical_names(module: Any) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first name: tied weights are one slot."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for entries in (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in entries:
            names[name] = first.setdefault(id(tensor), name)
    return names


def changing_buffers(module: Any, features: Tensor) -> list[str]:
    """The names of the buffers that a forward pass in training changes, found by trying one."""
    probe = own_copy(module).train()
    before = {
        name: (buffer, buffer._version, buffer.clone()) for name, buffer in probe.named_buffers()
    }
    with tracing(), torch.no_grad():
        probe(features)
    after = dict(probe.named_buffers())
    return [
        name
        for name, (buffer, version, value) in before.items()
        if after[name] is not buffer or buffer._version != version or not torch.equal(buffer, value)
    ]


def own_copy(module: Any) -> Any:
    """A deep copy to trace. Raises CompileError if the module cannot be copied."""
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise diagnose.failed("the model cannot be copied", error) from error
