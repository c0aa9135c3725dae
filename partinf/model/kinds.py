"""What one kind of layer is (attention, feed-forward, how norms and residuals stand), and the order in which kinds follow each other.

Whatever a family of models changes in a block is a value here, so that the step branches on features and on no family's name. A model
whose layers are all alike is one kind; others have a pattern: a few layers first, then a period that repeats.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from partinf.foundation.errors import nearest
from partinf.foundation.limits import not_whole
from partinf.model.rotation import Rotation

MOST_EXPERTS, MOST_WIDTH = 1 << 14, 1 << 22
MATRICES = ("wq", "wkv", "wo", "w_in", "w_out")
"""The matrices of a layer, by the names under which `partinf.model.weights` declares them."""


class Block(StrEnum):
    """SERIAL: attention, then FFN on its result. PARALLEL: both on the same normalised input, added (PaLM). PARALLEL_TWO_NORMS: both on
    the same input, which each scales by a norm of its own (GPT-NeoX)."""

    SERIAL = "serial"
    PARALLEL = "parallel"
    PARALLEL_TWO_NORMS = "parallel-two-norms"

    @property
    def parallel(self) -> bool:
        return self is not Block.SERIAL


class Norm(StrEnum):
    """RMS: divided by the root of the mean square. LAYER: the mean subtracted first. What follows is multiplied by a weight, with
    `-1p` by 1 + weight; LAYER and LAYER_1P add a bias, LAYER_BARE has neither."""

    RMS = "rms"
    RMS_1P = "rms-1p"
    LAYER = "layer"
    LAYER_1P = "layer-1p"
    LAYER_NO_BIAS = "layer-no-bias"
    LAYER_BARE = "layer-bare"

    @property
    def centred(self) -> bool:
        """Whether the mean is subtracted."""
        return self not in (Norm.RMS, Norm.RMS_1P)

    @property
    def weighted(self) -> bool:
        return self is not Norm.LAYER_BARE

    @property
    def biased(self) -> bool:
        return self in (Norm.LAYER, Norm.LAYER_1P)

    @property
    def offset(self) -> float:
        """What is added to the weight."""
        return 1.0 if self in (Norm.RMS_1P, Norm.LAYER_1P) else 0.0


class NormPlaces(StrEnum):
    """Where a sublayer is normalised. BEFORE: what it reads. AFTER: what it adds to the residual. BOTH: either. SUM: the residual with what
    was added to it."""

    BEFORE = "before"
    AFTER = "after"
    BOTH = "both"
    SUM = "sum"

    @property
    def before(self) -> bool:
        return self in (NormPlaces.BEFORE, NormPlaces.BOTH)

    @property
    def after(self) -> bool:
        """Whether a sublayer has a norm behind it, of what it adds or of the sum."""
        return self is not NormPlaces.BEFORE


class QkNorm(StrEnum):
    """Of queries and keys. HEAD: each head for itself, all with the same weight [Q]. HEADS: each head with a weight of its own [H, Q].
    WIDTH: all heads together, with a weight [H, Q]. The norm is that of the layers, whose bias it may have too."""

    NONE = "none"
    HEAD = "head"
    HEADS = "heads"
    WIDTH = "width"


class Activation(StrEnum):
    """RELU2: the square of what RELU gives. GELU_SIGMOID: x·sigmoid(1.702·x)."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    GELU_SIGMOID = "gelu_sigmoid"
    RELU = "relu"
    RELU2 = "relu2"


