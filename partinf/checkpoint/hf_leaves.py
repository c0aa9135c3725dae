"""Slices of a parameter tree's leaves, read from the tensors behind them, and whole leaves written into them.

Only the bytes under a slice are read, and where a leaf stacks many tensors, or orders their dimensions otherwise, one tensor's part is in
memory at a time in addition to the slice.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from partinf.checkpoint import mxfp4
from partinf.checkpoint.hf_names import LeafSource
from partinf.checkpoint.safetensors_files import TensorReader
from partinf.foundation.rounding import round_up

_LINE = 64  # bytes


def _runs(group: tuple[int, ...], wanted: tuple[range, ...]) -> list[tuple[int, int]]:
    """Contiguous [start, stop) pieces of a tensor's dimension that hold the wanted indices of the leaf's dimensions merged in it.

    Indices beyond the dimension, which are the padding of the vocabulary or of the heads, have no piece.
    """
    *outer, size = group
    inner = (min(wanted[-1].start, size), min(wanted[-1].stop, size))
    if inner[0] == inner[1]:
        return []
    if not outer:
        return [inner]
    major = range(min(wanted[0].start, outer[0]), min(wanted[0].stop, outer[0]))
    if inner == (0, size):
        return [(major.start * size, major.stop * size)]
    return [(head * size + inner[0], head * size + inner[1]) for head in major]


def _placed(runs: list[tuple[int, int]]) -> list[tuple[slice, slice]]:
    """Each run as (where in the tensor, where in the local block)."""
    ends = list(itertools.accumulate(stop - start for start, stop in runs))
    return [(slice(start, stop), slice(end - (stop - start), end)) for (start, stop), end in zip(runs, ends, strict=True)]


def read_leaf(reader: TensorReader, source: LeafSource, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """The slice `leaf[index]` as [*lead, *padded] cut by `index`, in `dtype`; reads only the bytes under it, and zeros in the padding."""
    ranges = tuple(range(*part.indices(size)) for part, size in zip(index, source.leaf_shape, strict=True))
    if source.times is not None:
        return _read_product(reader, source, ranges, dtype)
    lead, inner = ranges[: len(source.lead)], ranges[len(source.lead) :]
    found = _aligned_zeros((math.prod(len(part) for part in lead), *(len(part) for part in inner)), dtype)
    for position, place in enumerate(itertools.product(*lead)):
        if any(one >= count for one, count in zip(place, source.lead, strict=True)):
            continue  # padding
        number = int(np.ravel_multi_index(place, source.lead)) if place else 0
        if source.order:
            _read_ordered(reader, source, number, inner, found[position])
        else:
            _read_into(reader, source, number, inner, found[position])
    return found.reshape(tuple(len(part) for part in ranges))


def _read_product(reader: TensorReader, source: LeafSource, wanted: tuple[range, ...], dtype: np.dtype) -> np.ndarray:
    """A slice of a leaf that is the product of two tensors, made in float32."""
    assert source.times is not None
    (name,), (other, shape) = source.names, source.times
    found, rows, columns = np.zeros([len(part) for part in wanted], dtype), source.groups[0][0], wanted[1]
    last = shape[-1] == source.tensor_shape[-1]  # what is summed over
    part = slice(columns.start, columns.stop)
    matrix = reader.read(other, (part, slice(None)) if last else (slice(None), part)).astype(np.float32)
    table = reader.read(name, (slice(wanted[0].start, min(wanted[0].stop, rows)), slice(None))).astype(np.float32)
    found[: len(table)] = table @ (matrix.T if last else matrix)
    return found


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that begin where a line of the cache does: a device that is the host takes such an array as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    held = np.zeros(size + _LINE, np.uint8)
    start = -held.ctypes.data % _LINE
    return held[start : start + size].view(dtype).reshape(shape)


def _read_ordered(reader: TensorReader, source: LeafSource, number: int, wanted: tuple[range, ...], into: np.ndarray) -> None:
    """A slice of a leaf whose dimensions have another order than the tensor's, one of its first dimension at a time."""
    for place, one in enumerate(wanted[0]):
        dims = source.in_tensor((range(one, one + 1), *wanted[1:]), range(1))
        block = np.zeros([len(dim) for dim in dims], into.dtype)
        _read_into(reader, source, number, dims, block)
        kept = tuple(slice(None) if at >= 0 else 0 for at in source.order)
        axes = source.in_leaf(tuple(range(len(dims))))
        left = [dim for dim, at in enumerate(source.order) if at >= 0]
        into[place] = block[kept].transpose([left.index(axis) for axis in axes])[0]


