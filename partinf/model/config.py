"""Architectures as data: one frozen `ModelConfig`, which `partinf.model.load` reads from files.

Sizes carry the letters of `partinf.axes` (E, F, H, K, Q, V, N).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from partinf.foundation.documents import finite, shown
from partinf.foundation.errors import raise_offences
from partinf.foundation.limits import not_whole
from partinf.foundation.rounding import round_up
from partinf.model.rotation import PLAIN, Rotation

_FINE, _COARSE, _LARGE_VOCAB = 256, 4096, 32768
# The least and the most of every size: several times what anybody has published, and little enough that lists of layers and heads, and
# 32-bit places in any one dimension, hold.
_WHOLE = {
    "num_layers": (1, 4096),
    "embed_dim": (1, 1 << 20),
    "ffn_dim": (1, 1 << 22),
    "num_heads": (1, 1 << 14),
    "num_kv_heads": (1, 1 << 14),
    "head_dim": (1, 1 << 14),
    "vocab_size": (1, 1 << 24),
    "max_len": (0, 1 << 30),
    "window": (0, 1 << 30),
}
_MOST_PARAMS = 10**15
# Held by float32 with room for what is computed from it: a smaller epsilon vanishes.
_NORM_EPS = (2.0**-120, 1.0)


class Block(StrEnum):
    """SERIAL: attention, then FFN on its result. PARALLEL: both on the same normalised input, added (PaLM)."""

    SERIAL = "serial"
    PARALLEL = "parallel"


class Norm(StrEnum):
    RMS = "rms"
    LAYER = "layer"


class Position(StrEnum):
    ROPE = "rope"
    LEARNED = "learned"


class Activation(StrEnum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


MATRICES = ("wq", "wkv", "wo", "w_in", "w_out")
"""The matrices of a layer, by the names under which `partinf.model.weights` declares them."""


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only Transformer.

    Attributes:
        num_layers: N. embed_dim: E. ffn_dim: F. num_heads: H. num_kv_heads: K. head_dim: Q. vocab_size: V, unpadded.
        gated: the FFN has a gate and an up matrix (SwiGLU and kin) instead of one input matrix.
        qk_norm: queries and keys are normalised per head before the rotation (Qwen 3).
        rotation: of queries and keys, where `position` is ROPE.
        biases: of `MATRICES`, those whose product has a bias.
        max_len: longest context in tokens; 0 where the source states none.
        window: positions that every layer, or some, may look back on, itself included; 0 where all see all. Windows are not computed: up
            to so many tokens there is nothing to cut off, and longer contexts are refused.
        family: the published family whose names its weights have on disk, by its `model_type`; empty where the source names none.
        source: where the sizes come from.
    """

    name: str
    num_layers: int
    embed_dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    block: Block = Block.SERIAL
    gated: bool = True
    activation: Activation = Activation.SILU
    norm: Norm = Norm.RMS
    norm_eps: float = 1e-5
    position: Position = Position.ROPE
    rotation: Rotation = PLAIN
    biases: tuple[str, ...] = ()
    tied_embeddings: bool = False
    qk_norm: bool = False
    max_len: int = 0
    window: int = 0
    family: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        raise_offences(self._offences())

    @property
    def padded_vocab_size(self) -> int:
        """V rounded up to a multiple that depends on the model alone, so that the same tree of parameters fits every mesh."""
        multiple = _COARSE if self.vocab_size >= _LARGE_VOCAB else _FINE
        return round_up(self.vocab_size, multiple)

    @property
    def longest_context(self) -> int:
        """Longest context that is computed as the model defines it, in tokens: `max_len`, or the window if that is shorter; 0 for any."""
        return min(filter(None, (self.max_len, self.window)), default=0)

    def context_offences(self, what: str, tokens: int) -> list[str]:
        """The offence of so many tokens in one context, `what` saying who asks for them; empty where they can be served."""
        if not self.longest_context or tokens <= self.longest_context:
            return []
        if self.longest_context < self.max_len or not self.max_len:
            window = f"a sliding window of {self.window} tokens, and longer contexts are not supported"
            return [f"{what}; model {self.name} has {window}: at most {self.window} are computed exactly"]
        return [f"{what}; model {self.name} has a context of {self.max_len} tokens"]

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    def kv_heads_with(self, num_heads: int) -> int:
        """Key-value heads when the query heads are padded to `num_heads`: as many again for multihead attention, else unchanged."""
        return num_heads if self.num_kv_heads == self.num_heads else self.num_kv_heads

    def with_padded_heads(self, num_heads: int) -> ModelConfig:
        """The same architecture with query heads padded to `num_heads`; 0 for no padding."""
        if num_heads in (0, self.num_heads):
            return self
        return replace(self, num_heads=num_heads, num_kv_heads=self.kv_heads_with(num_heads))

    def _offences(self) -> list[str]:
        offences = [f"model {self.name}: {line}" for line in self._out_of_range()]
        if not offences and self.num_heads % self.num_kv_heads:
            valid = ", ".join(str(k) for k in range(1, self.num_heads + 1) if self.num_heads % k == 0)
            offences.append(
                f"model {self.name}: {self.num_heads} query heads do not share {self.num_kv_heads} kv heads evenly; valid: {valid}"
            )
        if self.biases != tuple(matrix for matrix in MATRICES if matrix in self.biases):
            offences.append(f"model {self.name}: biases = {self.biases!r}; valid: any of {', '.join(MATRICES)}, in this order")
        if not offences and self.position is Position.LEARNED and self.max_len < 1:
            offences.append(f"model {self.name}: learned positions need max_len, the length of their table")
        if not offences and self.position is Position.ROPE:
            offences += [f"model {self.name}: rotation: {line}" for line in self.rotation.offences(self.head_dim)]
        rows = 0 if offences else self.num_layers * (self.ffn_dim + self.num_heads * self.head_dim) + self.vocab_size
        rows += self.max_len if rows and self.position is Position.LEARNED else 0
        if rows * self.embed_dim > _MOST_PARAMS:
            offences.append(f"model {self.name}: more than {_MOST_PARAMS:.0e} parameters, which are the most that are planned for")
        return offences

    def _out_of_range(self) -> list[str]:
        """Numbers of a wrong type, or for which the code is not right; lists and arrays are made of these sizes only after this."""
        offences = []
        for key, (least, most) in _WHOLE.items():
            offences += not_whole(key, getattr(self, key), least, most)
        offences += _number_offences("norm_eps", self.norm_eps, _NORM_EPS)
        return offences


def _number_offences(key: str, value: Any, bounds: tuple[float, float]) -> list[str]:
    number, (least, most) = finite(value), bounds
    if number is not None and least <= number <= most:
        return []
    return [f"{key} = {shown(value)}; a number from {least:.3g} to {most:.3g} is needed"]
