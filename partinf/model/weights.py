"""What a model holds: each weight is declared once, and everything that only counts or lists weights derives from the declaration.

Parameter counts, bytes held per device, the leaves that a checkpoint must have, abstract arrays and which weights are quantised follow
from here. The cost model's entries do not: what a step reads and multiplies is derived there a second time, as an independent account.

A weight is used in `transformer/block.py`, `attention.py` or `ffn.py` and in `transformer/reference.py`; its names on disk stand with its
family (`families/`); `tests/execution/assignments.py` gives it to the tests of equivalence. A vector needs no entry in the ledger, which
counts products, matrices and collectives.

Weights are stored [out, in], as Hugging Face stores them: skinny products read such rows two to three times faster on CPU, and a TPU
chooses its own tiling. Two matrices that see the same input are one array, so that they share a matmul and a collective.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from partinf.model.config import ModelConfig, Position
from partinf.model.kinds import Attention, Block, Experts, FeedForward, LayerKind, Norm, QkNorm
from partinf.workload import DType

_FLOAT32_BYTES = 4
_SCALE_BYTES = _FLOAT32_BYTES  # of int8 weights
HeldEntries = Callable[[int, int, int], int]
"""What matrices of an expert take in memory, in entries, of their number, outputs and inputs (`Platform.held_entries`)."""


@dataclass(frozen=True)
class Declared:
    """One weight: its shape, the letter of each dimension (`partinf.layout.letter_axes`; `.` is never split), and its initial values: the
    constant `fill`, or normally distributed with deviation 1/√(size of the contraction).

    Attributes:
        contracted: dimensions over which a layer's product with this weight sums, counted from the end; none for vectors and tables,
            which are never quantised.
        exact: a matrix that is never quantised all the same. wide: float32, whatever the type of weights.
        used: how many of the entries of dimension X one token is multiplied with; 0 for all.
    """

    shape: tuple[int, ...]
    letters: str
    contracted: tuple[int, ...] = ()
    fill: float | None = None
    exact: bool = False
    wide: bool = False
    used: int = 0

    def quantized(self, weights: DType) -> bool:
        """Whether it is stored in int8, with a scale per output channel, where weights are of this type."""
        return weights is DType.INT8 and bool(self.contracted) and not self.exact

    @property
    def by_groups(self) -> bool:
        """Whether rows meet it sorted by their expert: the matrices of experts."""
        return bool(self.used and self.contracted)

    @property
    def active(self) -> int:
        """Entries with which one token is multiplied."""
        entries = math.prod(self.shape)
        return entries // self.shape[0] * self.used if self.used else entries

    def scale_letters(self) -> str:
        return "".join(letter for dim, letter in enumerate(self.letters) if dim - len(self.letters) not in self.contracted)

    def scale_shape(self) -> tuple[int, ...]:
        return tuple(size for dim, size in enumerate(self.shape) if dim - len(self.shape) not in self.contracted)


@dataclass(frozen=True)
class Layers:
    """Layers with the same weights: how many the model has, the weights of each by name, and the numbers of the kinds that they are of."""

    count: int
    weights: Mapping[str, Declared]
    kinds: tuple[int, ...] = (0,)


@functools.lru_cache(maxsize=64)
def declare_layers(model: ModelConfig) -> tuple[Layers, ...]:
    """The layers by their weights, in the order in which these first occur. Windows and rotations are no weights."""
    counts = Counter(model.kind_of_layers)
    groups: dict[tuple[FeedForward | None, Experts | None], list[int]] = {}
    for number in sorted(counts, key=model.kind_of_layers.index):
        kind = model.layer_kinds[number]
        groups.setdefault((kind.feed_forward, kind.experts), []).append(number)
    return tuple(
        Layers(sum(counts[number] for number in numbers), _layer(model.layer_kinds[numbers[0]], model.embed_dim), tuple(numbers))
        for numbers in groups.values()
    )


def group_name(number: int) -> str:
    """The key of stacked layers that have the same weights, by their number in `declare_layers`, where there are several such groups."""
    return f"group{number}"


@functools.lru_cache(maxsize=64)
def declare_ends(model: ModelConfig) -> Mapping[str, Declared]:
    """What stands before the first layer and after the last. The tables are never quantised: logits are what int8 would hurt most. One that
    only makes logits is split over V, so that these come out as they are wanted; one that is looked up too over E."""
    table = Declared((model.padded_vocab_size, model.embed_dim), ".D")
    ends = {"embed": table, **(_norm("final_norm", model.norm, model.embed_dim) if model.final_norm else {})}
    if not model.tied_embeddings:
        ends["unembed"] = replace(table, letters="W.")
    if model.output_bias:
        ends["unembed_bias"] = Declared((model.padded_vocab_size,), ".", fill=0.0)
    if model.position is Position.LEARNED:
        ends["positions"] = Declared((model.max_len, model.embed_dim), ".D")
    return ends


def _layer(kind: LayerKind, embed: int) -> dict[str, Declared]:
    """The weights of one layer. Vectors (norms, biases, sinks) are whole on every device: they are small, and slicing them is free."""
    layer = _attention(kind.attention, kind.norm, embed)
    biases = kind.attention.biases
    if kind.feed_forward is not None:
        layer |= _feed_forward(kind.feed_forward, embed)
        biases += kind.feed_forward.biases
    for matrix in biases:
        shape = layer[matrix].scale_shape()
        layer[bias_of(matrix)] = Declared(shape, "." * len(shape), fill=0.0)
    if kind.experts is not None:
        layer |= _experts(kind.experts, embed)
    for name in norm_names(kind):
        layer |= _norm(name, kind.norm, embed)
    return layer


def _attention(of: Attention, norm: Norm, embed: int) -> dict[str, Declared]:
    heads, kv_heads, head = of.num_heads, of.num_kv_heads, of.head_dim
    found = {
        "wq": Declared((heads, head, embed), "H.E", (-1,)),
        "wkv": Declared((2, kv_heads, head, embed), ".K.E", (-1,)),  # keys, values
        "wo": Declared((embed, heads * head), "EH", (-1,)),  # one dimension: a TPU would tile few local heads badly
    }
    if of.qk_norm is not QkNorm.NONE and norm.weighted:
        for name, count in (("q_norm", heads), ("k_norm", kv_heads)):
            shape = (head,) if of.qk_norm is QkNorm.HEAD else (count, head)
            found[name] = Declared(shape, "." * len(shape), fill=1.0 - norm.offset)
            if of.qk_norm_bias:
                found[f"{name}_bias"] = Declared(shape, "." * len(shape), fill=0.0)
    if of.sinks:
        found["sinks"] = Declared((heads,), ".", fill=0.0)
    return found


def _feed_forward(of: FeedForward, embed: int) -> dict[str, Declared]:
    return {
        "w_in": Declared((2 if of.gated else 1, of.width, embed), ".FE", (-1,)),  # gate and up, or one matrix
        "w_out": Declared((embed, of.width), "EF", (-1,)),
    }


def _experts(of: Experts, embed: int) -> dict[str, Declared]:
    """A router and all experts. Vectors of every expert are as large together as a matrix, and are split as the matrices are."""
    used, inner = of.per_token, (2 if of.each.gated else 1, of.each.width)
    found = {
        "router": Declared((of.count, embed), "..", (-1,), exact=True),
        "wx_in": Declared((of.count, *inner, embed), "X.fe", (-1,), used=used),  # gate and up, or one matrix
        "wx_out": Declared((of.count, embed, of.each.width), "Xef", (-1,), used=used),
    }
    for matrix in of.each.biases:
        weight = found[matrix.replace("w", "wx")]
        found[bias_of(matrix.replace("w", "wx"))] = Declared(weight.scale_shape(), weight.scale_letters(), fill=0.0, used=used)
    if of.router.bias:
        found["router_bias"] = Declared((of.count,), ".", fill=0.0)
    if of.router.correction:
        found["router_correction"] = Declared((of.count,), ".", fill=0.0, wide=True)
    if of.shared_gate:
        found["shared_gate"] = Declared((embed,), ".")
    return found


def norm_names(kind: LayerKind) -> tuple[str, ...]:
    """The norms of E in a layer: before its sublayers, of which a parallel block may have one for both, and after them."""
    before = ("attention_norm",) if kind.block is Block.PARALLEL else ("attention_norm", "ffn_norm")
    after = ("attention_post_norm", "ffn_post_norm")
    return (before if kind.norms.before else ()) + (after if kind.norms.after else ())


def _norm(name: str, norm: Norm, size: int) -> dict[str, Declared]:
    found = {name: Declared((size,), ".", fill=1.0 - norm.offset)} if norm.weighted else {}
    if norm.biased:
        found[f"{name}_bias"] = Declared((size,), ".", fill=0.0)
    return found


def bias_of(matrix: str) -> str:
    """The name of a matrix's bias: `bq` of `wq`, `b_in` of `w_in`."""
    return f"b{matrix.removeprefix('w')}"


