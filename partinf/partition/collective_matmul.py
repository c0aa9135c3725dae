"""Collective matmuls: an all-gather and the products that need it, or products and the reduce-scatter of their sum, as one loop.

The plain form runs the collective by itself while the multipliers wait. The loop goes around a ring of one mesh axis: every step
multiplies one part and sends another to a neighbour, so that the links work behind the multipliers (Wang et al., "Overlap Communication
with Dependent Computation via Decomposition in Large Deep Learning Models", 2023; section 3.5 of Pope et al., 2023). Three rings:

    one-way     n - 1 steps, each sends a whole part to one neighbour: uses one link of the axis
    halves      n - 1 steps, each sends one half of the rows to the left and the other to the right: both links, for throughput
    both-ways   n / 2 steps, each sends whole parts to both neighbours: both links and half as many steps, for latency

`loop=None` is the plain twin. Axes of the same collective that are not looped over keep their plain collective, before a gather's loop
and after a scatter's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from partinf.layout import Loop, Ring
from partinf.partition.collectives import Axes, Frame, Split, digit, digit_of_layer, move

Cut = Callable[[jax.Array, int, Any], jax.Array]
"""(array, dimension, layer) → the part of it that belongs to the part at hand, of a dimension with the digits of the frame's columns; of
that layer if the array holds all of them, which the dimension does not count, and else None."""


def gather_multiply(
    x: jax.Array,
    frame: Frame,
    source: Split,
    target: Split,
    loop: Loop | None,
    multiply: Callable[[jax.Array, Cut, slice], tuple[jax.Array, ...]],
) -> tuple[jax.Array, ...]:
    """Products that contract the columns of x, which are gathered from `source` to `target`.

    Args:
        x: [rows, columns]. multiply: (a part of x, how to cut the weights' contracted dimension, which rows of the gathered x those of
            the part are) → products, rows first, which are summed over the parts.
    """
    axis = _looped(loop, frame, source.cols, target.cols)
    if loop is None or axis is None or not loop.gathers:
        whole = move(x, frame, source, target)
        return multiply(whole, _whole, slice(0, whole.shape[0]))
    x = move(x, frame, source, Split(source.rows, (*target.cols, axis)))
    me, size = lax.axis_index(axis), frame.sizes[axis]

    def around(rows: slice, *ways: tuple[int, int]) -> Any:
        """The products of these rows with all parts: the device's own, and so many in each direction."""

        def part(chunk: jax.Array, index: jax.Array) -> tuple[jax.Array, ...]:
            return multiply(chunk, _part(frame, target.cols, axis, index % size), rows)

        total = part(x[rows], me)
        for direction, steps in ways:
            chunk = x[rows]
            for step in range(1, steps + 1):
                chunk = _shift(chunk, axis, size, -direction)  # the part of the neighbour ahead
                total = jax.tree.map(jnp.add, total, part(chunk, me + direction * step))
        return total

    count = x.shape[0]
    if loop.ring is Ring.HALVES and count > 1:
        halves = around(slice(0, count // 2), (1, size - 1)), around(slice(count // 2, count), (-1, size - 1))
        return tuple(jnp.concatenate(both) for both in zip(*halves, strict=True))
    ahead = size // 2 if loop.ring is Ring.BOTH else size - 1
    return around(slice(0, count), (1, ahead), (-1, size - 1 - ahead))


def multiply_scatter(
    multiply: Callable[[Cut, slice], jax.Array], frame: Frame, rows: int, source: Split, target: Split, loop: Loop | None, dtype: Any
) -> jax.Array:
    """A product whose partial sums are reduced, from `source` to `target`, into its columns.

    Args:
        multiply: (how to cut the weights' dimension of the product's columns, rows) → a part [rows, columns], which is added in float32.
        rows: of the product on this device. dtype: of what is sent and returned.
    """
    axis = _looped(loop, frame, target.cols, source.cols)
    every = slice(0, rows)
    if loop is None or axis is None:
        return move(multiply(_whole, every).astype(dtype), frame, source, target)
    me, size = lax.axis_index(axis), frame.sizes[axis]

    def part(index: jax.Array, rows: slice) -> jax.Array:
        return multiply(_part(frame, source.cols, axis, index % size), rows).astype(jnp.float32)

    def around(direction: int, steps: int, rows: slice) -> jax.Array:
        """What the `steps` devices behind this one add to its own part, on its way here."""
        total = part(me + direction * steps, rows).astype(dtype)
        for step in range(steps - 1, -1, -1):
            total = _shift(total, axis, size, direction)
            if step:
                total = (total.astype(jnp.float32) + part(me + direction * step, rows)).astype(dtype)
        return total

    def whole(steps: tuple[tuple[int, int], ...], rows: slice) -> jax.Array:
        arrived = [around(direction, count, rows).astype(jnp.float32) for direction, count in steps if count]
        return sum(arrived, part(me, rows)).astype(dtype)

    if loop.ring is Ring.HALVES and rows > 1:
        out = jnp.concatenate([whole(((1, size - 1),), slice(0, rows // 2)), whole(((-1, size - 1),), slice(rows // 2, rows))])
    else:
        ahead = size // 2 if loop.ring is Ring.BOTH else size - 1
        out = whole(((1, ahead), (-1, size - 1 - ahead)), every)
    reduced = Split(source.rows, (*source.cols, axis), tuple(a for a in source.unreduced if a != axis))
    return move(out, frame, reduced, target)


def _whole(array: jax.Array, dim: int, layer: Any) -> jax.Array:
    return array if layer is None else lax.dynamic_index_in_dim(array, layer, keepdims=False)


def _part(frame: Frame, split: Axes, axis: str, index: jax.Array) -> Cut:
    def cut(array: jax.Array, dim: int, layer: Any) -> jax.Array:
        if layer is None:
            return digit(array, dim, frame.cols, split, axis, index, frame.sizes)
        return digit_of_layer(array, layer, dim, frame.cols, split, axis, index, frame.sizes)

    return cut


def _looped(loop: Loop | None, frame: Frame, wide: tuple[str, ...], narrow: tuple[str, ...]) -> str | None:
    """The axis to loop over, if it splits the columns on one side only."""
    if loop is None or frame.sizes[loop.axis] == 1 or loop.axis not in wide or loop.axis in narrow:
        return None
    return loop.axis


def _shift(x: jax.Array, axis: str, size: int, by: int) -> jax.Array:
    """Send to the device `by` places further along the ring."""
    return lax.ppermute(x, axis, [(i, (i + by) % size) for i in range(size)])
