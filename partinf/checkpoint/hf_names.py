"""Hugging Face Llama tensors and the leaves of the library's parameter tree, declared once.

The table below is the only place that knows the names. Validation, loading and saving are derived from it, and all of it is numpy: no
device is needed to check a directory. Both sides keep weights as [out, in] and both use the rotary embedding that pairs the first half of
a head with the second (rotate_half), so a leaf is a reshape of a tensor, or a stack of reshapes, never a permutation.

Letters as in the whole library: V vocabulary, E d_model, F d_ff, H query heads, K key/value heads, Q head size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from partinf.checkpoint.safetensors_files import TensorReader
from partinf.model_config import ModelConfig


@dataclass(frozen=True)
class Weight:
    """Where one leaf comes from.

    Attributes:
        dims: The tensor's dimensions, separated by spaces. Letters written together are one dimension of the tensor and several of the
            leaf.
        tensors: Names of the tensors; more than one are stacked on a new leading dimension of the leaf, in this order.
    """

    dims: str
    tensors: tuple[str, ...]


LAYER_WEIGHTS: Mapping[str, Weight] = {
    "attention_norm": Weight("E", ("model.layers.{layer}.input_layernorm.weight",)),
    "wq": Weight("HQ E", ("model.layers.{layer}.self_attn.q_proj.weight",)),
    "wkv": Weight("KQ E", ("model.layers.{layer}.self_attn.k_proj.weight", "model.layers.{layer}.self_attn.v_proj.weight")),
    "wo": Weight("E HQ", ("model.layers.{layer}.self_attn.o_proj.weight",)),
    "ffn_norm": Weight("E", ("model.layers.{layer}.post_attention_layernorm.weight",)),
    "w_in": Weight("F E", ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight")),
    "w_out": Weight("E F", ("model.layers.{layer}.mlp.down_proj.weight",)),
}
MODEL_WEIGHTS: Mapping[str, Weight] = {
    "embed": Weight("V E", ("model.embed_tokens.weight",)),
    "final_norm": Weight("E", ("model.norm.weight",)),
    "unembed": Weight("V E", ("lm_head.weight",)),
}
# Buffers that old checkpoints store although they follow from the configuration.
TOLERATED = ("rotary_emb.inv_freq",)


def tolerated(config: ModelConfig) -> tuple[str, ...]:
    """Endings of tensor names that may be in a directory and are not read: buffers, and a copy of the embedding where it is tied."""
    return (*TOLERATED, "lm_head.weight") if config.tied_embeddings else TOLERATED


@dataclass(frozen=True)
class LeafSource:
    """The tensors behind one leaf.

    Attributes:
        lead: Leading dimensions of the leaf over which tensors are stacked: none, (2,), (layers,) or (layers, 2).
        names: The tensors' names, row-major over `lead`.
        groups: Sizes of the leaf's other dimensions, grouped by dimension of the tensor, without padding.
        padded: Sizes of the same dimensions in the leaf.
    """

    lead: tuple[int, ...]
    names: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    padded: tuple[int, ...]

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        return self.lead + self.padded

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(group) for group in self.groups)


def _sizes(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    return {
        "V": vocab_size,
        "E": config.embed_dim,
        "F": config.ffn_dim,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "Q": config.head_dim,
    }


def _source(weight: Weight, config: ModelConfig, layers: range | None, stacked: bool, padded_heads: int) -> LeafSource:
    sizes, whole = _sizes(config, config.vocab_size), _sizes(config.with_padded_heads(padded_heads), config.padded_vocab_size)
    groups = tuple(tuple(sizes[letter] for letter in group) for group in weight.dims.split())
    padded = tuple(whole[letter] for letter in weight.dims if letter != " ")
    lead = ((len(layers),) if layers is not None and stacked else ()) + ((len(weight.tensors),) if len(weight.tensors) > 1 else ())
    names = tuple(tensor.format(layer=layer) for layer in layers or (None,) for tensor in weight.tensors)
    return LeafSource(lead, names, groups, padded)


def leaf_sources(config: ModelConfig, stacked: bool = False, padded_heads: int = 0) -> dict[str, LeafSource]:
    """The source of every leaf by its path in the tree; heads beyond the model's are padding at the end of their dimension.

    Paths read `layers/0/wq`, or `layers/wq` where `stacked` says that the layers are one dict of arrays with a leading layer dimension.
    """
    sources = {}
    for name, weight in MODEL_WEIGHTS.items():
        if not (name == "unembed" and config.tied_embeddings):
            sources[name] = _source(weight, config, None, False, padded_heads)
    for name, weight in LAYER_WEIGHTS.items():
        if stacked:
            sources[f"layers/{name}"] = _source(weight, config, range(config.num_layers), True, padded_heads)
        else:
            for layer in range(config.num_layers):
                sources[f"layers/{layer}/{name}"] = _source(weight, config, range(layer, layer + 1), False, padded_heads)
    return sources


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Hugging Face directory of this architecture holds."""
    return {name: source.tensor_shape for source in leaf_sources(config).values() for name in source.names}


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
        name = source.names[int(np.ravel_multi_index(place, source.lead)) if place else 0]
        for pieces in itertools.product(*placed):
            block[position][tuple(here for _, here in pieces)] = reader.read(name, tuple(there for there, _ in pieces))
    return block.reshape(tuple(len(part) for part in ranges))


def split_leaf(source: LeafSource, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors (name, array) behind a whole leaf, without its padding: the inverse of `read_leaf`."""
    unpadded = tuple(slice(0, size) for group in source.groups for size in group)
    flat = leaf.reshape((len(source.names), *source.padded))
    for name, part in zip(source.names, flat, strict=True):
        yield name, np.ascontiguousarray(part[unpadded].reshape(source.tensor_shape))