@dataclass(frozen=True)
class Attention:
    """The attention of one kind of layer.

    Attributes:
        num_heads: H. num_kv_heads: K. head_dim: Q.
        window: positions that a query sees, the latest ones, its own included; 0 where it sees all before it.
        rotation: of queries and keys; None for none.
        qk_norm: how queries and keys are normalised. qk_norm_rotated: after the rotation instead of before it. qk_norm_bias: with a bias.
        qkv_clip: what queries, keys and values are cut off at, to either side; 0 for nowhere.
        scale: of scores. cap: c in c·tanh(score/c), 0 for none.
        sinks: every head has a learned score that takes its share of the mass and adds nothing.
        biases: of `MATRICES`, those of attention whose product has a bias.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    rotation: Rotation | None
    qk_norm: QkNorm
    qk_norm_rotated: bool
    qk_norm_bias: bool
    qkv_clip: float
    scale: float
    cap: float
    sinks: bool
    biases: tuple[str, ...]


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward of one kind of layer.

    Attributes:
        width: F. gated: it has a gate and an up matrix instead of one input matrix.
        biases: of `MATRICES`, those of the feed-forward whose product has a bias.
        clamp: what the gate is cut off at above, and the other matrix's output to either side, before the activation; 0 for nowhere.
        up_offset: added to the up matrix's output before it is multiplied by the activated gate.
    """

    width: int
    gated: bool
    activation: Activation
    biases: tuple[str, ...]
    clamp: float = 0.0
    up_offset: float = 0.0


class Score(StrEnum):
    """What makes scores of a router's logits. SOFTMAX: over all experts, before the choice. SIGMOID: of each, before the choice.
    SOFTMAX_OF_CHOSEN: the greatest logits are chosen, and the softmax is over these."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SOFTMAX_OF_CHOSEN = "softmax-of-chosen"


@dataclass(frozen=True)
class Router:
    """How a token's experts are chosen and weighted, all in float32. Of equal scores the expert with the lowest number is chosen.

    Attributes:
        renormalised: the chosen scores are divided by their sum. scale: what weights are multiplied by after that.
        bias: the product has a bias. correction: every expert has a bias that is added to its score for the choice alone.
        groups: into which experts fall, in order and of equal size; only those of the `chosen_groups` best groups can be chosen. A group
            is as good as the sum of its two greatest scores, correction included, or as its greatest where `group_by_greatest`.
    """

    score: Score = Score.SOFTMAX
    renormalised: bool = True
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: int = 1
    chosen_groups: int = 1
    group_by_greatest: bool = False

    def offences(self, count: int, per_token: int) -> list[str]:
        """What is wrong with it for so many experts, of which so many are chosen."""
        offences = not_whole("groups", self.groups, 1, count) + not_whole("chosen_groups", self.chosen_groups, 1, count)
        if offences:
            return offences
        if count % self.groups:
            offences.append(f"{count} experts do not fall into {self.groups} groups of equal size")
        elif self.chosen_groups > self.groups:
            offences.append(f"chosen_groups = {self.chosen_groups} of {self.groups} groups; at most all")
        elif self.chosen_groups * (count // self.groups) < per_token:
            offences.append(
                f"{self.chosen_groups} chosen groups hold {self.chosen_groups * (count // self.groups)} experts; {per_token} are chosen"
            )
        elif self.groups > 1 and not self.group_by_greatest and count // self.groups < 2:
            offences.append("groups of one expert have no two greatest scores")
        if self.score is Score.SOFTMAX_OF_CHOSEN and (self.correction or self.groups > 1):
            offences.append(f"score = {self.score.value!r} goes with neither a correction nor groups")
        return offences


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of a feed-forward: every token goes through `per_token` of `count` and the outputs are added up,
    each multiplied by its weight.

    Attributes:
        count: X. each: one expert.
        shared: width of an additional feed-forward that all tokens go through, activated as `each` is and without biases; 0 for none.
        shared_gate: its output is multiplied by the sigmoid of a product of the token with a vector.
    """

    count: int
    per_token: int
    each: FeedForward
    router: Router = Router()
    shared: int = 0
    shared_gate: bool = False

    def offences(self) -> list[str]:
        """What is wrong with its numbers."""
        offences = not_whole("count", self.count, 1, MOST_EXPERTS) + not_whole("per_token", self.per_token, 1, MOST_EXPERTS)
        offences += not_whole("width", self.each.width, 1, MOST_WIDTH) + not_whole("shared", self.shared, 0, MOST_WIDTH)
        if offences:
            return offences
        if self.per_token > self.count:
            offences.append(f"per_token = {self.per_token} of {self.count} experts; at most all")
        else:
            offences += [f"router: {line}" for line in self.router.offences(self.count, self.per_token)]
        if self.shared_gate and not self.shared:
            offences.append("shared_gate needs a shared feed-forward: `shared` is its width")
        return offences


