"""Moving a tensor from one split to another inside `shard_map`: every collective of a forward pass goes through `move`.

A matrix-like tensor has *rows* (tokens, or the output dimension of a weight) and *columns* (E, F, heads, or V). A `Split` says which
mesh axes split its rows and its columns and over which it is still to be summed; on all other axes it is whole and equal.

A split dimension is a number in mixed radix: its leading digits are mesh axes in a fixed order (`Frame`), the last digit is the rest.
The device at coordinate i of axis a holds the entries whose digit a is i, in order. Splitting by any subset of the digits therefore
never permutes anything: gathering y out of `F.yz` gives the columns of z in their own order, and a later split finds them where the
weights of another phase have them.

Per axis there are four states (unreduced, rows, columns, whole) and one way from each to each:

    whole     -> rows/columns   slice, free
    unreduced -> rows/columns   reduce-scatter, axis by axis (the TPU compiler keeps those; fused ones it turns into all-reduces)
    unreduced -> whole          one all-reduce over all such axes
    rows     <-> columns        one all-to-all over all such axes, each way
    rows/columns -> whole       one all-gather over all such axes, each dimension, that over fewer axes first

taken in this order, so that what shrinks the payload comes first and what grows it last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[str, ...]

_TILE_ROWS = 8
_FEW_ROWS_AS = 16  # rows of a tile in bfloat16; eight of float32 are too few
_TILE_WIDTH = 256  # of the last dimension in bfloat16; logits in float32 became an all-reduce at multiples of 128 too


@dataclass(frozen=True)
class Split:
    """The mesh axes that split rows and columns, and those over which the tensor is still to be summed."""

    rows: Axes = ()
    cols: Axes = ()
    unreduced: Axes = ()


@dataclass(frozen=True)
class Frame:
    """The digits of the two dimensions that a `move` may split, major first, and where these dimensions stand in the array.

    Attributes:
        rows, cols: axes that may split the dimension, in digit order.
        sizes: size of every mesh axis.
        row_dim, col_dim: positions of the two dimensions.
        order: of the axes in reduce-scatters; as a split names them if not given.
    """

    rows: Axes
    cols: Axes
    sizes: Mapping[str, int]
    row_dim: int = 0
    col_dim: int = 1
    order: Axes = ()

    def same(self, one: Split, other: Split) -> bool:
        """Whether both splits leave every device with the same part."""
        parts = (_drop_trivial(split, self) for split in (one, other))
        return len({(frozenset(p.rows), frozenset(p.cols), frozenset(p.unreduced)) for p in parts}) == 1


def move(x: jax.Array, frame: Frame, source: Split, target: Split) -> jax.Array:
    """Bring the local part `x` of a tensor split as `source` to the split `target`.

    Axes of size 1 cost nothing. `target` must be reduced: a partial sum cannot be made from a whole.
    """
    have, want = _drop_trivial(source, frame), _drop_trivial(target, frame)
    if want.unreduced and want.unreduced != have.unreduced:
        raise ValueError(f"cannot move to a partial sum: {want}")
    rows, cols = _Dim(frame.row_dim, frame.rows, frame), _Dim(frame.col_dim, frame.cols, frame)
    row_axes, col_axes = list(have.rows), list(have.cols)
    pending = [axis for axis in have.unreduced if axis not in want.unreduced]
    held = set(have.rows) | set(have.cols) | set(have.unreduced)

    for dim, axes, wanted in ((rows, row_axes, want.rows), (cols, col_axes, want.cols)):
        for axis in wanted:
            if axis not in held:
                x = dim.slice(x, axes, axis)
                axes.append(axis)
    for axis in sorted(pending, key=frame.order.index) if frame.order else pending:
        for dim, axes, wanted in ((rows, row_axes, want.rows), (cols, col_axes, want.cols)):
            if axis in wanted:
                x = dim.reduce_scatter(x, axes, axis)
                axes.append(axis)
    to_whole = tuple(axis for axis in pending if axis not in want.rows + want.cols)
    if to_whole:
        x = lax.psum(x, to_whole)
    x = _exchange(x, cols, col_axes, rows, row_axes, tuple(a for a in rows.order if a in want.rows and a in col_axes))
    x = _exchange(x, rows, row_axes, cols, col_axes, tuple(a for a in cols.order if a in want.cols and a in row_axes))
    ends = (
        (tuple(axis for axis in dim.order if axis in axes and axis not in wanted), dim, axes)
        for dim, axes, wanted in ((rows, row_axes, want.rows), (cols, col_axes, want.cols))
    )
    for gone, dim, axes in sorted(ends, key=lambda end: len(end[0])):  # the last one moves most, so it gets the links of most axes
        if gone:
            x = dim.gather(x, axes, gone)
    return x


def take_split(x: jax.Array, dim: int, order: Axes, axes: Axes, sizes: Mapping[str, int]) -> jax.Array:
    """The part of a whole array that this device holds when `axes` split its dimension `dim`, whose digits are `order`."""
    frame = Frame(order, (), sizes, dim, dim)
    return move(x, frame, Split(), Split(rows=axes))


def digit(x: jax.Array, dim: int, order: Axes, split: Axes, axis: str, index: jax.Array | int, sizes: Mapping[str, int]) -> jax.Array:
    """The part of `x` with digit `axis` = `index` of its dimension `dim`, whose digits are `order` and which `split` split already."""
    return _Dim(dim, order, Frame(order, (), sizes, dim, dim)).at(x, split, axis, index)


def digit_of_layer(
    stacked: jax.Array, layer: jax.Array, dim: int, order: Axes, split: Axes, axis: str, index: jax.Array, sizes: Mapping[str, int]
) -> jax.Array:
    """`digit` of one layer of stacked arrays, in a single slice: a TPU reads that part alone, where of a slice of a slice it would first
    lay out the whole layer anew."""
    opened, shape = _Dim(dim + 1, order, Frame(order, (), sizes, dim, dim)).open(stacked, split, axis)
    start, size = [0] * opened.ndim, list(opened.shape)
    for place, at in ((0, layer), (dim + 2, index)):
        start[place], size[place] = at, 1
    return lax.dynamic_slice(opened, start, size).reshape(shape[1:])


@dataclass(frozen=True)
class _Dim:
    """One dimension of an array seen as digits; methods take the list of axes that split it so far."""

    index: int
    order: Axes
    frame: Frame

    def local_digits(self, split: Sequence[str]) -> list[str]:
        return [axis for axis in self.order if axis not in split and self.frame.sizes[axis] > 1]

    def open(self, x: jax.Array, split: Sequence[str], axis: str) -> tuple[jax.Array, tuple[int, ...]]:
        """Reshape this dimension to [before, axis, after] and return the shape without the axis."""
        before = math.prod(self.frame.sizes[a] for a in self.local_digits(split)[: self.local_digits(split).index(axis)])
        size, length = self.frame.sizes[axis], x.shape[self.index]
        head, tail = x.shape[: self.index], x.shape[self.index + 1 :]
        if length % (before * size):
            raise ValueError(f"dimension {self.index} of {x.shape} does not split over axis {axis} of size {size}")
        opened = x.reshape(*head, before, size, length // (before * size), *tail)
        return opened, (*head, length // size, *tail)

    def slice(self, x: jax.Array, split: Sequence[str], axis: str) -> jax.Array:
        return self.at(x, split, axis, lax.axis_index(axis))

    def at(self, x: jax.Array, split: Sequence[str], axis: str, index: jax.Array | int) -> jax.Array:
        opened, shape = self.open(x, split, axis)
        if opened.shape[self.index] == 1:  # a run of entries; a reshape would make a TPU lay the array out anew
            return lax.dynamic_slice_in_dim(x, index * shape[self.index], shape[self.index], self.index)
        return lax.dynamic_index_in_dim(opened, index, self.index + 1, keepdims=False).reshape(shape)

    def reduce_scatter(self, x: jax.Array, split: Sequence[str], axis: str) -> jax.Array:
        """A TPU's compiler keeps it where what each device gets of the last dimension fills whole tiles of a narrow type; elsewhere the
        parts get a dimension of their own, which costs a copy within the chip where an all-reduce would cost twice the bytes between
        chips. Parts of few rows are cut into sixteen each: of fewer rows it makes an all-reduce, however wide they are."""
        opened, shape = self.open(x, split, axis)
        whole_tiles = self.index < x.ndim - 1 or (x.dtype.itemsize < 4 and shape[self.index] % _TILE_WIDTH == 0)
        if opened.shape[self.index] > 1:
            return lax.psum_scatter(opened, axis, scatter_dimension=self.index + 1).reshape(shape)
        if self.index == 0 and x.ndim > 2 and x.shape[-2] == 1 and shape[0] % _TILE_ROWS == 0:  # tiles that would hold one row each
            return lax.psum_scatter(x.reshape(x.shape[0], -1), axis, scatter_dimension=0, tiled=True).reshape(shape)
        num_rows = shape[0] if self.index == 0 else math.prod(shape[:-1]) if self.index == x.ndim - 1 else _TILE_ROWS
        if num_rows < _TILE_ROWS and math.prod(shape) % _FEW_ROWS_AS == 0:
            parts = jnp.moveaxis(opened, self.index + 1, 0).reshape(self.frame.sizes[axis] * _FEW_ROWS_AS, -1)
            return lax.psum_scatter(parts, axis, scatter_dimension=0, tiled=True).reshape(shape)
        if whole_tiles:
            return lax.psum_scatter(x, axis, scatter_dimension=self.index, tiled=True)
        return lax.psum_scatter(jnp.squeeze(opened, self.index), axis, scatter_dimension=self.index).reshape(shape)

    def gather(self, x: jax.Array, split: list[str], axes: Axes) -> jax.Array:
        """All-gather over `axes` at once, which leave `split`."""
        rest = [axis for axis in split if axis not in axes]
        local, result = self.local_digits(split), self.local_digits(rest)
        split[:] = rest
        if result == [*axes, *local]:
            return lax.all_gather(x, axes, axis=self.index, tiled=True)
        return self._place(lax.all_gather(x, axes, axis=0), axes, local, result)

    def lead(self, x: jax.Array, split: list[str], axes: Axes) -> jax.Array:
        """Bring the digits `axes` of this dimension to a new leading dimension; they join `split`."""
        local = self.local_digits(split)
        sizes = self.frame.sizes
        head, tail = x.shape[: self.index], x.shape[self.index + 1 :]
        rest = x.shape[self.index] // math.prod(sizes[a] for a in local)
        opened = x.reshape(*head, *(sizes[a] for a in local), rest, *tail)
        opened = jnp.moveaxis(opened, [self.index + local.index(a) for a in axes], range(len(axes)))
        length = x.shape[self.index] // math.prod(sizes[a] for a in axes)
        split.extend(axes)
        return opened.reshape(-1, *head, length, *tail)

    def _place(self, x: jax.Array, axes: Axes, local: list[str], result: list[str]) -> jax.Array:
        """Fold the leading dimension of `x`, the digits `axes`, into this dimension so that its digits read `result`."""
        sizes = self.frame.sizes
        head, length, tail = x.shape[1 : self.index + 1], x.shape[self.index + 1], x.shape[self.index + 2 :]
        rest = length // math.prod(sizes[a] for a in local)
        opened = x.reshape(*(sizes[a] for a in axes), *head, *(sizes[a] for a in local), rest, *tail)
        first = self.index + len(axes)
        where = {axis: position for position, axis in enumerate(axes)} | {axis: first + position for position, axis in enumerate(local)}
        order = [*range(len(axes), first), *(where[a] for a in result), *range(first + len(local), opened.ndim)]
        return opened.transpose(order).reshape(*head, -1, *tail)

    def join(self, x: jax.Array, split: list[str], axes: Axes) -> jax.Array:
        """Fold the leading dimension, the digits `axes`, into this dimension; they leave `split`."""
        local = self.local_digits(split)
        rest = [axis for axis in split if axis not in axes]
        split[:] = rest
        return self._place(x, axes, local, self.local_digits(rest))


def _exchange(x: jax.Array, source: _Dim, source_axes: list[str], target: _Dim, target_axes: list[str], axes: Axes) -> jax.Array:
    """All-to-all: `axes` stop splitting `source` and begin to split `target`."""
    if not axes:
        return x
    x = target.lead(x, target_axes, axes)  # [parts of target, ...]
    x = lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)  # [parts of source, ...]
    return source.join(x, source_axes, axes)


def _drop_trivial(split: Split, frame: Frame) -> Split:
    keep = lambda axes: tuple(axis for axis in axes if frame.sizes[axis] > 1)  # noqa: E731
    return Split(keep(split.rows), keep(split.cols), keep(split.unreduced))