def leaf_names(model: ModelConfig) -> set[str]:
    """Names of all weights, whichever layer they belong to."""
    return set(declare_ends(model)).union(*(kind.weights for kind in declare_layers(model)))


def layer_params(model: ModelConfig) -> int:
    """Parameters of the largest layer, norms and biases included."""
    return max(_params(kind.weights) for kind in declare_layers(model))


@functools.lru_cache(maxsize=64)
def multiplied_params(model: ModelConfig) -> int:
    """Entries of all layers' matrices with which one token is multiplied."""
    layers = declare_layers(model)
    return sum(one.count * sum(w.active for w in one.weights.values() if w.contracted) for one in layers)


def active_params(model: ModelConfig) -> int:
    """Parameters that one token meets: all but the experts that it does not go through."""
    idle = sum(one.count * sum(math.prod(w.shape) - w.active for w in one.weights.values()) for one in declare_layers(model))
    return num_params(model) - idle


def num_params(model: ModelConfig) -> int:
    """All parameters, the vocabulary unpadded; tied embeddings counted once."""
    layers = sum(kind.count * _params(kind.weights) for kind in declare_layers(model))
    per_word = model.embed_dim * (1 if model.tied_embeddings else 2) + model.output_bias
    return layers + _params(declare_ends(model)) - (model.padded_vocab_size - model.vocab_size) * per_word


