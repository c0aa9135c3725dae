"""The notation: what is printed is read back, and what is no shape is refused with its reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partinf.axes import LETTERS, ShardedShape, is_axis_name, join_axes, parse_shape, split_axes
from partinf.foundation.errors import InvalidInput


def test_the_papers_shapes() -> None:
    shape = parse_shape("B_x L E_yz {x0 unreduced}")
    assert shape.dims == (("B", ("x",)), ("L", ()), ("E", ("y", "z")))
    assert shape.unreduced == ("x0",)
    assert str(shape) == "B_x L E_yz {x0 unreduced}"


def test_names_of_several_letters_stand_in_braces() -> None:
    assert split_axes("x0{dcn}y") == ("x0", "dcn", "y")
    assert join_axes(("x0", "dcn", "y")) == "x0{dcn}y"


def test_local_shape() -> None:
    sizes = {"B": 8, "L": 16, "E": 64}
    assert parse_shape("B_x L E_yz").local_shape(sizes, {"x": 2, "y": 4, "z": 2}) == (4, 16, 8)


def test_every_dimension_that_does_not_divide_is_named() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_shape("B_x E_y").local_shape({"B": 3, "E": 5}, {"x": 2, "y": 2})
    assert [offence.split(": ")[1].split(" does")[0] for offence in caught.value.offences] == ["B = 3", "E = 5"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("B_x E_x", "axis 'x' is used more than once"),
        ("G_x", "unknown dimension letter 'G'"),
        ("B_ L", "'B_' is not a dimension"),
        ("b", "'b' is not a dimension"),
    ],
)
def test_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        parse_shape(text)


def test_axis_names() -> None:
    assert is_axis_name("x0")
    assert is_axis_name("dcn")
    assert not is_axis_name("X")
    assert not is_axis_name("0x")


@given(st.data())
def test_print_then_parse(data: st.DataObject) -> None:
    axes = data.draw(st.permutations(["x", "y", "z", "x0", "x1", "dcn", "core"]))
    letters = data.draw(st.lists(st.sampled_from(sorted(LETTERS)), min_size=1, max_size=5, unique=True))
    dims = []
    for letter in letters:
        count = data.draw(st.integers(0, min(2, len(axes))))
        taken, axes = tuple(axes[:count]), axes[count:]
        dims.append((letter, taken))
    shape = ShardedShape(tuple(dims), tuple(axes[:1]))
    assert parse_shape(str(shape)) == shape
