"""Says what cannot be compiled, and where: operator, module and line of the user's own code.

Turns torch's exceptions and fx nodes into CompileError. A location is, in this order: the
innermost line outside torch and this package, or else the module's path inside the model and its
class. No tracing happens here.
"""

import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from covey_shared.errors import CompileError

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_STDLIB = sysconfig.get_path("stdlib")
_MAX_REASON = 400


def failed(what: str, error: BaseException, *, hint: str = "") -> CompileError:
    """An exception from torch -> CompileError, with the user's line if the traceback has one."""
    where = _user_line(error) or _guard_line(error)
    said = f"{what}: {reason(error)}"
    return CompileError(_sentence(f"{where}: {said}" if where else said, hint))


def unsupported(node: Any, why: str, *, hint: str = "") -> CompileError:
    """An fx node that cannot become ONNX -> CompileError naming its operator and place."""
    name, origin = operator(node), node.meta.get("origin_operator", "")
    if origin and origin.split(".")[-1] not in name:
        name = f"{name} (from {origin})"
    return CompileError(_sentence(f"{place(node)}: operator {name} {why}", hint))


def operator(node: Any) -> str:
    """The node's operator as torch names it, such as ``aten.cumsum``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[-1]}"
    return str(getattr(target, "__name__", target))


def place(node: Any) -> str:
    """Where the node comes from, for people: ``net.py:12 (module 'head', Linear)``."""
    line = _line_of_stack(node.meta.get("origin") or node.meta.get("stack_trace") or "")
    stack = node.meta.get("nn_module_stack") or {}
    modules = [(path, kind) for path, kind in _pairs(stack) if path]
    module = ""
    if modules:
        path, kind = modules[-1]
        module = f"module {path!r} ({str(kind).rsplit('.', 1)[-1]})"
    if line and module:
        return f"{line}, {module}"
    return line or module or "the model"


def _pairs(stack: Any) -> list[tuple[str, Any]]:
    return [(entry[0], entry[1]) for entry in stack.values() if isinstance(entry, tuple)]


def _line_of_stack(stack: str) -> str:
    """The innermost user line of a stack kept as text, else the innermost line at all."""
    lines = []
    for line in stack.splitlines():
        parts = line.strip().split('"')
        if line.strip().startswith('File "') and len(parts) >= 3:
            number = parts[2].split("line ")[-1].split(",")[0]
            lines.append((parts[1], number))
    users = [entry for entry in lines if _is_users(entry[0])]
    chosen = users or lines
    return f"{chosen[-1][0]}:{chosen[-1][1]}" if chosen else ""


def _user_line(error: BaseException) -> str:
    """file:line of the innermost user frame of an exception or of what caused it."""
    for seen in _chain(error):
        frames = traceback.extract_tb(seen.__traceback__)
        # Only what ran below this package: further out stands whoever called the compiler.
        ours = [i for i, frame in enumerate(frames) if frame.filename.startswith(_HERE)]
        inner = frames[ours[-1] + 1 :] if ours else []
        lines = [f"{frame.filename}:{frame.lineno}" for frame in inner if _is_users(frame.filename)]
        if lines:
            return lines[-1]
    return ""


def _guard_line(error: BaseException) -> str:
    """file:line that made the number of examples a condition.

    torch finds out only after the model has run, in a traceback without the model's code; but the
    symbolic shapes in it remember where each condition came from.
    """
    for seen in _chain(error):
        for frame, _ in traceback.walk_tb(seen.__traceback__):
            for value in frame.f_locals.copy().values():
                if isinstance(value, ShapeEnv):
                    for guard in value.guards:
                        origin = guard.sloc.framework_loc if guard.sloc else None
                        if isinstance(origin, traceback.FrameSummary) and _is_users(
                            origin.filename
                        ):
                            return f"{origin.filename}:{origin.lineno}"
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _is_users(filename: str) -> bool:
    if filename.startswith((_TORCH, _HERE, "<")):
        return False
    return "site-packages" in filename or not filename.startswith(_STDLIB)


def reason(error: BaseException) -> str:
    """The first lines of a message, without torch's pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + " ..."


def _sentence(text: str, hint: str) -> str:
    return f"{text.rstrip('.')}. {hint}" if hint else text
