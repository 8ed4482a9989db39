"""What `covey plan compile` is told on its command line: a model to import, a sample batch.

No torch here: a sample is numpy, and importing the model's module is what imports torch.
"""

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from covey_shared.errors import CompileError, ConfigError, DataError

Array = NDArray[Any]

MAX_EXAMPLES = 32
SPEC_FORM = "features=float32[32,1,28,28],labels=int64[32]:10"

_SPEC = re.compile(
    r"(?P<name>features|labels)=(?P<dtype>float32|int64|uint8)"
    r"\[(?P<shape>[0-9]+(,[0-9]+)*)\](:(?P<range>[^,]+))?(,|$)"
)


class Sample(NamedTuple):
    """A batch to compile with. features, labels: [examples, *shape], of a plan's dtypes."""

    features: Array
    labels: Array


def parse_model(text: str) -> Callable[[], Any]:
    """``package.module:callable`` -> the callable, imported with the current directory first.

    Raises ConfigError if there is no such module or callable, CompileError with its line if the
    module fails while it is imported.
    """
    module_name, separator, attribute = text.partition(":")
    if not (separator and module_name and attribute):
        raise ConfigError(
            f"{text!r} names no model; write MODULE:CALLABLE, such as model:build for the "
            "function build in model.py"
        )
    with _current_directory_first():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (
                module_name == error.name or module_name.startswith(error.name + ".")
            ):
                raise ConfigError(
                    f"no module {module_name!r} in {Path.cwd()} or among the installed packages; "
                    "run the command where the model's file is"
                ) from error
            raise CompileError(f"{_last_line(error)}: importing {module_name}: {error}") from error
        except Exception as error:  # the module's own code
            raise CompileError(
                f"{_last_line(error)}: importing {module_name}: {error!r}"
            ) from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if _is_own_callable(value, module)]
        raise ConfigError(
            f"{module.__file__} has no callable {attribute!r}; it has {', '.join(names) or 'none'}"
        )
    result: Callable[[], Any] = found
    return result


def build_model(model: Callable[[], Any], text: str) -> Any:
    """Call it. Raises CompileError with the line at which it fails."""
    with _current_directory_first():
        try:
            return model()
        except Exception as error:  # the model's own code
            raise CompileError(f"{_last_line(error)}: calling {text}: {error!r}") from error


def load_sample(text: str, *, seed: int = 0) -> Sample:
    """An .npz file with arrays features and labels, or a description like `SPEC_FORM`.

    Of a file the first `MAX_EXAMPLES` examples are taken. Numbers of other widths become a plan's:
    float64 and float16 become float32; int8 to int32, uint16, uint32 and bool become int64.
    """
    if text.endswith(".npz"):
        return _from_file(Path(text))
    return _from_description(text, np.random.default_rng(seed))


def _from_file(path: Path) -> Sample:
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in Sample._fields if name not in file]:
                raise DataError(
                    f"{path} has no array {missing[0]!r}, it has {sorted(file)}; a sample batch "
                    "is an .npz file with arrays features and labels"
                )
            arrays = [file[name] for name in Sample._fields]
    except FileNotFoundError as error:
        raise DataError(f"no file {path}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable .npz file: {error}") from error
    features, labels = arrays
    if features.ndim < 1 or labels.ndim < 1 or len(features) != len(labels) or not len(features):
        raise DataError(
            f"{path}: features {list(features.shape)} and labels {list(labels.shape)} are not "
            "arrays of equally many examples"
        )
    return Sample(*(_plan_dtype(array[:MAX_EXAMPLES]) for array in arrays))


def _plan_dtype(array: Array) -> Array:
    if array.dtype in (np.float64, np.float16):
        return array.astype(np.float32)
    if array.dtype != np.uint8 and array.dtype.kind in "biu":
        return array.astype(np.int64)
    return array


def _from_description(text: str, rng: np.random.Generator) -> Sample:
    arrays: dict[str, Array] = {}
    rest = text.replace(" ", "")
    while rest:
        match = _SPEC.match(rest)
        if match is None or match["name"] in arrays:
            raise ConfigError(
                f"sample batch {text!r}: cannot read it from {rest!r} on; give an .npz file or a "
                f"description like {SPEC_FORM}"
            )
        shape = tuple(map(int, match["shape"].split(",")))
        arrays[match["name"]] = _random(match["dtype"], shape, match["range"], rng, text)
        rest = rest[match.end() :]
    if missing := [name for name in Sample._fields if name not in arrays]:
        raise ConfigError(
            f"sample batch {text!r} describes no {missing[0]}; an example: {SPEC_FORM}"
        )
    return Sample(arrays["features"], arrays["labels"])


def _random(
    dtype: str, shape: tuple[int, ...], bounds: str | None, rng: np.random.Generator, text: str
) -> Array:
    """Values at random: reals in 0..1 or in the bounds given, integers below a number given."""
    if dtype == "float32":
        low, high = _bounds(bounds or "0..1", text)
        return rng.uniform(low, high, shape).astype(np.float32)
    if bounds is None and dtype == "uint8":
        bounds = "256"
    if bounds is None or not bounds.isdecimal() or not 1 <= int(bounds) <= 2**31:
        raise ConfigError(
            f"sample batch {text!r}: say how many values there are, as in int64[32]:10 for 0 to 9"
        )
    return rng.integers(0, int(bounds), shape).astype(dtype)


def _bounds(bounds: str, text: str) -> tuple[float, float]:
    low, _, high = bounds.partition("..")
    try:
        return float(low), float(high)
    except ValueError as error:
        raise ConfigError(
            f"sample batch {text!r}: {bounds!r} is no range of reals, such as -1..1"
        ) from error


@contextmanager
def _current_directory_first() -> Iterator[None]:
    """Models lie where the user is, as with ``python -m``."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _is_own_callable(value: Any, module: Any) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _last_line(error: BaseException) -> str:
    """file:line of the innermost frame of the user's own code."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
        and not frame.filename.startswith(("<", str(Path(__file__).parent)))
        and "importlib" not in frame.filename
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "the model"
