"""`move` against slices of a whole array: every pair of states of every axis, in any digit order."""

from __future__ import annotations

import itertools
import random

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from partinf.partition.collectives import Axes, Frame, Split, move, take_split

ROWS, COLS = 16, 24
WHOLE = np.arange(ROWS * COLS, dtype=np.float32).reshape(ROWS, COLS)
MESHES = {"2x2x2": {"x": 2, "y": 2, "z": 2}, "4x2": {"x": 4, "y": 2}, "1x8": {"x": 1, "y": 8}}


def held(length: int, order: Axes, split: Axes, at: dict[str, int], sizes: dict[str, int]) -> np.ndarray:
    """The entries of a dimension that the device at these coordinates holds, from the definition of digits."""
    entries, rest, keep = np.arange(length), length, np.ones(length, bool)
    for axis in order:
        rest //= sizes[axis]
        if axis in split:
            keep &= entries // rest % sizes[axis] == at[axis]
    return entries[keep]


def part(frame: Frame, split: Split, at: dict[str, int]) -> np.ndarray:
    sizes = dict(frame.sizes)
    rows, cols = held(ROWS, frame.rows, split.rows, at, sizes), held(COLS, frame.cols, split.cols, at, sizes)
    return WHOLE[np.ix_(rows, cols)] / np.prod([sizes[axis] for axis in split.unreduced], dtype=int)


def check_move(mesh_name: str, frame: Frame, source: Split, target: Split) -> None:
    sizes = MESHES[mesh_name]
    shape, axes = tuple(sizes.values()), tuple(sizes)
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), axes, axis_types=(AxisType.Auto,) * len(axes))
    places = [dict(zip(axes, index, strict=True)) for index in np.ndindex(*shape)]
    parts = np.stack([part(frame, source, at) for at in places])
    local = lambda x: move(x[0], frame, source, target)[None]  # noqa: E731
    moved = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(axes), out_specs=P(axes), check_vma=False))(parts)
    for got, at in zip(np.asarray(moved).reshape(len(places), -1, moved.shape[-1]), places, strict=True):
        np.testing.assert_allclose(got, part(frame, target, at))


def cases(mesh_name: str) -> list[tuple[Frame, Split, Split]]:
    """All sources and targets, digit orders drawn."""
    sizes, rng, found = MESHES[mesh_name], random.Random(5), []
    axes = tuple(sizes)

    def split(states: tuple[str, ...]) -> Split:
        return Split(*(tuple(a for a, s in zip(axes, states, strict=True) if s == kind) for kind in ("rows", "cols", "unreduced")))

    for source in itertools.product(("rows", "cols", "unreduced", "whole"), repeat=len(axes)):
        for target in itertools.product(("rows", "cols", "whole"), repeat=len(axes)):
            orders = tuple(rng.sample(axes, len(axes))), tuple(rng.sample(axes, len(axes)))
            found.append((Frame(*orders, sizes), split(source), split(target)))
    return found


@pytest.mark.parametrize(("mesh_name", "count"), [("2x2x2", 24), ("4x2", 12), ("1x8", 4)])
def test_sampled_moves(mesh_name: str, count: int) -> None:
    for frame, source, target in random.Random(1).sample(cases(mesh_name), count):
        check_move(mesh_name, frame, source, target)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", MESHES)
def test_every_move(mesh_name: str) -> None:
    for frame, source, target in cases(mesh_name):
        check_move(mesh_name, frame, source, target)


def test_a_partial_sum_cannot_be_made() -> None:
    frame = Frame(("x",), (), {"x": 2})
    with pytest.raises(ValueError, match="partial sum"):
        move(jax.numpy.zeros((4, 4)), frame, Split(), Split(unreduced=("x",)))


def test_take_split_of_trivial_axes_is_the_whole() -> None:
    whole = jax.numpy.arange(6)
    assert take_split(whole, 0, ("x",), ("x",), {"x": 1}).tolist() == list(range(6))
