"""What one family of published models declares: the keys of its `config.json`, what its blocks are, and the names of its tensors.

The declarations themselves stand in `partinf.model.families`.

Letters of tensors: V vocabulary, E d_model, F d_ff, H query heads, K key/value heads, Q head size, M longest context. Both sides pair the
first half of a head with the second in the rotary embedding (rotate_half), so a leaf is a reshape of a tensor or of a block of its rows,
or a stack of such; GPT-2's matrices are transposed first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from partinf.model.config import ModelConfig
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
class Window:
    """How a family says that layers see only the latest positions; `sliding_window` holds their number.

    Attributes:
        absent: the window where the file does not have the key.
        flag: the key that switches windows on, off by default; empty where they are always on.
        first: the key of the first layer that has one, and its default; an empty key where all layers have.
    """

    absent: int
    flag: str = ""
    first: tuple[str, int] = ("", 0)

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({"sliding_window", self.flag, self.first[0]} - {""})


@dataclass(frozen=True)
class Stored:
    """Where one leaf of the parameter tree is stored.

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
        buffers: Endings of what is stored although it follows from the configuration.
    """

    bases: tuple[str, ...]
    layer: str
    layer_weights: Mapping[str, Stored]
    model_weights: Mapping[str, Stored]
    buffers: tuple[str, ...] = ()

    @property
    def leaves(self) -> set[str]:
        return {*self.layer_weights, *self.model_weights}


# What the blocks of a family are where its declaration does not say: what `ModelConfig` says.
_FEATURES = (
    *("block", "norms", "gated", "activation", "norm", "position", "biases"),
    *("qk_norm", "qk_norm_rotated", "qkv_clip", "attention_scale", "attention_cap", "sinks"),
    *("residual_scale", "embedding_scale", "logit_scale", "logit_cap", "output_bias", "kinds", "prefix", "pattern"),
)
_PLAIN: Mapping[str, Any] = {field.name: field.default for field in fields(ModelConfig) if field.name in _FEATURES}


@dataclass(frozen=True)
class Family:
    """One family: how its configuration is written, what its blocks always are, and where its weights are.

    Attributes:
        title: its name in messages. architecture, model_type: its names in `config.json`; `model_type` is `ModelConfig.family`.
        sizes: field of `ModelConfig` → the key that holds it.
        norm_eps: key and default of the norms' epsilon; no key where it is fixed.
        tied: whether embeddings are tied where the file does not say.
        naming: the names of its tensors.
        only: key → the values that are computed, the default first.
        equal: pairs of keys that must agree where the first is given.
        block: fields of `ModelConfig` that the family fixes, where they differ from Llama's.
        window: how it says that layers have a sliding window; None where it has none.
        rope: how its configuration describes rotations.
        harmless: further keys, of this family alone, that change no result.
        written: whether directories of the family are written as well as read.
    """

    title: str
    architecture: str
    model_type: str
    sizes: Mapping[str, Size]
    norm_eps: tuple[str, float]
    tied: bool
    naming: Naming
    only: Mapping[str, tuple[Any, ...]]
    equal: tuple[tuple[str, str], ...] = ()
    block: Mapping[str, Any] = field(default_factory=dict)
    window: Window | None = None
    rope: Rope = HALVES
    harmless: frozenset[str] = frozenset()
    written: bool = False

    @property
    def features(self) -> Mapping[str, Any]:
        """What its blocks are: fields of `ModelConfig` and the value that each of them has."""
        return {**_PLAIN, **self.block}

    def differences(self, config: ModelConfig) -> dict[str, Any]:
        """The features in which an architecture differs from the family's, with the family's values."""
        return {key: value for key, value in self.features.items() if getattr(config, key) != value}
