"""Hugging Face tensors and the leaves of the library's parameter tree, declared once per family.

The tables below are the only place that knows the names. Validation, loading and saving are derived from them, and all of it is numpy:
no device is needed to check a directory. Both sides pair the first half of a head with the second in the rotary embedding (rotate_half),
so a leaf is a reshape of a tensor or of a block of its rows, or a stack of such; GPT-2's matrices are transposed first.

Letters as in the whole library: V vocabulary, E d_model, F d_ff, H query heads, K key/value heads, Q head size, M longest context.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from partinf.checkpoint.safetensors_files import TensorReader
from partinf.errors import InvalidInput
from partinf.model.config import Block, ModelConfig, Norm, Position


@dataclass(frozen=True)
class Weight:
    """Where one leaf comes from.

    Attributes:
        dims: The tensor's dimensions, separated by spaces, outputs first. Letters written together are one dimension of the tensor and
            several of the leaf, in parentheses one of both; 1 is a dimension of the leaf alone.
        tensors: Names of the tensors; more than one are stacked on a new leading dimension of the leaf, in this order.
        thirds: Where the tensor holds queries, keys and values one after the other: which of them each name of `tensors` means.
        skip: Rows of the tensor before the leaf's.
        transposed: The tensor is stored [in, out].
    """

    dims: str
    tensors: tuple[str, ...]
    thirds: tuple[int, ...] = ()
    skip: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Naming:
    """The names of one family's tensors.

    Attributes:
        bases: What `{base}` in a name may stand for; the first is what transformers writes.
        layer: What precedes the name of a layer's tensor.
        layer_weights: Leaves of a layer.
        model_weights: Leaves of the model.
        optional: Leaves in these tables that only some models of the family have.
        buffers: Endings of what is stored although it follows from the configuration.
    """

    bases: tuple[str, ...]
    layer: str
    layer_weights: Mapping[str, Weight]
    model_weights: Mapping[str, Weight]
    optional: frozenset[str]
    buffers: tuple[str, ...] = ()

    @property
    def leaves(self) -> set[str]:
        return {*self.layer_weights, *self.model_weights}


_UNEMBED = Weight("V E", ("lm_head.weight",))
LLAMA = Naming(  # and Mistral and Qwen 3
    bases=("model.",),
    layer="{base}layers.{layer}.",
    layer_weights={
        "attention_norm": Weight("E", ("input_layernorm.weight",)),
        "wq": Weight("HQ E", ("self_attn.q_proj.weight",)),
        "wkv": Weight("KQ E", ("self_attn.k_proj.weight", "self_attn.v_proj.weight")),
        "q_norm": Weight("Q", ("self_attn.q_norm.weight",)),
        "k_norm": Weight("Q", ("self_attn.k_norm.weight",)),
        "wo": Weight("E (HQ)", ("self_attn.o_proj.weight",)),
        "ffn_norm": Weight("E", ("post_attention_layernorm.weight",)),
        "w_in": Weight("F E", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        "w_out": Weight("E F", ("mlp.down_proj.weight",)),
    },
    model_weights={
        "embed": Weight("V E", ("{base}embed_tokens.weight",)),
        "final_norm": Weight("E", ("{base}norm.weight",)),
        "unembed": _UNEMBED,
    },
    optional=frozenset({"q_norm", "k_norm", "unembed"}),
    buffers=("rotary_emb.inv_freq",),
)
GPT2 = Naming(
    bases=("transformer.", ""),  # the published gpt2 has none
    layer="{base}h.{layer}.",
    layer_weights={
        "attention_norm": Weight("E", ("ln_1.weight",)),
        "attention_norm_bias": Weight("E", ("ln_1.bias",)),
        "wq": Weight("HQ E", ("attn.c_attn.weight",), thirds=(0,), transposed=True),
        "bq": Weight("HQ", ("attn.c_attn.bias",), thirds=(0,)),
        "wkv": Weight("KQ E", ("attn.c_attn.weight",) * 2, thirds=(1, 2), transposed=True),
        "bkv": Weight("KQ", ("attn.c_attn.bias",) * 2, thirds=(1, 2)),
        "wo": Weight("E (HQ)", ("attn.c_proj.weight",), transposed=True),
        "bo": Weight("E", ("attn.c_proj.bias",)),
        "ffn_norm": Weight("E", ("ln_2.weight",)),
        "ffn_norm_bias": Weight("E", ("ln_2.bias",)),
        "w_in": Weight("1F E", ("mlp.c_fc.weight",), transposed=True),
        "b_in": Weight("1F", ("mlp.c_fc.bias",)),
        "w_out": Weight("E F", ("mlp.c_proj.weight",), transposed=True),
        "b_out": Weight("E", ("mlp.c_proj.bias",)),
    },
    model_weights={
        "embed": Weight("V E", ("{base}wte.weight",)),
        "positions": Weight("M E", ("{base}wpe.weight",)),
        "final_norm": Weight("E", ("{base}ln_f.weight",)),
        "final_norm_bias": Weight("E", ("{base}ln_f.bias",)),
    },
    optional=frozenset(),
    buffers=(".attn.bias", ".attn.masked_bias"),
)
OPT = Naming(
    bases=("model.decoder.", "decoder."),
    layer="{base}layers.{layer}.",
    layer_weights={
        "attention_norm": Weight("E", ("self_attn_layer_norm.weight",)),
        "attention_norm_bias": Weight("E", ("self_attn_layer_norm.bias",)),
        "wq": Weight("HQ E", ("self_attn.q_proj.weight",)),
        "bq": Weight("HQ", ("self_attn.q_proj.bias",)),
        "wkv": Weight("KQ E", ("self_attn.k_proj.weight", "self_attn.v_proj.weight")),
        "bkv": Weight("KQ", ("self_attn.k_proj.bias", "self_attn.v_proj.bias")),
        "wo": Weight("E (HQ)", ("self_attn.out_proj.weight",)),
        "bo": Weight("E", ("self_attn.out_proj.bias",)),
        "ffn_norm": Weight("E", ("final_layer_norm.weight",)),
        "ffn_norm_bias": Weight("E", ("final_layer_norm.bias",)),
        "w_in": Weight("1F E", ("fc1.weight",)),
        "b_in": Weight("1F", ("fc1.bias",)),
        "w_out": Weight("E F", ("fc2.weight",)),
        "b_out": Weight("E", ("fc2.bias",)),
    },
    model_weights={
        "embed": Weight("V E", ("{base}embed_tokens.weight",)),
        "positions": Weight("M E", ("{base}embed_positions.weight",), skip=2),  # fairseq's padding, which no token is given
        "final_norm": Weight("E", ("{base}final_layer_norm.weight",)),
        "final_norm_bias": Weight("E", ("{base}final_layer_norm.bias",)),
        "unembed": _UNEMBED,
    },
    optional=frozenset({"unembed"}),
)
NAMINGS = {"Llama": LLAMA, "GPT-2": GPT2, "OPT": OPT}


def _leaves(config: ModelConfig) -> set[str]:
    """The leaves of a tree of this architecture."""
    serial = config.block is Block.SERIAL
    norms = ["attention_norm", "final_norm", *(["ffn_norm"] if serial else [])]
    leaves = {"embed", "wq", "wkv", "wo", "w_in", "w_out", *norms}
    leaves |= {f"{norm}_bias" for norm in norms if config.norm is Norm.LAYER}
    leaves |= {"bq", "bkv", "bo", "b_in", "b_out"} if config.biases else set()
    leaves |= {"q_norm", "k_norm"} if config.qk_norm else set()
    leaves |= {"positions"} if config.position is Position.LEARNED else set()
    return leaves if config.tied_embeddings else leaves | {"unembed"}


def _fits(naming: Naming, config: ModelConfig) -> bool:
    wanted, gated = _leaves(config), len(naming.layer_weights["w_in"].tensors) == 2
    return wanted <= naming.leaves and naming.leaves - wanted <= naming.optional and config.gated == gated


def recognize(config: ModelConfig, found: Collection[str] = ()) -> Naming:
    """The naming, with one base, of which most names are among those `found` in a directory; of equals the first.

    GPT-2 and OPT differ in no leaf, so an architecture alone does not tell which names its tensors have.

    Raises:
        InvalidInput: blocks that no family has.
    """
    present = set(found)
    fitting = [replace(naming, bases=(base,)) for naming in NAMINGS.values() if _fits(naming, config) for base in naming.bases]
    if not fitting:
        raise InvalidInput(f"model {config.name}: no Hugging Face family has such blocks; known families: {', '.join(NAMINGS)}")
    return max(fitting, key=lambda naming: len(present & tensor_shapes(config, naming).keys()))


def tolerated(config: ModelConfig, naming: Naming) -> tuple[str, ...]:
    """Endings of tensor names that may be in a directory and are not read: buffers, and a copy of the embedding where it is tied."""
    return (*naming.buffers, "lm_head.weight") if config.tied_embeddings else naming.buffers


@dataclass(frozen=True)
class LeafSource:
    """The tensors behind one leaf.

    Attributes:
        lead: Leading dimensions of the leaf over which tensors are stacked: none, (2,), (layers,) or (layers, 2).
        names: The tensors' names, row-major over `lead`.
        starts: The row of each tensor, once it is [out, in], at which the leaf's begin.
        groups: Sizes of the leaf's other dimensions, grouped by dimension of the tensor, without padding.
        padded: Sizes of the same dimensions in the leaf.
        tensor_shape: The shape of each tensor as it is stored.
        transposed: The tensors are stored [in, out].
    """

    lead: tuple[int, ...]
    names: tuple[str, ...]
    starts: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    padded: tuple[int, ...]
    tensor_shape: tuple[int, ...]
    transposed: bool

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
        "Q": config.head_dim,
        "M": config.max_len,
        "1": 1,
    }


def _source(names: tuple[str, ...], weight: Weight, config: ModelConfig, layers: int, padded_heads: int) -> LeafSource:
    """The source of a leaf that stacks `layers` layers, or 0 for one that does not."""
    sizes, whole = _sizes(config, config.vocab_size), _sizes(config.with_padded_heads(padded_heads), config.padded_vocab_size)
    dims = [[group.strip("()")] if group.startswith("(") else list(group) for group in weight.dims.split()]  # letters of each dimension
    groups = tuple(tuple(math.prod(sizes[letter] for letter in dim) for dim in group) for group in dims)
    padded = tuple(math.prod(whole[letter] for letter in dim) for group in dims for dim in group)
    lead = ((layers,) if layers else ()) + ((len(weight.tensors),) if len(weight.tensors) > 1 else ())
    rows, *columns = (math.prod(group) for group in groups)
    starts = tuple(weight.skip + third * rows for third in weight.thirds or (0,) * len(weight.tensors)) * max(layers, 1)
    shape = (weight.skip + rows * (3 if weight.thirds else 1), *columns)
    return LeafSource(lead, names, starts, groups, padded, shape[::-1] if weight.transposed else shape, weight.transposed)


def leaf_sources(config: ModelConfig, stacked: bool = False, padded_heads: int = 0, naming: Naming | None = None) -> dict[str, LeafSource]:
    """The source of every leaf by its path in the tree; heads beyond the model's are padding at the end of their dimension.

    Paths read `layers/0/wq`, or `layers/wq` where `stacked` says that the layers are one dict of arrays with a leading layer dimension.
    """
    naming = naming or recognize(config)
    wanted, base = _leaves(config), naming.bases[0]
    sources = {}
    for name, weight in naming.model_weights.items():
        if name in wanted:
            names = tuple(tensor.format(base=base) for tensor in weight.tensors)
            sources[name] = _source(names, weight, config, 0, padded_heads)
    for name, weight in naming.layer_weights.items():
        if name not in wanted:
            continue
        by_layer = [
            tuple(naming.layer.format(base=base, layer=layer) + tensor for tensor in weight.tensors) for layer in range(config.num_layers)
        ]
        if stacked:
            every = tuple(itertools.chain.from_iterable(by_layer))
            sources[f"layers/{name}"] = _source(every, weight, config, config.num_layers, padded_heads)
        else:
            sources |= {f"layers/{layer}/{name}": _source(names, weight, config, 0, padded_heads) for layer, names in enumerate(by_layer)}
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
    start = source.starts[number]
    there = (slice(start + rows.start, start + rows.stop), *columns)
    return reader.read(source.names[number], there[::-1]).T if source.transposed else reader.read(source.names[number], there)


def split_leaf(source: LeafSource, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors (name, array) behind a whole leaf, without its padding: the inverse of `read_leaf` where a tensor is one leaf's alone."""
    unpadded = tuple(slice(0, size) for group in source.groups for size in group)
    flat = leaf.reshape((len(source.names), *source.padded))
    for name, part in zip(source.names, flat, strict=True):
        yield name, np.ascontiguousarray(part[unpadded].reshape(source.tensor_shape))
