"""Where each leaf of the parameter tree lies in Hugging Face tensors, and slices of it.

The names stand in `model.families`; this module works out which bytes of which tensor a leaf is. Validation, loading and saving are
derived from it, and all of it is numpy: no device is needed to check a directory.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from partinf.checkpoint.safetensors_files import TensorReader
from partinf.foundation.errors import raise_offences
from partinf.foundation.rounding import round_up
from partinf.model.config import ModelConfig
from partinf.model.families import family_of
from partinf.model.family import Naming, Stored
from partinf.model.weights import leaf_names


def naming_of(config: ModelConfig, found: Collection[str] = ()) -> Naming:
    """The names of the model's tensors, with the one base of which most are among those `found` in a directory; of equals the first.

    Raises:
        InvalidInput: blocks that no family has, or weights for which the family has no tensor.
    """
    family, present, wanted = family_of(config), set(found), leaf_names(config)
    named = family.naming_of(config)
    raise_offences(
        f"model {config.name}: {family.title} directories have no tensor for the weight {leaf}" for leaf in sorted(wanted - named.leaves)
    )
    namings = [replace(named, bases=(base,)) for base in named.bases]
    return max(namings, key=lambda naming: len(present & tensor_shapes(config, naming).keys()))


def tolerated(config: ModelConfig, naming: Naming) -> tuple[str, ...]:
    """Endings of tensor names that may be in a directory and are not read: buffers, and a copy of the embedding where it is tied."""
    return (*naming.buffers, _head(naming)) if config.tied_embeddings else naming.buffers


def _head(naming: Naming) -> str:
    """The ending of the name of the output matrix."""
    stored = naming.model_weights.get("unembed")
    return stored.tensors[0].format(base="", head="") if stored else "lm_head.weight"


def tied_offences(reader: TensorReader, config: ModelConfig, naming: Naming) -> list[str]:
    """The offence of an output matrix that is stored beside the embedding, is said to be the same, and is another."""
    embed = naming.named(naming.model_weights["embed"].tensors[0])
    heads = [name for name in reader.inventory.tensors if name.endswith(_head(naming))] if config.tied_embeddings else []
    if "unembed" in naming.model_weights:
        instead = "set tie_word_embeddings to false to use it, as transformers does, or remove it from the file"
    else:
        instead = "an output matrix of its own is not supported for this family"
    return [
        f"{name} differs from {embed}, although tie_word_embeddings says that they are one; {instead}"
        for name in heads
        if not reader.same(embed, name)
    ]


@dataclass(frozen=True)
class LeafSource:
    """The tensors behind one leaf.

    Attributes:
        lead: Leading dimensions of the leaf over which tensors are stacked: none, (2,), (layers,) or (layers, 2).
        names: The tensors' names, row-major over `lead`.
        starts: The row of each tensor, once it is [out, in], at which the leaf's begin.
        piece, stride: The leaf has so many rows one after the other, and so many rows of the tensor lie between their beginnings.
        groups: Sizes of the leaf's other dimensions, grouped by dimension of the tensor, without padding.
        padded: Sizes of the same dimensions in the leaf.
        tensor_shape: The shape of each tensor as it is stored.
        transposed: The tensors are stored [in, out].
        neighbours: Of each tensor, how many leading rows of a head are pairs of neighbours.
    """

    lead: tuple[int, ...]
    names: tuple[str, ...]
    starts: tuple[int, ...]
    piece: int
    stride: int
    groups: tuple[tuple[int, ...], ...]
    padded: tuple[int, ...]
    tensor_shape: tuple[int, ...]
    transposed: bool
    neighbours: tuple[int, ...]

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        return self.lead + self.padded


def _sizes(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    return {
        "V": vocab_size,
        "E": config.embed_dim,
        "F": config.ffn_dim,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "G": config.queries_per_kv_head,
        "Q": config.head_dim,
        "M": config.max_len,
        "1": 1,
    }


def _rotated(config: ModelConfig) -> int:
    """Leading dimensions of a head that are rotated: the same in all kinds of layers that rotate any."""
    rotations = [kind.attention.rotation for kind in config.layer_kinds]
    return next((rotation.rotated(config.head_dim) for rotation in rotations if rotation is not None), 0)


def _size(letters: str, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[letter] for letter in letters)


def _source(names: tuple[str, ...], weight: Stored, config: ModelConfig, layers: int, padded_heads: int, rotated: int) -> LeafSource:
    """The source of a leaf that stacks `layers` layers, or 0 for one that does not; so many rows of its heads are pairs of neighbours."""
    sizes, whole = _sizes(config, config.vocab_size), _sizes(config.with_padded_heads(padded_heads), config.padded_vocab_size)
    dims = [[group.strip("()")] if group.startswith("(") else list(group) for group in weight.dims.split()]  # letters of each dimension
    groups = tuple(tuple(_size(dim, sizes) for dim in group) for group in dims)
    padded = tuple(_size(dim, whole) for group in dims for dim in group)
    lead = ((layers,) if layers else ()) + ((len(weight.tensors),) if len(weight.tensors) > 1 else ())
    rows, *columns = (math.prod(group) for group in groups)
    parts = [_size(letters, sizes) for letters in weight.fused] or [rows]
    chosen = weight.part or (0,) * len(weight.tensors)
    starts = tuple(weight.skip + sum(parts[:part]) for part in chosen)
    shape = (weight.skip + sum(parts) * _size(weight.per, sizes), *columns)
    neighbours = (rotated, *[0] * (len(weight.tensors) - 1))
    return LeafSource(
        lead, names, starts * max(layers, 1), parts[chosen[0]], sum(parts), groups, padded,
        shape[::-1] if weight.transposed else shape, weight.transposed, neighbours * max(layers, 1),
    )  # fmt: skip


def leaf_sources(config: ModelConfig, stacked: bool = False, padded_heads: int = 0, naming: Naming | None = None) -> dict[str, LeafSource]:
    """The source of every leaf by its path in the tree; heads beyond the model's are padding at the end of their dimension.

    Paths read `layers/0/wq`, or `layers/wq` where `stacked` says that the layers are one dict of arrays with a leading layer dimension.
    """
    naming = naming or naming_of(config)
    wanted = leaf_names(config)
    sources = {}

    def source(name: str, names: tuple[str, ...], weight: Stored, layers: int = 0) -> LeafSource:
        rotated = _rotated(config) if name in naming.neighbours else 0
        return _source(names, weight, config, layers, padded_heads, rotated)

    for name, weight in naming.model_weights.items():
        if name in wanted:
            sources[name] = source(name, tuple(naming.named(tensor) for tensor in weight.tensors), weight)
    for name, weight in naming.layer_weights.items():
        if name not in wanted:
            continue
        by_layer = [
            tuple(naming.layer.format(base=naming.bases[0], layer=layer) + tensor for tensor in weight.tensors)
            for layer in range(config.num_layers)
        ]
        if stacked:
            every = tuple(itertools.chain.from_iterable(by_layer))
            sources[f"layers/{name}"] = source(name, every, weight, config.num_layers)
        else:
            sources |= {f"layers/{layer}/{name}": source(name, names, weight) for layer, names in enumerate(by_layer)}
    return sources


def tensor_shapes(config: ModelConfig, naming: Naming | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Hugging Face directory of this architecture holds."""
    return {name: source.tensor_shape for source in leaf_sources(config, naming=naming).values() for name in source.names}


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
    lead, inner = ranges[: len(source.lead)], iter(ranges[len(source.lead) :])
    by_group = [tuple(itertools.islice(inner, len(group))) for group in source.groups]
    placed = [_placed(_runs(group, wanted)) for group, wanted in zip(source.groups, by_group, strict=True)]
    block_shape = tuple(math.prod(len(part) for part in wanted) for wanted in by_group)
    block = np.zeros((math.prod(len(part) for part in lead), *block_shape), dtype)
    for position, place in enumerate(itertools.product(*lead)):
        number = int(np.ravel_multi_index(place, source.lead)) if place else 0
        for pieces in itertools.product(*placed):
            block[position][tuple(here for _, here in pieces)] = _read_rows(reader, source, number, tuple(there for there, _ in pieces))
    return block.reshape(tuple(len(part) for part in ranges))