@dataclass(frozen=True)
class LayerKind:
    """Everything about one kind of layer.

    Attributes:
        name: as the pattern has it; empty where all layers are alike.
        norm: of all norms of the layer, with its epsilon. norms: where they stand.
        feed_forward: what every token goes through; None where there are experts and nothing else.
        experts: what is added to that; None where there are none.
        residual_scale: what a sublayer's output is multiplied by before it is added to the residual.
    """

    name: str
    attention: Attention
    feed_forward: FeedForward | None
    experts: Experts | None
    block: Block
    norm: Norm
    norm_eps: float
    norms: NormPlaces
    residual_scale: float


@dataclass(frozen=True)
class Kind:
    """What the layers of one kind have of their own in a model that has several; everything else is the model's.

    Attributes:
        name: as the pattern has it. window, rotation: as in `Attention`.
        experts: whether its feed-forward is the model's experts, where the model has such.
    """

    name: str
    window: int = 0
    rotation: Rotation | None = None
    experts: bool = True


@dataclass(frozen=True)
class Run:
    """Layers that follow each other: those of `kinds`, by their numbers, in order, `repeats` times.

    Attributes:
        first: the number of its first layer.
    """

    first: int
    kinds: tuple[int, ...]
    repeats: int

    @property
    def num_layers(self) -> int:
        return len(self.kinds) * self.repeats


def runs_of(num_layers: int, prefix: Sequence[int], period: Sequence[int]) -> tuple[Run, ...]:
    """The runs of so many layers: the prefix, the period as often as it fits, and the beginning of another.

    Equal layers side by side are one run, so that a prefix of many costs a program no more than one.
    """
    prefix = prefix[:num_layers]
    repeats, rest = divmod(num_layers - len(prefix), len(period))
    runs = _equal_neighbours(prefix, 0)
    if repeats:
        runs.append(Run(len(prefix), tuple(period), repeats))
    return (*runs, *_equal_neighbours(period[:rest], num_layers - rest))


def _equal_neighbours(kinds: Sequence[int], first: int) -> list[Run]:
    found = []
    for kind, group in itertools.groupby(kinds):
        count = len(list(group))
        found.append(Run(first, (kind,), count))
        first += count
    return found


def pattern_of(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prefix and period of layers that are listed one by one: those with the fewest layers, and among them the shortest prefix."""
    starts = [0, *(place for place in range(1, len(names)) if names[place] != names[place - 1])]
    prefix, period = 0, len(names)
    for start in starts:
        if start + 1 >= prefix + period:
            break
        repeating = _least_period(names[start:])
        if start + repeating < prefix + period:
            prefix, period = start, repeating
    return tuple(names[:prefix]), tuple(names[prefix : prefix + period])


def _least_period(names: Sequence[str]) -> int:
    """After how many names they repeat, as far as they go: the length less that of the longest proper border."""
    border = [0] * len(names)
    for place in range(1, len(names)):
        length = border[place - 1]
        while length and names[place] != names[length]:
            length = border[length - 1]
        border[place] = length + (names[place] == names[length])
    return len(names) - border[-1]


def unknown_kinds(names: Sequence[str], *orders: Sequence[str]) -> list[str]:
    """An offence for every name in a prefix or a pattern that none of the kinds has."""
    used = sorted({name for order in orders for name in order if name not in names})
    return [f"{name} is no kind of layer{nearest(name, names) or '; kinds: none'}" for name in used]
