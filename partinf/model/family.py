"""What one family of published models declares: the keys of its `config.json`, what its blocks are, and the names of its tensors.

The declarations themselves stand in `partinf.model.families`.

Letters of tensors: V vocabulary, E d_model, P the width of tables that are not E wide, F d_ff, X experts, W d_ff of each, H query heads, K
key/value heads, G query heads of each, Q head size, M longest context, T the four devices that CodeGen was cut for, S query heads of each.
A leaf is a reshape of a tensor or of some of its rows, or a stack of such. Where a family pairs neighbours in the rotary embedding, the
rows of queries and keys are put such that the first half of what is rotated is paired with the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from partinf.model.config import ModelConfig, Position
from partinf.model.hf_experts import Mixture
from partinf.model.hf_rope import HALVES, Rope


@dataclass(frozen=True)
class Size:
    """A whole number of a configuration.

    Attributes:
        key: its name in `config.json`.
        absent: its value where the file does not have the key; None where it must.
        follows: null means that it follows from the other sizes, and so does a missing key without `absent`.
    """

    key: str
    absent: int | None = None
    follows: bool = False


@dataclass(frozen=True)
class Pick:
    """A key whose values mean different blocks.

    Attributes:
        absent: the value that a missing key means, and null too, unless null is among the values.
        values: each value that is computed → fields of `ModelConfig`; names with a `_` before are for the family's `derived` alone.
    """

    key: str
    absent: Any
    values: tuple[tuple[Any, Mapping[str, Any]], ...]

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(key for _, chosen in self.values for key in chosen if not key.startswith("_"))


@dataclass(frozen=True)
class Scalar:
    """A key that holds a number of the blocks.

    Attributes:
        field: of `ModelConfig`, which gets what `of` makes of the number, and keeps its default where the key is null.
        absent: the number that a missing key means; None for null.
        back: the inverse of `of`.
    """

    key: str
    field: str
    absent: float | None
    of: Callable[[float], float] = float
    back: Callable[[float], float] = float


@dataclass(frozen=True)
class Bias:
    """A flag that gives products a bias, and what a missing one means."""

    key: str
    absent: bool
    matrices: tuple[str, ...]


@dataclass(frozen=True)
class Window:
    """How a family says which layers see only the latest positions, and which do not rotate.

    Attributes:
        absent: the window where the file does not have its key; None for none.
        key: of the window.
        flag: the key that switches windows on, off by default; empty where they are always on.
        typed: whether `layer_types` lists the layers; where it is not given, or does not count, the following say which slide.
        first: the key of the first layer that slides, and its default; an empty key where all do.
        every: the key and default of a number n, every n-th layer being full; the key is empty where n is fixed, n is 0 for none.
        full_first: the full layer is the first of every n, not the last.
        unrotated: full layers are not rotated where others slide.
        listed: the keys that list the layers in GPT-Neo's way, as `global` or `local`, and as counts of such lists.
        unrotated_keys: the keys of a list with 0 for each layer that is not rotated, and of a number n with its default, every n-th layer
            being unrotated without such a list; only those slide.
    """

    absent: int | None
    key: str = "sliding_window"
    flag: str = ""
    typed: bool = False
    first: tuple[str, int] = ("", 0)
    every: tuple[str, int] = ("", 0)
    full_first: bool = False
    unrotated: bool = False
    listed: tuple[str, str] = ("", "")
    unrotated_keys: tuple[str, str, int] = ("", "", 0)

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({self.key, self.flag, self.first[0], self.every[0], *self.listed, *self.unrotated_keys[:2]} - {""})


@dataclass(frozen=True)
class Stored:
    """Where one leaf of the parameter tree is stored.

    Attributes:
        dims: The tensor's dimensions, separated by spaces, outputs first. Letters written together are one dimension of the tensor and
            several of the leaf, in parentheses one of both; 1 is a dimension of the leaf alone.
        tensors: Names of the tensors; more than one are stacked on a new leading dimension of the leaf, in this order.
        fused: Where the tensor's rows are several leaves': the letters of each part, in order. part: which part each of `tensors` means.
        per: The letter of what every part stands in once for each of, all parts of the first before those of the second; empty where
            every part stands in one piece.
        skip: Rows of the tensor before the leaf's.
        transposed: The tensor is stored [in, out].
        numbered: The letter of a dimension of the leaf that is none of the tensor: there is a tensor for each number, which stands in its
            name as `{number}`.
        leaf: The letters of the leaf's dimensions, where they have another order than the tensor's; a 1 of the tensor may be missing.
        packed: The numbers are stored in four bits, in a tensor of blocks and one of scales (`checkpoint.mxfp4`).
        times: The leaf is the product of the tensor with another, over P: its name, and its dimensions.
    """

    dims: str
    tensors: tuple[str, ...]
    fused: tuple[str, ...] = ()
    part: tuple[int, ...] = ()
    per: str = ""
    skip: int = 0
    transposed: bool = False
    numbered: str = ""
    leaf: str = ""
    packed: bool = False
    times: tuple[str, str] | None = None


@dataclass(frozen=True)
class Naming:
    """The names of one family's tensors.

    Attributes:
        bases: What `{base}` in a name may stand for; the first is what transformers writes.
        layer: What precedes the name of a layer's tensor.
        layer_weights: Leaves of a layer. mixed_weights: those of a layer with experts, where they have other tensors.
        packed_weights: those of experts in a directory that has them in four bits.
        model_weights: Leaves of the model.
        heads: What `{head}` stands for with a base; nothing with one that is not here.
        neighbours: Leaves of which the first tensor has rows of heads, such that neighbours are pairs of the rotation.
        buffers: Endings of what is stored although it follows from the configuration.
        aside: Beginnings of the names of other parts of a model, such as one for images, which are not read; `{layers}` in one stands for
            the number of layers, that of a layer after the last.
    """

    bases: tuple[str, ...]
    layer: str
    layer_weights: Mapping[str, Stored]
    model_weights: Mapping[str, Stored]
    heads: Mapping[str, str] = field(default_factory=dict)
    neighbours: frozenset[str] = frozenset()
    buffers: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    mixed_weights: Mapping[str, Stored] = field(default_factory=dict)
    packed_weights: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def leaves(self) -> set[str]:
        return {*self.layer_weights, *self.mixed_weights, *self.model_weights}

    def weights_of(self, experts: bool) -> Mapping[str, Stored]:
        """Leaves of a layer with or without experts."""
        return {**self.layer_weights, **self.mixed_weights} if experts else self.layer_weights

    def named(self, tensor: str, number: int = 0) -> str:
        """The name of a tensor, with the first base."""
        return tensor.format(base=self.bases[0], head=self.heads.get(self.bases[0], ""), number=number)

    def layer_named(self, layer: int) -> str:
        """What precedes the names of a layer's tensors."""
        return self.layer.format(base=self.bases[0], layer=layer)


