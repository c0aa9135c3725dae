"""The notation: how shapes are printed, and what is no shape refused with its reason."""

from __future__ import annotations

import pytest

from partinf.axes import ShardedShape, is_axis_name, join_axes
from partinf.foundation.errors import InvalidInput


def test_the_papers_shapes() -> None:
    dims = (("B", ("x",)), ("L", ()), ("E", ("y", "z")))
    assert str(ShardedShape(dims, ("x0",))) == "B_x L E_yz {x0 unreduced}"
    assert str(ShardedShape((("E", ("dcn", "y")), ("F", ())), ("x", "core"))) == "E_{dcn}y F {x{core} unreduced}"


def test_names_of_several_letters_stand_in_braces() -> None:
    assert join_axes(("x0", "dcn", "y")) == "x0{dcn}y"


def test_shapes_that_are_none_are_refused_with_every_reason() -> None:
    with pytest.raises(InvalidInput) as caught:
        ShardedShape((("B", ("x",)), ("G", ("y",))), ("x",))
    unknown, twice = caught.value.offences
    assert "unknown dimension letter 'G'" in unknown
    assert "axis 'x' is used more than once" in twice


def test_axis_names() -> None:
    assert is_axis_name("x0")
    assert is_axis_name("dcn")
    assert not is_axis_name("X")
    assert not is_axis_name("0x")