def _read_rows(reader: TensorReader, source: LeafSource, number: int, index: tuple[slice, ...]) -> np.ndarray:
    """A block of the leaf's part of a tensor, [out, in] however it is stored."""
    rows, *columns = index
    head, rotated = source.groups[0][-1], source.neighbours[number]
    if rotated:  # whole heads are read, for their rows come in another order
        first = rows.start // head * head
        heads = _read_rows(
            reader, replace(source, neighbours=(0,) * len(source.names)), number, (slice(first, round_up(rows.stop, head)), *columns)
        )
        wanted = np.arange(rows.start, rows.stop)
        return heads[wanted // head * head - first + _halves(head, rotated)[wanted % head]]
    blocks = []
    for there in _pieces(rows, source, number):
        where = (there, *columns)
        blocks.append(reader.read(source.names[number], where[::-1]).T if source.transposed else reader.read(source.names[number], where))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _pieces(rows: slice, source: LeafSource, number: int) -> Iterator[slice]:
    """Where consecutive rows of the leaf lie in a tensor."""
    row = rows.start
    while row < rows.stop:
        piece, within = divmod(row, source.piece)
        count = min(rows.stop - row, source.piece - within)
        start = source.starts[number] + piece * source.stride + within
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
    unpadded = tuple(slice(0, size) for group in source.groups for size in group)
    part = leaf.reshape((len(source.names), *source.padded))[number][unpadded]
    part = part.reshape([math.prod(group) for group in source.groups])
    if source.neighbours[number]:
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
