"""The flat layout: named tensors back to back in one vector, seen through views."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from covey_shared.errors import LocalProtocolError, MalformedError
from covey_shared.layout import Layout, Slot, layout_of

SHAPES = st.dictionaries(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8),
    st.one_of(st.just(()), array_shapes(max_dims=3, max_side=4)),
    min_size=1,
    max_size=6,
)


def tensors_of(layout, seed=0):
    rng = np.random.default_rng(seed)
    return {s.name: rng.normal(size=s.shape).astype(np.float32) for s in layout.slots}


@given(SHAPES)
def test_flattening_and_viewing_undo_each_other(shapes):
    layout = layout_of({name: (shape, "parameter") for name, shape in shapes.items()})
    layout.check()
    tensors = tensors_of(layout)
    flat = layout.flatten(tensors)
    assert flat.shape == (layout.n_params,)
    views = layout.views(flat)
    assert list(views) == list(shapes)
    for name, view in views.items():
        np.testing.assert_array_equal(view, tensors[name])
    np.testing.assert_array_equal(layout.flatten(views), flat)


def test_slots_lie_back_to_back_in_their_order():
    layout = layout_of({"b": ((2, 3), "parameter"), "a": ((), "parameter"), "c": ((4,), "buffer")})
    assert [(s.name, s.offset, s.size) for s in layout.slots] == [
        ("b", 0, 6),
        ("a", 6, 1),
        ("c", 7, 4),
    ]
    assert layout.n_params == 11
    flat = np.arange(11, dtype=np.float32)
    assert layout.views(flat)["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert layout.views(flat)["a"] == 6


def test_views_write_through():
    layout = layout_of({"a": ((2,), "parameter"), "b": ((2, 2), "parameter")})
    flat = np.zeros(6, np.float32)
    layout.views(flat)["b"][1, 0] = 7
    assert flat.tolist() == [0, 0, 0, 0, 7, 0]


@pytest.mark.parametrize(
    "flat", [np.zeros(5, np.float32), np.zeros(6), np.zeros((6, 1), np.float32)]
)
def test_a_vector_of_another_kind_is_our_own_mistake(flat):
    layout = layout_of({"a": ((6,), "parameter")})
    with pytest.raises(LocalProtocolError, match=r"expected float32\[6\]"):
        layout.views(flat)


def test_flatten_wants_exactly_the_layouts_tensors():
    layout = layout_of({"a": ((2,), "parameter"), "b": ((1,), "parameter")})
    a, b = np.zeros(2, np.float32), np.zeros(1, np.float32)
    with pytest.raises(LocalProtocolError, match=r"missing: \['b'\]"):
        layout.flatten({"a": a})
    with pytest.raises(LocalProtocolError, match=r"unknown: \['c'\]"):
        layout.flatten({"a": a, "b": b, "c": b})
    with pytest.raises(LocalProtocolError, match=r"'b' has shape \(2,\), expected \(1,\)"):
        layout.flatten({"a": a, "b": a})


def slot(name="a", shape=(2,), offset=0):
    return Slot(name=name, shape=shape, offset=offset, role="parameter")


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ((slot(), slot("b", offset=3)), "'b' starts at 3, expected 2"),
        ((slot(), slot("b", offset=1)), "'b' starts at 1, expected 2"),
        ((slot(offset=1),), "'a' starts at 1, expected 0"),
        ((slot(), slot(offset=2)), "names slot 'a' twice"),
        ((slot(shape=(2, 0)),), "empty shape"),
        ((slot(shape=(-1,)),), "empty shape"),
    ],
)
def test_gaps_overlaps_and_repetitions_are_refused(slots, message):
    with pytest.raises(MalformedError, match=message):
        Layout(slots).check()


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [1] * 9},
        {"shape": [2**33]},
        {"shape": [10**400]},
        {"shape": [0]},
        {"offset": -1},
        {"offset": 2**41},
        {"name": ""},
        {"name": "a" * 201},
        {"name": "a\x1b[31m"},
        {"name": "a\n"},
        {"role": "gradient"},
        {"other": 1},
    ],
)
def test_slots_from_the_network_are_bounded(changed):
    fields = {"name": "a", "shape": [2], "offset": 0, "role": "parameter"}
    data = msgspec.json.encode(fields)
    msgspec.json.decode(data, type=Slot)
    import json

    with pytest.raises(msgspec.MsgspecError):
        msgspec.json.decode(json.dumps(fields | changed), type=Slot)
