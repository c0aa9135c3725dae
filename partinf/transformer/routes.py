"""Which mesh axes split what at each point of one step: the roles of a plan worked out for one bucket.

`Routes` is computed once per bucket from plain data and holds nothing but axis names and frames; attention, FFN and sampling ask it for
the split before and after each `move` and contain no case for any layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from partinf.layout import AttentionRole, Dispatch, ExpertRole, Phase, Role
from partinf.model.kinds import LayerKind, Run
from partinf.partition.collectives import Axes, Frame, Split
from partinf.plans import Bucket, Plan, head_axes, kv_head_axes


@dataclass(frozen=True)
class Group:
    """The attention state of one token group.

    Attributes:
        batch: axes that split whole requests. heads: axes that split the query heads. sequence: axes that split the keys
            of each request.
        kv: axes among `heads` that split the key-value heads too.
        order: digits of the group's token dimension: the batch axes, then other axes that split tokens in the linear layers, those that
            hold copies of the weights first, so that these split the same rows whatever a phase gathers.
    """

    batch: Axes
    heads: Axes
    sequence: Axes
    kv: Axes
    order: Axes


@dataclass(frozen=True)
class ExpertAxes:
    """What splits experts' matrices and the rows that they multiply, without axes of size 1.

    Attributes:
        tokens: τ, that split the rows where they are routed: all that split no matrix, and those of `exchanged`.
        exchanged: that split tokens and experts, along which rows travel to their experts (`Dispatch.EXCHANGE`).
        experts, ffn, embed: X, f and e, that still split the experts, and the d_ff and d_model of each, after gathering.
        experts_stored, ffn_stored, embed_stored: the same in the stored matrices.
        rows: digits of the rows on their way to the experts and back: those that are gathered, those that always split them, and those
            that split them for the experts alone.
        hidden: digits of F. embed_digits: of E of what experts add up.
        in_order: whether these are the digits of E between sublayers too, as far as both are split.
    """

    tokens: Axes
    exchanged: Axes
    experts: Axes
    ffn: Axes
    embed: Axes
    experts_stored: Axes
    ffn_stored: Axes
    embed_stored: Axes
    rows: Axes
    hidden: Axes
    embed_digits: Axes
    in_order: bool


@dataclass(frozen=True)
class Routes:
    """Axes and splits of one bucket under one plan.

    Attributes:
        plain: attention is the plain twin, which gathers all context and masks.
        live: [T] which tokens of the step are no padding, where products ask (`linear.live_tokens`).
    """

    plan: Plan
    bucket: Bucket
    plain: bool = False
    live: Any = None

    @cached_property
    def phase(self) -> Phase:
        return self.plan.ffn_phase(self.bucket.num_tokens)

    @cached_property
    def sizes(self) -> dict[str, int]:
        return self.plan.axis_sizes

    def ways(self, axes: Axes) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    # What splits weights and activations in the linear layers.

    @cached_property
    def embed_stored(self) -> Axes:
        return self.plan.layout.storage_axes(Role.EMBED)

    @cached_property
    def ffn_stored(self) -> Axes:
        return self.plan.layout.storage_axes(Role.FFN)

    @cached_property
    def embed(self) -> Axes:
        """e: axes that still split E in the weights after gathering."""
        return tuple(axis for axis in self.embed_stored if axis not in self.phase.gather)

    @cached_property
    def ffn(self) -> Axes:
        """f: axes that still split F and the query heads after gathering."""
        return tuple(axis for axis in self.ffn_stored if axis not in self.phase.gather)

    @cached_property
    def weight(self) -> Axes:
        """w: e, then f."""
        return self.embed + self.ffn

    @cached_property
    def between(self) -> Axes:
        """Axes that split E of the activations between sublayers: those of w, or e alone where the phase keeps them whole otherwise."""
        return self.embed if self.phase.whole else self.weight

    @cached_property
    def weight_stored(self) -> Axes:
        return self.plan.layout.weight_axes

    @cached_property
    def logit_cols(self) -> Axes:
        """Axes that split E in the product that makes logits: those of the table where tokens are looked up in it, none of another."""
        return self.weight_stored if self.plan.model.tied_embeddings else ()

    @cached_property
    def tokens(self) -> Axes:
        """t: axes that split the tokens in the linear layers."""
        return self.plan.layout.token_axes(self.phase)

    @cached_property
    def replica(self) -> Axes:
        return self.plan.layout.storage_axes(Role.REPLICA)

    @cached_property
    def stages(self) -> Axes:
        """Axes that split the layers, without those of size 1."""
        return tuple(axis for axis in self.plan.stage_axes if self.sizes[axis] > 1)

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers as contexts of this plan see them: a window that holds the longest of them is none."""
        kinds, longest = self.plan.model.layer_kinds, self.plan.max_len
        seen = (replace(kind.attention, window=kind.attention.window if kind.attention.window < longest else 0) for kind in kinds)
        return tuple(replace(kind, attention=attention) for kind, attention in zip(kinds, seen, strict=True))

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """By kind, the group of the cache in which its layers lie."""
        windows = [group.window for group in self.plan.cache_groups]
        return tuple(windows.index(kind.attention.window) for kind in self.kinds)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """By layer of a stage, which of its group's layers it is: the same in all stages."""
        per_stage = self.plan.model.num_layers // self.ways(self.stages)
        place = {layer: place for group in self.plan.cache_groups for place, layer in enumerate(group.layers)}
        return tuple(place[layer] for layer in range(per_stage))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The layers of one stage, which are of the same kinds in all stages."""
        return self.plan.model.of_stage(self.ways(self.stages)).runs

    @cached_property
    def experts(self) -> ExpertAxes:
        """What splits the experts in this phase, and the rows that come to them."""
        layout, dense = self.plan.layout, self._nontrivial(self.weight_stored)
        roles = (ExpertRole.EXPERT, ExpertRole.FFN, ExpertRole.EMBED)
        experts_stored, ffn_stored, embed_stored = (self._nontrivial(layout.expert_axes(role)) for role in roles)
        experts, ffn, embed = (self._nontrivial(layout.expert_splits(self.phase, role)) for role in roles)
        here, exchanges = self._nontrivial(self.tokens), self.phase.dispatch is Dispatch.EXCHANGE
        exchanged = tuple(a for a in here if a in experts) if exchanges else ()
        tokens = tuple(a for a in layout.axes if a in self._nontrivial(layout.expert_token_axes(self.phase)) + exchanged)
        gathered, always = tuple(a for a in here if a not in tokens), tuple(a for a in here if a in tokens)
        rows = gathered + always + tuple(a for a in tokens if a not in here)
        digits = embed_stored + tuple(a for a in dense if a not in embed_stored) if embed else dense
        in_order = digits == dense + tuple(a for a in digits if a not in dense)
        return ExpertAxes(
            tokens, exchanged, experts, ffn, embed, experts_stored, ffn_stored, embed_stored,
            rows, ffn_stored + embed_stored, digits, in_order,
        )  # fmt: skip

    def _nontrivial(self, axes: Axes) -> Axes:
        """Those of size > 1."""
        return tuple(axis for axis in axes if self.sizes[axis] > 1)

    # Digit orders.

    @cached_property
    def head_digits(self) -> Axes:
        return head_axes(self.plan.layout)

    @cached_property
    def kv_digits(self) -> Axes:
        return kv_head_axes(self.plan.layout, self.sizes, self.plan.padded_model.num_kv_heads)

    @cached_property
    def hidden_digits(self) -> Axes:
        return self.ffn_stored + self.embed_stored

    def frame(self, rows: Axes, cols: Axes, row_dim: int = 0, col_dim: int = 1) -> Frame:
        return Frame(rows, cols, self.sizes, row_dim, col_dim, self.plan.slice.scatter_order)

    # Token groups.

    @cached_property
    def decode(self) -> Group:
        return self._group(self.plan.layout.decode)

    @cached_property
    def prefill(self) -> Group:
        return self._group(self.plan.layout.prefill)

    def _group(self, phase: Phase) -> Group:
        batch, heads, sequence = map(phase.attention_axes, (AttentionRole.BATCH, AttentionRole.HEADS, AttentionRole.SEQUENCE))
        gathered = tuple(axis for axis in self.tokens if axis not in self.replica)
        others = tuple(axis for axis in self.replica + gathered if axis not in batch)
        return Group(batch, heads, sequence, tuple(axis for axis in self.kv_digits if axis in heads), batch + others)

    @cached_property
    def shared_batch(self) -> Axes:
        """Batch axes of both groups: a prompt's tokens lie on the shard of these axes that owns its pages."""
        return tuple(axis for axis in self.decode.batch if axis in self.prefill.batch)

    @cached_property
    def sequence_here(self) -> Axes:
        """Axes that split the pages of a sequence in the cache, over which prompt tokens attend to them in place."""
        return tuple(axis for axis in self.decode.sequence if axis in self.prefill.sequence)

    @cached_property
    def sequence_away(self) -> Axes:
        """The other axes that split the pages of a sequence: prompt tokens need the pages of all devices along them."""
        return tuple(axis for axis in self.decode.sequence if axis not in self.prefill.sequence and self.sizes[axis] > 1)

    @cached_property
    def kv_cached(self) -> Split:
        """Keys and values of prefill's slots in the cache, apart from the axes that split pages: right on the owner over the batch axes
        that only decode has, zero elsewhere."""
        only_owners = tuple(axis for axis in self.decode.batch if axis not in self.shared_batch)
        return Split(self.shared_batch, self.decode.kv, only_owners)

    @cached_property
    def q_projected(self) -> Split:
        """Queries as projected: [T.t, H.f, Q] {e unreduced}."""
        return Split(self.tokens, self.ffn, self.embed)

    @cached_property
    def kv_projected(self) -> Split:
        """Keys and values as projected: [T.t, 2, K.kf, Q] {e unreduced}, kf the axes of f that divide K."""
        return Split(self.tokens, tuple(axis for axis in self.kv_digits if axis in self.ffn), self.embed)

    def kv_choice(self, group: Group) -> tuple[np.ndarray, int] | None:
        """Which local key-value heads this device's query heads read, where that is not simply equal runs in order.

        Returns:
            None when query head i reads key-value head i // (local H / local K); otherwise a table [ways of group.heads, chosen]
            of local key-value heads, one row per coordinate along `group.heads` (major first), and nothing else is read: query head
            i then reads chosen head i // (local H / chosen).
        """
        model, axes = self.plan.padded_model, tuple(axis for axis in group.heads if self.sizes[axis] > 1)
        per_device = [self._kv_of_queries(group, axes, index) for index in np.ndindex(*(self.sizes[axis] for axis in axes))]
        local_queries, local_kv = per_device[0].size, model.num_kv_heads // self.ways(group.kv)
        plain = np.arange(local_queries) // max(local_queries // local_kv, 1)
        if local_queries % local_kv == 0 and all((row == plain).all() for row in per_device):
            return None
        chosen = [np.unique(row) for row in per_device]
        counts = {len(row) for row in chosen}
        if len(counts) == 1 and local_queries % len(chosen[0]) == 0:
            run = local_queries // len(chosen[0])
            if all((row == np.repeat(few, run)).all() for row, few in zip(per_device, chosen, strict=True)):
                return np.stack(chosen), len(chosen[0])
        return np.stack(per_device), local_queries

    def real_heads(self, queries: bool, split: Axes) -> np.ndarray | None:
        """Which query heads, or key-value heads, the devices along `split` hold that are the model's own: [ways of split, heads], major
        axis first; None where no head is padding."""
        own, padded, axes = self.plan.model, self.plan.padded_model, self._nontrivial(split)
        if own.num_heads == padded.num_heads:
            return None
        each, real = (padded.queries_per_kv_head, own.queries_per_kv_head) if queries else (1, 1)
        count, digits = (padded.num_heads, self.head_digits) if queries else (padded.num_kv_heads, self.kv_digits)
        held = (_held(count, digits, dict(zip(axes, at, strict=True)), self.sizes) for at in np.ndindex(*(self.sizes[a] for a in axes)))
        return np.stack([(heads // each < own.num_kv_heads) & (heads % each < real) for heads in held])

    def _kv_of_queries(self, group: Group, axes: Axes, index: tuple[int, ...]) -> np.ndarray:
        """Local key-value head of each local query head of the device at `index` along `axes`."""
        model, at = self.plan.padded_model, dict(zip(axes, index, strict=True))
        queries = _held(model.num_heads, self.head_digits, {a: i for a, i in at.items() if a in group.heads}, self.sizes)
        kv = _held(model.num_kv_heads, self.kv_digits, {a: i for a, i in at.items() if a in group.kv}, self.sizes)
        return np.searchsorted(kv, queries // model.queries_per_kv_head)


def _held(length: int, digits: Axes, at: dict[str, int], sizes: dict[str, int]) -> np.ndarray:
    """Which of `length` entries the device at coordinates `at` holds, when those axes split a dimension with these digits."""
    entries, rest, keep = np.arange(length), length, np.ones(length, bool)
    for axis in digits:
        rest //= sizes[axis]
        if axis in at:
            keep &= entries // rest % sizes[axis] == at[axis]
    return entries[keep]
