"""Architectures as data: one frozen `ModelConfig`, which `partinf.model.load` reads from files.

Sizes carry the letters of `partinf.axes` (E, F, H, K, Q, V, N).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, cached_property
from typing import Any, cast

from partinf.foundation.documents import finite, shown
from partinf.foundation.errors import raise_offences
from partinf.foundation.limits import NEVER, not_whole
from partinf.foundation.rounding import round_up
from partinf.model.kinds import MATRICES as MATRICES
from partinf.model.kinds import (
    MOST_WIDTH,
    Attention,
    Experts,
    FeedForward,
    Kind,
    LayerKind,
    NormPlaces,
    QkNorm,
    Run,
    runs_of,
    unknown_kinds,
)
from partinf.model.kinds import Activation as Activation
from partinf.model.kinds import Block as Block
from partinf.model.kinds import Norm as Norm
from partinf.model.rotation import PLAIN, Rotation

MOST_LAYERS = 4096
_FINE, _COARSE, _LARGE_VOCAB = 256, 4096, 32768
# The least and the most of every size: several times what anybody has published, and little enough that lists of layers and heads, and
# 32-bit places in any one dimension, hold.
_WHOLE = {
    "num_layers": (1, MOST_LAYERS),
    "embed_dim": (1, 1 << 20),
    "ffn_dim": (0, MOST_WIDTH),
    "num_heads": (1, 1 << 14),
    "num_kv_heads": (1, 1 << 14),
    "head_dim": (1, 1 << 14),
    "vocab_size": (1, 1 << 24),
    "max_len": (0, 1 << 30),
    "window": (0, 1 << 30),
    "table_dim": (0, 1 << 20),
}
_MOST_KINDS = 64
_MOST_PARAMS = 10**15
# Held by float32 with room for what is computed from it: a smaller epsilon vanishes.
_NORM_EPS = (2.0**-120, 1.0)
_SCALE, _BOUND = (2.0**-40, 2.0**40), (0.0, 2.0**40)
_NUMBERS = {
    "norm_eps": _NORM_EPS,
    "attention_scale": _BOUND,
    "attention_cap": _BOUND,
    "qkv_clip": _BOUND,
    "residual_scale": _SCALE,
    "embedding_scale": _SCALE,
    "logit_scale": _SCALE,
    "logit_cap": _BOUND,
}


class Position(StrEnum):
    ROPE = "rope"
    LEARNED = "learned"


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only Transformer: what all its layers have in common, and where they differ the kinds and their order.

    Attributes:
        num_layers: N. embed_dim: E. num_heads: H. num_kv_heads: K. head_dim: Q. vocab_size: V, unpadded.
        ffn_dim: F of layers without experts; 0 where all have them.
        experts: of layers whose kind has them; None where the model has none.
        block, norms, norm, norm_eps, residual_scale: as in `LayerKind`. Norm and epsilon are those of the final norm too, which a model has
            where `final_norm` says so.
        gated, activation: as in `FeedForward`. biases: of `MATRICES`, those whose product has a bias.
        rotation: of queries and keys, where `position` is ROPE.
        qk_norm, qk_norm_rotated, qk_norm_bias, qkv_clip, sinks: as in `Attention`. attention_scale: of scores; 0 for 1/√Q. attention_cap:
            of scores.
        embedding_scale: of what is looked up in the table. logit_scale: of logits. logit_cap: c in c·tanh(logit/c), after that; 0 for none.
        tied_embeddings: logits are made with the table of embeddings. output_bias: they have a bias.
        table_dim: the width of one table that the weights on disk have instead of two, each of which is its product with a matrix of
            theirs, made while they are read; 0 where the tables lie there as they are used.
        max_len: longest context in tokens; 0 where the source states none.
        window: positions that every layer may look back on, itself included; 0 where all see all.
        kinds: what layers of several kinds have of their own, `window` and `rotation`; empty where all are alike.
        prefix, pattern: names of kinds: of the first layers, and of those after them as often as there are layers.
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
    norms: NormPlaces = NormPlaces.BEFORE
    final_norm: bool = True
    qk_norm: QkNorm = QkNorm.NONE
    qk_norm_rotated: bool = False
    qk_norm_bias: bool = False
    qkv_clip: float = 0.0
    attention_scale: float = 0.0
    attention_cap: float = 0.0
    sinks: bool = False
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    tied_embeddings: bool = False
    output_bias: bool = False
    table_dim: int = 0
    max_len: int = 0
    window: int = 0
    experts: Experts | None = None
    kinds: tuple[Kind, ...] = ()
    prefix: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ()
    family: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        raise_offences(self._offences())

    @cached_property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of its layers, in the order of `kinds`; one where all are alike."""
        own = self.kinds or (Kind("", self.window, self.rotation),)
        return tuple(self._layer_kind(kind) for kind in own)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Its layers in order, by the numbers of their kinds."""
        numbers = {kind.name: number for number, kind in enumerate(self.kinds)}
        prefix, period = (tuple(numbers[name] for name in names) for names in (self.prefix, self.pattern))
        return runs_of(self.num_layers, prefix, period or (0,))

    @cached_property
    def kind_of_layers(self) -> tuple[int, ...]:
        """The number of every layer's kind."""
        return tuple(kind for run in self.runs for kind in run.kinds * run.repeats)

    def of_stage(self, stages: int) -> ModelConfig:
        """What each of so many pipeline stages has of its layers; they divide, and `stage_offences` has none."""
        return self._with(num_layers=self.num_layers // stages)

    def _with(self, **sizes: int) -> ModelConfig:
        """The same with other sizes, made and checked once: a search asks for few of them some thousand times."""
        if all(getattr(self, name) == size for name, size in sizes.items()):
            return self
        key = tuple(sizes.items())
        if key not in self._known:
            self._known[key] = replace(self, **cast(dict[str, Any], sizes))
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[tuple[str, int], ...], ModelConfig]:
        """The same model with other sizes, by these."""
        return {}

    def stage_offences(self, stages: int) -> list[str]:
        """Why layers that divide into so many stages do not: one program runs on all, so each has the same kinds in the same order."""
        kinds, count = self.kind_of_layers, self.num_layers // stages
        if kinds == kinds[:count] * stages:
            return []
        rest = self.num_layers - max(self.runs, key=lambda run: run.num_layers).num_layers
        why = f"{rest} of its layers stand outside the period" if rest else f"its kinds repeat after {len(self.pattern)} layers"
        return [f"layers N = {self.num_layers} do not split into {stages} stages with the same kinds of layers: {why}"]

    def _layer_kind(self, own: Kind) -> LayerKind:
        attention = Attention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=own.window,
            rotation=own.rotation if self.position is Position.ROPE else None,
            qk_norm=self.qk_norm,
            qk_norm_rotated=self.qk_norm_rotated,
            qk_norm_bias=self.qk_norm_bias,
            qkv_clip=self.qkv_clip,
            scale=self.attention_scale or self.head_dim**-0.5,
            cap=self.attention_cap,
            sinks=self.sinks,
            biases=tuple(matrix for matrix in self.biases if matrix in ("wq", "wkv", "wo")),
        )
        outer = tuple(matrix for matrix in self.biases if matrix in ("w_in", "w_out"))
        feed_forward: FeedForward | None = FeedForward(self.ffn_dim, self.gated, self.activation, outer)
        experts = self.experts if own.experts else None
        if experts is not None:
            feed_forward = replace(experts.each, width=experts.shared, biases=()) if experts.shared else None
        return LayerKind(own.name, attention, feed_forward, experts, self.block, self.norm, self.norm_eps, self.norms, self.residual_scale)

    @property
    def padded_vocab_size(self) -> int:
        """V rounded up to a multiple that depends on the model alone, so that the same tree of parameters fits every mesh."""
        multiple = _COARSE if self.vocab_size >= _LARGE_VOCAB else _FINE
        return round_up(self.vocab_size, multiple)

    @cached_property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """The windows that layers have, in positions, `NEVER` for none, and how many layers have each."""
        found = Counter(self.layer_kinds[kind].attention.window or NEVER for kind in self.kind_of_layers)
        return tuple(found.items())

    @cached_property
    def feed_forwards(self) -> tuple[tuple[FeedForward, int], ...]:
        """What all tokens go through, the feed-forward next to experts included, and how many layers have each, in the order in which they
        first occur."""
        kinds = (self.layer_kinds[kind].feed_forward for kind in self.kind_of_layers)
        return tuple(Counter(one for one in kinds if one is not None).items())

    @cached_property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return sum(self.layer_kinds[kind].experts is not None for kind in self.kind_of_layers)

    def kept_windows(self, served: int) -> tuple[tuple[int, int], ...]:
        """What layers keep of contexts of at most `served` positions: windows, 0 for all positions, the longest first, and how many layers
        have each. A window that holds the longest context is none."""
        return _kept_windows(self.windows, served)

    @property
    def longest_context(self) -> int:
        """Longest context that is computed as the model defines it, in tokens; 0 for any."""
        return self.max_len

    @property
    def least_window(self) -> int:
        """The shortest window of any kind of layer; 0 where none has one."""
        return min(filter(None, (kind.attention.window for kind in self.layer_kinds)), default=0)

    def context_offences(self, what: str, tokens: int) -> list[str]:
        """The offence of so many tokens in one context, `what` saying who asks for them; empty where they can be served."""
        if not self.longest_context or tokens <= self.longest_context:
            return []
        return [f"{what}; model {self.name} has a context of {self.max_len} tokens"]

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    def kv_heads_with(self, num_heads: int) -> int:
        """Key-value heads when the query heads are padded to `num_heads`: as many again for multihead attention, else unchanged."""
        return num_heads if self.num_kv_heads == self.num_heads else self.num_kv_heads

    def with_padded_heads(self, num_heads: int) -> ModelConfig:
        """The same architecture with query heads padded to `num_heads`; 0 for no padding."""
        return self if num_heads == 0 else self._with(num_heads=num_heads, num_kv_heads=self.kv_heads_with(num_heads))

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
        if not offences and self.block.parallel and self.norms.after:
            offences.append(
                f"model {self.name}: a parallel block has its norms before its sublayers: norms = {self.norms.value!r} is not supported"
            )
        if self.qk_norm_bias and (self.qk_norm is QkNorm.NONE or not self.norm.weighted):
            offences.append(f"model {self.name}: qk_norm_bias needs norms of queries and keys that have weights")
        if self.table_dim and self.tied_embeddings:
            offences.append(f"model {self.name}: table_dim = {self.table_dim} makes two tables, which tied_embeddings says are one")
        sized = not offences
        offences += self._order_offences()
        if sized:
            offences += self._kind_offences()
        if not offences:
            offences += self._expert_offences()
        rows = 0 if offences else self.num_layers * (self._widest + self.num_heads * self.head_dim) + self.vocab_size
        rows += self.max_len if rows and self.position is Position.LEARNED else 0
        if rows * self.embed_dim > _MOST_PARAMS:
            offences.append(f"model {self.name}: more than {_MOST_PARAMS:.0e} parameters, which are the most that are planned for")
        return offences

    @property
    def _widest(self) -> int:
        """Rows of the feed-forward matrices of its largest layer."""
        of = self.experts
        return max(self.ffn_dim, of.count * of.each.width + of.shared if of is not None else 0)

    def _expert_offences(self) -> list[str]:
        """What is wrong with its experts, and with layers that have neither experts nor a width of their own."""
        of = self.experts
        offences = [] if of is None else [f"model {self.name}: experts: {line}" for line in of.offences()]
        dense = [kind.name for kind in self.kinds if not kind.experts] if of is not None else [""]
        if dense and not self.ffn_dim:
            offences.append(
                f"model {self.name}: ffn_dim = 0, but {'layers of kind ' + dense[0] if dense[0] else 'its layers'} have no experts"
            )
        return offences

    def _out_of_range(self) -> list[str]:
        """Numbers of a wrong type, or for which the code is not right; lists and arrays are made of these sizes only after this."""
        offences = []
        for key, (least, most) in _WHOLE.items():
            offences += not_whole(key, getattr(self, key), least, most)
        for key, bounds in _NUMBERS.items():
            offences += _number_offences(key, getattr(self, key), bounds)
        return offences

    def _order_offences(self) -> list[str]:
        """What is wrong with the names of kinds and their order, whatever else is."""
        names = [kind.name for kind in self.kinds]
        offences = unknown_kinds(names, self.prefix, self.pattern)
        offences += [f"kind {name} stands nowhere in the pattern" for name in names if name not in (*self.prefix, *self.pattern)]
        if len(names) > _MOST_KINDS or len({*names}) < len(names):
            offences.append(f"{len(names)} kinds of layers, of {len({*names})} names; at most {_MOST_KINDS}, each with a name of its own")
        if names and not self.pattern:
            offences.append("kinds of layers need a pattern, which repeats after the prefix")
        return [f"model {self.name}: {line}" for line in offences]

    def _kind_offences(self) -> list[str]:
        """What is wrong with the kinds themselves and their number, of a configuration whose sizes are right."""
        offences = []
        if len(self.prefix) > self.num_layers:
            offences.append(f"the prefix has {len(self.prefix)} layers; the model has {self.num_layers}")
        for kind in self.kinds:
            offences += [f"kind {kind.name}: {line}" for line in not_whole("window", kind.window, *_WHOLE["window"])]
            if self.position is Position.ROPE and kind.rotation is not None:
                offences += [f"kind {kind.name}: rotation: {line}" for line in kind.rotation.offences(self.head_dim)]
        return [f"model {self.name}: {line}" for line in offences]


@cache
def _kept_windows(windows: tuple[tuple[int, int], ...], served: int) -> tuple[tuple[int, int], ...]:
    found: Counter[int] = Counter()
    for window, count in windows:
        found[window if window < served else 0] += count
    return tuple(sorted(found.items(), key=lambda one: (one[0] > 0, -one[0])))


def _number_offences(key: str, value: Any, bounds: tuple[float, float]) -> list[str]:
    number, (least, most) = finite(value), bounds
    if number is not None and least <= number <= most:
        return []
    return [f"{key} = {shown(value)}; a number from {least:.3g} to {most:.3g} is needed"]
