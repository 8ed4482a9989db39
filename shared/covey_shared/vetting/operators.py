"""The operators that a plan may consist of, and which of their inputs decide how large a result is.

The list is what the plan compiler can emit: every operator that torch's ONNX translations use at the
opset of plans, without those named in `LEFT_OUT`. A test holds it against those translations, against
every plan that the tests compile, and against the plans that are shipped.

No operator here has a graph inside it, loops, keeps state, names a file, or gives a result whose size
depends on the values of a tensor. That last rule is completed by `SIZES`: inputs that set a size must come
from constants and from shapes, never from data. So the sizes of everything in a step are the same for any
data of the same shape, and one trial of a step tells what every later one will take. Nor may data decide
whether a step crashes: see `TRAPS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

ALLOWED = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Bernoulli
    BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Col2Im Concat
    ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DFT DepthToSpace Det Div Dropout Einsum Elu Equal Erf
    Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gemm Greater GreaterOrEqual GridSample
    HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax MatMul Max MaxPool Min Mish Mod Mul Neg NegativeLogLikelihoodLoss Not Or
    PRelu Pad Pow RandomNormalLike RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize Round ScatterElements ScatterND
    Selu Shape Sigmoid Sign Sin Sinh Size Slice Softmax SoftmaxCrossEntropyLoss Softplus Split Sqrt Squeeze
    Sub Tan Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()  # noqa: SIM905  one word a line would be a page
)

LEFT_OUT = {
    "Constant": "the compiler keeps constants as initialisers",
    **dict.fromkeys(
        ("SequenceAt", "SequenceEmpty", "SequenceInsert", "SequenceMap", "SplitToSequence"),
        "a sequence has no size that could be known",
    ),
    "ConcatFromSequence": "a sequence has no size that could be known",
    **dict.fromkeys(
        ("Compress", "NonMaxSuppression", "NonZero", "Unique"),
        "the size of its result depends on values",
    ),
    **dict.fromkeys(("GRU", "LSTM"), "the compiler takes recurrent layers apart"),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), "plans train in float32"),
    **dict.fromkeys(
        ("BlackmanWindow", "HammingWindow", "HannWindow", "STFT"),
        "windows of signals are constants, computed before",
    ),
    **dict.fromkeys(("MaxRoiPool", "RoiAlign"), "has no gradient"),
    "Multinomial": "draws classes, which cannot be compared with torch",
}
"""Operators of torch's translations that no plan has, and why."""

FROM_SHAPES = frozenset({"Shape", "Size"})
"""Their results depend on the sizes of their inputs alone."""

RANDOM = frozenset({"Bernoulli", "Dropout", "RandomNormalLike", "RandomUniformLike"})

TRAPS = frozenset({"Div", "Mod"})
"""Of integers, these end the process for the smallest number by -1 (onnxruntime 1.31 on x86-64). So their
integers must be the same for all data: then a trial finds out."""

SIZES: dict[str, tuple[int, ...]] = {
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "DFT": (1,),
    "Expand": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    **{
        operator: (1,)
        for operator in ALLOWED
        if operator.startswith("Reduce")  # their axes
    },
}
"""Operator -> positions of the inputs whose values set its result's shape."""


_BOOL = frozenset(
    """Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not IsNaN IsInf""".split()  # noqa: SIM905
)


def types(
    operator: str, given: Sequence[str], attributes: Mapping[str, Any], names: Mapping[int, str]
) -> tuple[str, str]:
    """Element types of the first result and of any further ones.

    given: of the inputs; "" for one that is left out. names: of ONNX's numbers for types.
    """
    first = given[0] if given and given[0] else "int64"
    if operator in _BOOL:
        first = "bool"
    elif operator in ("Shape", "Size", "ArgMax", "ArgMin"):
        first = "int64"
    elif operator == "ConstantOfShape":
        first = "float32"
    elif operator in ("Where", "CastLike"):
        first = given[1] if len(given) > 1 else first
    chosen = attributes.get("to" if operator == "Cast" else "dtype")
    if chosen is not None and (operator in RANDOM or operator in ("Cast", "EyeLike")):
        first = names[chosen]
    if operator in ("MaxPool", "TopK"):
        return first, "int64"
    return first, "bool" if operator == "Dropout" else first