def _read_into(reader: TensorReader, source: LeafSource, number: int, wanted: tuple[range, ...], into: np.ndarray) -> None:
    """A slice of one tensor's part of a leaf, in the tensor's order of dimensions; nothing into the padding."""
    dims = iter(wanted)
    by_group = [tuple(itertools.islice(dims, len(group))) for group in source.groups]
    placed = [_placed(_runs(group, one)) for group, one in zip(source.groups, by_group, strict=True)]
    block = into.reshape([math.prod(len(part) for part in one) for one in by_group])
    for pieces in itertools.product(*placed):
        block[tuple(here for _, here in pieces)] = _read_rows(reader, source, number, tuple(there for there, _ in pieces))


def _read_rows(reader: TensorReader, source: LeafSource, number: int, index: tuple[slice, ...]) -> np.ndarray:
    """A block of the leaf's part of a tensor, [out, in] however it is stored."""
    rows, *columns = index
    head, rotated = source.groups[0][-1], source.neighbours[number]
    if rotated and _heads_are_columns(source):
        plain = replace(source, neighbours=(0,) * len(source.names))
        size = source.groups[1][0]
        return _read_rows(reader, plain, number, (rows, slice(0, size)))[:, _halves(size, rotated)[columns[0]]]
    if rotated:  # whole heads are read, for their rows come in another order
        first = rows.start // head * head
        heads = _read_rows(
            reader, replace(source, neighbours=(0,) * len(source.names)), number, (slice(first, round_up(rows.stop, head)), *columns)
        )
        wanted = np.arange(rows.start, rows.stop)
        return heads[wanted // head * head - first + _halves(head, rotated)[wanted % head]]
    name, blocks = source.names[number], []
    for there in _pieces(rows, source, number):
        where = (there, *columns)
        if source.packed:
            blocks.append(mxfp4.read(reader, name, where))
        else:
            blocks.append(reader.read(name, where[::-1]).T if source.transposed else reader.read(name, where))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _heads_are_columns(source: LeafSource) -> bool:
    """Whether the tensor has a row for each head, of which the columns are what is rotated, as a norm's weight has."""
    return len(source.groups) == 2 and len(source.groups[0]) == 1


def _pieces(rows: slice, source: LeafSource, number: int) -> Iterator[slice]:
    """Where consecutive rows of the leaf lie in a tensor."""
    row = rows.start
    while row < rows.stop:
        piece, within = divmod(row, source.piece)
        count = min(rows.stop - row, source.piece - within)
        start = source.offsets[number] + piece * source.stride + within
        yield slice(start, start + count)
        row += count


@functools.cache
def _halves(head: int, rotated: int) -> np.ndarray:
    """For each row of a head, its place where neighbours are pairs: those that come first in a pair, those that come second, the rest."""
    pairs = np.arange(rotated).reshape(-1, 2)
    return np.concatenate([pairs[:, 0], pairs[:, 1], np.arange(rotated, head)])


def stored_in(sources: Mapping[str, LeafSource]) -> dict[str, list[tuple[str, int]]]:
    """Every tensor, and which leaves are stored in it: their paths, and its number among the tensors of each."""
    found: dict[str, list[tuple[str, int]]] = {}
    for path, source in sources.items():
        for number, name in enumerate(source.names):
            found.setdefault(name, []).append((path, number))
    return found


def write_part(tensor: np.ndarray, source: LeafSource, number: int, leaf: np.ndarray) -> None:
    """Put what a tensor stores of a whole leaf into its place there, without the leaf's padding: the inverse of `read_leaf`."""
    whole = leaf[tuple(slice(0, size) for size in source.lead)].reshape((len(source.names), *source.in_leaf(source.padded)))[number]
    if source.order:
        whole = whole.transpose([place for place in source.order if place >= 0])
    sizes = [size for group in source.groups for size in group]
    kept = [size for dim, size in enumerate(sizes) if not source.order or source.order[dim] >= 0]
    part = whole[tuple(slice(0, size) for size in kept)].reshape([math.prod(group) for group in source.groups])
    if source.neighbours[number] and _heads_are_columns(source):
        columns = np.empty_like(part)
        columns[:, _halves(source.groups[1][0], source.neighbours[number])] = part
        part = columns
    elif source.neighbours[number]:
        head = source.groups[0][-1]
        row = np.arange(part.shape[0])
        rows = np.empty_like(part)
        rows[row // head * head + _halves(head, source.neighbours[number])[row % head]] = part
        part = rows
    outputs_first = tensor.T if source.transposed else tensor
    row_of_part = 0
    for there in _pieces(slice(0, part.shape[0]), source, number):
        count = there.stop - there.start
        outputs_first[there] = part[row_of_part : row_of_part + count]
        row_of_part += count