def _params(weights: Mapping[str, Declared]) -> int:
    return sum(math.prod(declared.shape) for declared in weights.values())


def held_bytes(model: ModelConfig, ways: Mapping[str, int], weights: DType, held_entries: HeldEntries) -> int:
    """Bytes of weights that one device holds.

    Args:
        ways: letter → number of parts into which a dimension of that letter is split; letters that are missing are whole. `N` splits the
            layers.
        weights: of matrices; the type of everything else follows from it. held_entries: of experts' matrices.
    """
    layers = sum(kind.count // ways.get("N", 1) * _held(kind.weights, ways, weights, held_entries) for kind in declare_layers(model))
    return layers + _held(declare_ends(model), ways, weights, held_entries)


def _held(group: Mapping[str, Declared], ways: Mapping[str, int], weights: DType, held_entries: HeldEntries) -> int:
    def part(shape: tuple[int, ...], letters: str) -> int:
        return math.prod(shape) // math.prod(ways.get(letter, 1) for letter in letters)

    total = 0
    for declared in group.values():
        held = part(declared.shape, declared.letters)
        if declared.by_groups:
            outputs, inputs = (part(declared.shape[dim:][:1], declared.letters[dim]) for dim in (-2, -1))
            each = math.prod(declared.shape[1:-2])  # of an expert, of which none is split
            held = part(declared.shape[:1], declared.letters[0]) * held_entries(each, outputs, inputs)
        if declared.quantized(weights):
            total += held + _SCALE_BYTES * part(declared.scale_shape(), declared.scale_letters())
        else:
            total += held * (_FLOAT32_BYTES if declared.wide else weights.activations.num_bytes)
    return total
