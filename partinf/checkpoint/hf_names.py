"""Where each leaf of the parameter tree lies in Hugging Face tensors.

The names stand in `model.families`; this module works out which part of which tensors a leaf is, and `hf_leaves` reads and writes it.
Validation, loading and saving are derived from it, and none of it needs a device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from partinf.checkpoint import mxfp4
from partinf.checkpoint.safetensors_files import TensorReader
from partinf.foundation.errors import raise_offences
from partinf.model.config import ModelConfig
from partinf.model.families import FAMILIES, family_of
from partinf.model.family import Naming, Stored
from partinf.model.kinds import LayerKind
from partinf.model.weights import Layers, declare_ends, declare_layers, group_name, leaf_names

_DEVICES = 4  # see `model.family`


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
    if named.packed_weights and any(name.endswith(mxfp4.BLOCKS) for name in present):
        named = replace(named, mixed_weights={**named.mixed_weights, **named.packed_weights})
    named = replace(named, aside=tuple(one.format(layers=config.num_layers) for one in named.aside))
    namings = [replace(named, bases=(base,)) for base in named.bases]
    best = max(namings, key=lambda naming: len(present & tensor_shapes(config, naming).keys())) if present else namings[0]
    return _one_table(best, present) if config.tied_embeddings or config.table_dim else best


def _one_table(naming: Naming, present: Collection[str]) -> Naming:
    """Of a model with one table that a directory has under one of two names: that name for both."""
    weights = dict(naming.model_weights)
    stored = {name: weights[name].tensors for name in ("embed", "unembed") if name in weights}
    there = {name: naming.named(tensors[0]) in present for name, tensors in stored.items()}
    if len(stored) == 2 and len({*there.values()}) == 2:
        only = next(stored[name] for name in stored if there[name])
        weights |= {name: replace(weights[name], tensors=only) for name in stored}
    return replace(naming, model_weights=weights)


def tolerated(config: ModelConfig, naming: Naming) -> tuple[str, ...]:
    """Endings of tensor names that may be in a directory and are not read: buffers, and a copy of the embedding where it is tied."""
    return (*naming.buffers, _head(naming)) if config.tied_embeddings else naming.buffers


def packed(naming: Naming) -> tuple[str, ...]:
    """Endings of the names of what holds bytes instead of numbers."""
    return (mxfp4.BLOCKS, mxfp4.SCALES) if any(stored.packed for stored in naming.mixed_weights.values()) else ()


def _head(naming: Naming) -> str:
    """The ending of the name of the output matrix."""
    stored = naming.model_weights.get("unembed")
    return stored.tensors[0].format(base="", head="") if stored else "lm_head.weight"


def as_stored(directory: str | Path, config: ModelConfig) -> ModelConfig:
    """The architecture of a directory, with an output matrix of its own where the weights have one that is not the embedding although the
    configuration ties the two: transformers does not tie them then."""
    if not config.tied_embeddings or config.family not in FAMILIES:
        return config
    with TensorReader(directory) as reader:
        naming = naming_of(config, reader.inventory.names)
        if reader.inventory.offences or "unembed" not in naming.model_weights or not tied_offences(reader, config, naming):
            return config
    own = "the configuration ties the embeddings, but the weights have a separate output matrix, which is used"
    return replace(config, tied_embeddings=False, source="; ".join(filter(None, (config.source, own))))


def tied_offences(reader: TensorReader, config: ModelConfig, naming: Naming) -> list[str]:
    """The offence of an output matrix that is stored although the embedding is declared tied, and differs from it."""
    embed = naming.named(naming.model_weights["embed"].tensors[0])
    heads = [name for name in reader.inventory.tensors if name.endswith(_head(naming))] if config.tied_embeddings else []
    if "unembed" in naming.model_weights:
        instead = "a model with an output matrix of its own is needed, as `as_stored` describes it"
    else:
        instead = "an output matrix of its own is not supported for this family"
    return [
        f"{name} differs from {embed}, although tie_word_embeddings says that they are one; {instead}"
        for name in heads
        if embed in reader.inventory.tensors and name != embed and not reader.same(embed, name)
    ]


@dataclass(frozen=True)
class LeafSource:
    """The tensors behind one leaf.

    Attributes:
        lead: Leading dimensions of the leaf over which tensors are stacked: layers, what tensors are numbered by, how many are named.
        padded_lead: The same in the leaf, where heads that tensors are numbered by are padded.
        names: The tensors' names, row-major over `lead`.
        offsets: The row of each tensor, once it is [out, in], at which the leaf's begin.
        piece, stride: The leaf has so many rows one after the other, and so many rows of the tensor lie between their beginnings.
        groups: Sizes of the leaf's other dimensions, grouped by dimension of the tensor, without padding.
        padded: Sizes of the same dimensions in the leaf.
        order: The place of each of them in the leaf, -1 for one that the leaf has not; empty where the order is the tensor's.
        tensor_shape: The shape of each tensor as it is stored.
        transposed: The tensors are stored [in, out].
        neighbours: Of each tensor, how many leading rows of a head are pairs of neighbours.
        packed: The tensors are stored in four bits.
        times: The leaf is the product of the tensor with another, over what both have last or the other has first: its name and shape.
    """

    lead: tuple[int, ...]
    padded_lead: tuple[int, ...]
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    piece: int
    stride: int
    groups: tuple[tuple[int, ...], ...]
    padded: tuple[int, ...]
    order: tuple[int, ...]
    tensor_shape: tuple[int, ...]
    transposed: bool
    neighbours: tuple[int, ...]
    packed: bool = False
    times: tuple[str, tuple[int, ...]] | None = None

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        return self.padded_lead + self.in_leaf(self.padded)

    def in_leaf(self, dims: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the tensor's dimensions have each, in the order of the leaf's."""
        placed = sorted((place, dim) for dim, place in enumerate(self.order) if place >= 0)
        return tuple(dims[dim] for _, dim in placed) if self.order else dims

    def in_tensor(self, dims: tuple[Any, ...], missing: Any) -> tuple[Any, ...]:
        """What the leaf's dimensions have each, in the order of the tensor's; `missing` for one that the leaf has not."""
        return tuple(missing if place < 0 else dims[place] for place in self.order) if self.order else dims

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of everything that is stored."""
        if self.times is not None:
            return dict.fromkeys(self.names, self.tensor_shape) | dict([self.times])
        if not self.packed:
            return dict.fromkeys(self.names, self.tensor_shape)
        shapes = mxfp4.stored_shapes(self.tensor_shape)
        return {f"{name}{ending}": shape for name in self.names for ending, shape in shapes.items()}


def _sizes(config: ModelConfig, vocab_size: int, kind: LayerKind | None) -> dict[str, int]:
    """The sizes of letters in a layer of a kind, or outside the layers."""
    inner = kind.feed_forward if kind is not None else None
    experts = kind.experts if kind is not None else None
    return {
        "V": vocab_size,
        "E": config.embed_dim,
        "P": config.table_dim,
        "F": inner.width if inner is not None else 0,
        "X": experts.count if experts is not None else 0,
        "W": experts.each.width if experts is not None else 0,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "G": config.queries_per_kv_head,
        "Q": config.head_dim,
        "M": config.max_len,
        "T": _DEVICES,
        "S": config.num_heads // _DEVICES,
        "1": 1,
        "2": 2,
    }


def _rotated(config: ModelConfig) -> int:
    """Leading dimensions of a head that are rotated: the same in all kinds of layers that rotate any."""
    rotations = [kind.attention.rotation for kind in config.layer_kinds]
    return next((rotation.rotated(config.head_dim) for rotation in rotations if rotation is not None), 0)


def _size(letters: str, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[letter] for letter in letters)


@dataclass(frozen=True)
class _Leaves:
    """What the sources of a model's leaves have in common."""

    config: ModelConfig
    naming: Naming
    padded_heads: int

    def source(
        self, name: str, weight: Stored, kind: LayerKind | None = None, layers: tuple[int, ...] = (), stacked: bool = False
    ) -> LeafSource:
        """The source of a leaf outside the layers, in one, or in several that it stacks."""
        config = self.config
        sizes = _sizes(config, config.vocab_size, kind)
        whole = _sizes(config.with_padded_heads(self.padded_heads), config.padded_vocab_size, kind)
        dims = [[group.strip("()")] if group.startswith("(") else list(group) for group in weight.dims.split()]  # letters of each dimension
        flat = [dim for group in dims for dim in group]
        groups = tuple(tuple(_size(dim, sizes) for dim in group) for group in dims)
        lead, padded_lead = (
            ((len(layers),) if stacked else ())
            + ((of[weight.numbered],) if weight.numbered else ())
            + ((len(weight.tensors),) if len(weight.tensors) > 1 else ())
            for of in (sizes, whole)
        )
        rows, *columns = (math.prod(group) for group in groups)
        parts = [_size(letters, sizes) for letters in weight.fused] or [rows]
        chosen = weight.part or (0,) * len(weight.tensors)
        shape = (weight.skip + sum(parts) * _size(weight.per, sizes), *columns)
        numbers = sizes[weight.numbered] if weight.numbered else 1
        names = tuple(
            before + self.naming.named(tensor, number)
            for before in ([self.naming.layer_named(layer) for layer in layers] or [""])
            for number in range(numbers)
            for tensor in weight.tensors
        )
        rotated = _rotated(config) if name in self.naming.neighbours else 0
        repeated = numbers * max(len(layers), 1)
        return LeafSource(
            lead=lead,
            padded_lead=padded_lead,
            names=names,
            offsets=tuple(weight.skip + sum(parts[:part]) for part in chosen) * repeated,
            piece=parts[chosen[0]],
            stride=sum(parts),
            groups=groups,
            padded=tuple(_size(dim if weight.times is None or dim != "P" else "E", whole) for dim in flat),
            order=tuple(weight.leaf.find(dim) for dim in flat) if weight.leaf else (),
            tensor_shape=shape[::-1] if weight.transposed else shape,
            transposed=weight.transposed,
            neighbours=(rotated, *[0] * (len(weight.tensors) - 1)) * repeated,
            packed=weight.packed,
            times=weight.times and (self.naming.named(weight.times[0]), tuple(sizes[letter] for letter in weight.times[1].split())),
        )