@dataclass(frozen=True)
class Wrapper:
    """A family of models that read more than text, of which the part for text is read.

    Attributes:
        architecture, model_type: as in `Family`. text: the key of the part for text. inner: its `model_type` where it does not say.
        unread: what is not read, in words.
        harmless: keys outside the part for text that change nothing for text.
    """

    architecture: str
    model_type: str
    text: str
    inner: str
    unread: str
    harmless: frozenset[str]


# What the blocks of a family are where its declaration does not say: what `ModelConfig` says.
_FEATURES = (
    *("block", "norms", "final_norm", "gated", "activation", "norm", "position", "biases"),
    *("qk_norm", "qk_norm_rotated", "qk_norm_bias", "qkv_clip", "attention_scale", "attention_cap", "sinks"),
    *("residual_scale", "embedding_scale", "logit_scale", "logit_cap", "output_bias", "kinds", "prefix", "pattern"),
)
_PLAIN: Mapping[str, Any] = {field.name: field.default for field in fields(ModelConfig) if field.name in _FEATURES}


def _nothing(_: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One family: how its configuration is written, what its blocks are, and where its weights are.

    Attributes:
        title: its name in messages. architecture, model_type: its names in `config.json`; `model_type` is `ModelConfig.family`.
        sizes: field of `ModelConfig` → the key that holds it.
        norm_eps: key and default of the norms' epsilon; no key where it is fixed.
        tied: whether embeddings are tied where the file does not say.
        naming: the names of its tensors, or what gives those of one architecture.
        only: key → the values that are computed, the default first.
        equal: pairs of keys that must agree where the first is given.
        block: fields of `ModelConfig` that the family fixes, where they differ from Llama's.
        picks, scalars, biases: keys that decide the other fields. Biases come to those of `block`.
        derived: fields that follow from the others; loose: those of them that a flag decides too, so that they have two values.
        window: how it says that layers have a sliding window; None where it has none.
        mixture: how it says which layers have experts, and what they are; None where it has none.
        quantised: the ways of storing weights in fewer bits that are read, by their `quant_method`.
        rope: how its configuration describes rotations.
        harmless: further keys, of this family alone, that change no result.
    """

    title: str
    architecture: str
    model_type: str
    sizes: Mapping[str, Size]
    norm_eps: tuple[str, float]
    tied: bool
    naming: Naming | Callable[[ModelConfig], Naming]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    equal: tuple[tuple[str, str], ...] = ()
    block: Mapping[str, Any] = field(default_factory=dict)
    picks: tuple[Pick, ...] = ()
    scalars: tuple[Scalar, ...] = ()
    biases: tuple[Bias, ...] = ()
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _nothing
    loose: frozenset[str] = frozenset()
    window: Window | None = None
    mixture: Mixture | None = None
    quantised: tuple[str, ...] = ()
    rope: Rope = HALVES
    harmless: frozenset[str] = frozenset()

    def naming_of(self, config: ModelConfig) -> Naming:
        """The names of the tensors of one architecture."""
        return self.naming if isinstance(self.naming, Naming) else self.naming(config)

    @property
    def keys(self) -> frozenset[str]:
        """What is read of a configuration, but for names and rotations."""
        read = (*(size.key for size in self.sizes.values()), *self.only, self.norm_eps[0], *(key for key, _ in self.equal))
        read += (*(one.key for one in self.picks), *(one.key for one in self.scalars), *(one.key for one in self.biases))
        apart = (one.keys for one in (self.window, self.mixture) if one is not None)
        return frozenset(read).union(*apart) - {""}

    @property
    def rotates(self) -> bool:
        """Whether its blocks rotate queries and keys."""
        return self.block.get("position", Position.ROPE) is Position.ROPE

    def differences(self, config: ModelConfig) -> dict[str, Any]:
        """The features in which an architecture differs from the family's, with a value that the family has."""
        fixed = {**_PLAIN, **self.block, **self.derived(vars(config))}
        kinds = {"kinds", "prefix", "pattern"} if self.window or (self.mixture and self.mixture.some_dense) else set()
        free = {scalar.field for scalar in self.scalars} | self.loose | kinds
        found: dict[str, Any] = {}
        if self.mixture is None and config.experts is not None:
            found["experts"] = "none"
        elif self.mixture is not None and (config.experts is None or not self.mixture.has(config.experts)):
            found["experts"] = "others"
        decided: dict[str, list[Any]] = {}
        for pick in self.picks:
            for _, chosen in pick.values:
                for key in pick.fields:
                    decided.setdefault(key, []).append({**fixed, **chosen}[key])
        found |= {key: values[0] for key, values in decided.items() if getattr(config, key) not in values}
        free |= {*decided}
        if self.biases:
            free.add("biases")
            always = self.block.get("biases", ())
            given = [matrix for one in self.biases if {*one.matrices} <= {*config.biases} for matrix in one.matrices]
            if {*config.biases} != {*always, *given}:
                found["biases"] = always
        return found | {
            key: value for key, value in fixed.items() if key in _FEATURES and key not in free and getattr(config, key) != value
        }
