"""A module's twin that drops nothing, so that training it can be compared number by number.

onnxruntime draws other random numbers than torch. Everything but the draw is the same in the twin:
dropout layers, the functional forms, and the dropout inside attention.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from covey_shared.errors import CompileError

_DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
)
# Where these take their dropout_p. What they call inside is not seen by the mode below.
_ATTENTION = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}


class _NoDropout(TorchFunctionMode):  # type: ignore[misc]
    """While active, every dropout returns its input."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in _ATTENTION:
            position = _ATTENTION[func]
            if len(args) > position:
                args = (*args[:position], 0.0, *args[position + 1 :])
            else:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def refuse_recurrent_dropout(module: Any) -> None:
    """Raise CompileError for dropout between the layers of an RNN, GRU or LSTM.

    torch 2.13 leaves it out when it takes these layers apart (the condition on the layer's number
    is the wrong way round), and a plan would train without it.
    """
    for path, part in module.named_modules():
        if isinstance(part, torch.nn.RNNBase) and part.dropout and part.num_layers > 1:
            raise CompileError(
                f"module {path!r} ({type(part).__name__}): torch's export leaves out the dropout "
                "between its layers; use several modules of one layer with nn.Dropout between them"
            )


def without_dropout(module: Any) -> Any:
    """A copy of the module that drops nothing in training."""
    twin = copy.deepcopy(module)
    kind = type(twin)

    @functools.wraps(kind.forward)  # torch.export reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _NoDropout():
            return kind.forward(self, *args, **kwargs)

    # A class of its own, not an attribute of the object: copies of the twin are twins too.
    twin.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return twin