def leaf_sources(config: ModelConfig, stacked: bool = False, padded_heads: int = 0, naming: Naming | None = None) -> dict[str, LeafSource]:
    """The source of every leaf by its path in the tree; heads beyond the model's are padding at the end of their dimension.

    Paths read `layers/0/wq`, or `layers/wq` where `stacked` says that the layers are one dict of arrays with a leading layer dimension;
    `layers/group0/wq` where not all layers have the same weights, and there is a dict for each group of those that have.
    """
    leaves = _Leaves(config, naming or naming_of(config), padded_heads)
    ends = declare_ends(config)
    sources = {name: leaves.source(name, weight) for name, weight in leaves.naming.model_weights.items() if name in ends}
    groups = declare_layers(config)

    def add(path: str, group: Layers, layers: tuple[int, ...]) -> None:
        kind = config.layer_kinds[group.kinds[0]]
        for name, weight in leaves.naming.weights_of(kind.experts is not None).items():
            if name in group.weights:
                sources[f"{path}/{name}"] = leaves.source(name, weight, kind, layers, stacked)

    for number, group in enumerate(groups):
        layers = tuple(layer for layer, kind in enumerate(config.kind_of_layers) if kind in group.kinds)
        if stacked:
            add("layers" if len(groups) == 1 else f"layers/{group_name(number)}", group, layers)
        for layer in () if stacked else layers:
            add(f"layers/{layer}", group, (layer,))
    return sources


def tensor_shapes(config: ModelConfig, naming: Naming | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Hugging Face directory of this architecture holds."""
    shapes: dict[str, tuple[int, ...]] = {}
    for source in leaf_sources(config, naming=naming).values():
        shapes |= source.stored_shapes()
    return shapes
