"""What a model holds: each weight is declared once, and everything that only counts or lists weights derives from the declaration.

Parameter counts, bytes held per device, the leaves that a checkpoint must have, abstract arrays and which weights are quantised follow
from here. The cost model's entries do not: what a step reads and multiplies is derived there a second time, as an independent account.

A weight is used in `transformer/block.py`, `attention.py` or `ffn.py` and in `transformer/reference.py`; its names on disk stand with its
family (`families.py`); `tests/execution/assignments.py` gives it to the tests of equivalence. A vector needs no entry in the ledger, which
counts products, matrices and collectives.

Weights are stored [out, in], as Hugging Face stores them: skinny products read such rows two to three times faster on CPU, and a TPU
chooses its own tiling. Two matrices that see the same input are one array, so that they share a matmul and a collective.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from partinf.model.config import Block, ModelConfig, Norm, Position
from partinf.workload import DType

_SCALE_BYTES = 4  # scales of int8 weights are float32


@dataclass(frozen=True)
class Declared:
    """One weight: its shape, the letter of each dimension (`partinf.layout.letter_axes`; `.` is never split), and its initial values: the
    constant `fill`, or normally distributed with deviation 1/√(size of the contraction).

    Attributes:
        contracted: dimensions over which a layer's product with this weight sums, counted from the end; none for vectors and tables,
            which are never quantised.
    """

    shape: tuple[int, ...]
    letters: str
    contracted: tuple[int, ...] = ()
    fill: float | None = None

    def quantized(self, weights: DType) -> bool:
        """Whether it is stored in int8, with a scale per output channel, where weights are of this type."""
        return weights is DType.INT8 and bool(self.contracted)

    def scale_letters(self) -> str:
        return "".join(letter for dim, letter in enumerate(self.letters) if dim - len(self.letters) not in self.contracted)

    def scale_shape(self) -> tuple[int, ...]:
        return tuple(size for dim, size in enumerate(self.shape) if dim - len(self.shape) not in self.contracted)


@dataclass(frozen=True)
class Layers:
    """Layers of one kind: how many the model has, and the weights of each by name."""

    count: int
    weights: Mapping[str, Declared]


@functools.lru_cache(maxsize=64)
def declare_layers(model: ModelConfig) -> tuple[Layers, ...]:
    """The layers by kind."""
    return (Layers(model.num_layers, _layer(model)),)


@functools.lru_cache(maxsize=64)
def declare_ends(model: ModelConfig) -> Mapping[str, Declared]:
    """What stands before the first layer and after the last. The tables are never quantised: logits are what int8 would hurt most."""
    table = Declared((model.padded_vocab_size, model.embed_dim), ".D")
    ends = {"embed": table, **_norm("final_norm", model)}
    if not model.tied_embeddings:
        ends["unembed"] = table
    if model.position is Position.LEARNED:
        ends["positions"] = Declared((model.max_len, model.embed_dim), ".D")
    return ends


def _layer(model: ModelConfig) -> dict[str, Declared]:
    """The weights of one layer. Vectors (norms and biases) are whole on every device: they are small, and slicing them is free."""
    embed, ffn, heads, kv_heads, head = model.embed_dim, model.ffn_dim, model.num_heads, model.num_kv_heads, model.head_dim
    inner = 2 if model.gated else 1
    layer = {
        "wq": Declared((heads, head, embed), "H.E", (-1,)),
        "wkv": Declared((2, kv_heads, head, embed), ".K.E", (-1,)),  # keys, values
        "wo": Declared((embed, heads * head), "EH", (-1,)),  # one dimension: a TPU would tile few local heads badly
        "w_in": Declared((inner, ffn, embed), ".FE", (-1,)),  # gate and up, or one matrix
        "w_out": Declared((embed, ffn), "EF", (-1,)),
    }
    layer |= _norm("attention_norm", model)
    if model.block is Block.SERIAL:
        layer |= _norm("ffn_norm", model)
    if model.qk_norm:
        layer |= {"q_norm": Declared((head,), ".", fill=1.0), "k_norm": Declared((head,), ".", fill=1.0)}
    for matrix in model.biases:
        shape = (heads, head) if matrix == "wq" else layer[matrix].scale_shape()
        layer[bias_of(matrix)] = Declared(shape, "." * len(shape), fill=0.0)
    return layer


def _norm(name: str, model: ModelConfig) -> dict[str, Declared]:
    found = {name: Declared((model.embed_dim,), ".", fill=1.0)}
    if model.norm is Norm.LAYER:
        found[f"{name}_bias"] = Declared((model.embed_dim,), ".", fill=0.0)
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
def num_params(model: ModelConfig) -> int:
    """All parameters, the vocabulary unpadded; tied embeddings counted once."""
    layers = sum(kind.count * _params(kind.weights) for kind in declare_layers(model))
    padding = (model.padded_vocab_size - model.vocab_size) * model.embed_dim
    return layers + _params(declare_ends(model)) - padding * (1 if model.tied_embeddings else 2)


def _params(weights: Mapping[str, Declared]) -> int:
    return sum(math.prod(declared.shape) for declared in weights.values())


def held_bytes(model: ModelConfig, ways: Mapping[str, int], weights: DType) -> int:
    """Bytes of weights that one device holds.

    Args:
        ways: letter → number of parts into which a dimension of that letter is split; letters that are missing are whole. `N` splits the
            layers.
        weights: of matrices; the type of everything else follows from it.
    """
    layers = sum(kind.count // ways.get("N", 1) * _held(kind.weights, ways, weights) for kind in declare_layers(model))
    return layers + _held(declare_ends(model), ways, weights)


def _held(group: Mapping[str, Declared], ways: Mapping[str, int], weights: DType) -> int:
    def part(shape: tuple[int, ...], letters: str) -> int:
        return math.prod(shape) // math.prod(ways.get(letter, 1) for letter in letters)

    total = 0
    for declared in group.values():
        held = part(declared.shape, declared.letters)
        if declared.quantized(weights):
            total += held + _SCALE_BYTES * part(declared.scale_shape(), declared.scale_letters())
        else:
            total += held * weights.activations.num_bytes
    return total
