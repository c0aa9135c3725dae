"""What is split how in one step: axes of every tensor, local sizes, and the share of each that is useful.

`StepShape` is the step's padded shape, `StepSplit` the roles of a layout worked out for it. Everything that makes ledger entries reads
from `StepSplit` and contains no case for any layout. Axes of size 1 are dropped here, once.
"""

from __future__ import annotations

from dataclasses import dataclass

from partinf.cost.movement import Axes, Group, Moved, Split, moves, ways
from partinf.cost.pricing import Pricing
from partinf.cost.program import Residual
from partinf.foundation.limits import NEVER
from partinf.foundation.paging import table_pages
from partinf.foundation.rounding import ceil_div
from partinf.layout import AttentionRole, Layout, Phase, Role, kv_head_axes
from partinf.model.config import ModelConfig
from partinf.workload import DType


@dataclass(frozen=True)
class StepShape:
    """The padded shape of one step, and how much of it is real.

    Attributes:
        decode_rows: decode lanes, each with one token. decode_context: keys that each lane reads.
        prefill_tokens: prompt tokens, flat. prefill_slots: prompts (or chunks) that share them evenly.
        prefill_context: keys of earlier context that each slot reads.
        page_size: of the pages in whose tables those keys stand, where these are padded; 0 for keys without padding.
        real_rows, real_tokens, real_slots: how many of them are not padding; None for all.
        real_context: keys of a lane that are not masked; None for all. allocated: positions that a lane holds, filled or not; None for
            those that it reads.
        sampling: the program can sample; False for greedy selection alone.
        extended: its rows use all of extended sampling. constrained: and have masks.
    """

    decode_rows: int = 0
    decode_context: int = 0
    prefill_tokens: int = 0
    prefill_slots: int = 0
    prefill_context: int = 0
    page_size: int = 0
    real_rows: int | None = None
    real_tokens: int | None = None
    real_slots: int | None = None
    real_context: int | None = None
    allocated: int | None = None
    sampling: bool = False
    extended: bool = False
    constrained: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the linear layers, padding included."""
        return self.decode_rows + self.prefill_tokens

    @property
    def num_real_tokens(self) -> int:
        rows = self.decode_rows if self.real_rows is None else self.real_rows
        return rows + (self.prefill_tokens if self.real_tokens is None else self.real_tokens)

    @property
    def useful(self) -> float:
        """Share of the tokens of the linear layers that are real."""
        return self.num_real_tokens / max(self.num_tokens, 1)


@dataclass(frozen=True)
class Shares:
    """Shares of padded dimensions that the architecture itself has (1 where nothing is padded)."""

    heads: float = 1.0
    ffn: float = 1.0
    embed: float = 1.0


def gathers_behind(pricing: Pricing, model: ModelConfig, ahead: bool) -> bool:
    """Whether gathers of weights run behind products: those that are issued ahead, and all of a parallel block's in the program that TPUs
    run, whose compiler gathers for later products during earlier ones (`experiments/palm_540b_on_64_v4`)."""
    program = pricing.program
    overlaps = program.gathers_overlap and pricing.slice.chip.platform.gathers_overlap_products
    return program.looped or ahead or (overlaps and model.block.parallel)


class StepSplit:
    """The roles of a layout worked out for one step.

    Attributes:
        e_stored, f_stored: axes that split E, and F and query heads, in the stored weights. kv_stored: those of f that split K.
        e, f, kv: what is left of them after gathering. w: e and f. between: those of w that split E of the activations between sublayers.
        whole: those are e alone (`Phase.whole`, `Residual.WHOLE`).
        t: axes that split tokens in the linear layers. replica, gathered: the two kinds of t. ahead: the phase gathers weights ahead.
        stages: axes that split the layers, into num_stages. model: what one stage has of the model, and its padded dimensions.
        phase: whose roles the step runs.
        act_bytes, weight_bytes, kv_bytes: bytes per element of activations, weights and cache. act_dtype: name of the first.
    """

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        phase: Phase,
        shape: StepShape,
        pricing: Pricing,
        weights: DType,
        kv: DType,
        shares: Shares,
    ) -> None:
        """
        Args:
            model: the whole of it, with padded dimensions, if any. phase: whose FFN roles the step runs.
            shares: useful part of padded dimensions.
        """
        self.shape, self.shares, self.phase = shape, shares, phase
        self.sizes = pricing.slice.axis_sizes
        keep = self._nontrivial
        self.stages = keep(layout.storage_axes(Role.STAGE))
        self.num_stages = self.ways(self.stages)
        self.model = model.of_stage(self.num_stages)
        self.e_stored, self.f_stored = keep(layout.storage_axes(Role.EMBED)), keep(layout.storage_axes(Role.FFN))
        self.replica = keep(layout.storage_axes(Role.REPLICA))
        self.t = keep(layout.token_axes(phase))
        self.gathered, self.ahead = tuple(axis for axis in self.t if axis not in self.replica), phase.ahead
        self.e = tuple(axis for axis in self.e_stored if axis not in self.gathered)
        self.f = tuple(axis for axis in self.f_stored if axis not in self.gathered)
        self.w, self.w_stored = self.e + self.f, self.e_stored + self.f_stored
        self.whole = phase.whole or pricing.program.residual is Residual.WHOLE
        self.between = self.e if self.whole else self.w
        self.act_dtype = weights.activations
        self.pricing = pricing.of_types(weights, self.act_dtype)
        self.weight_dtype = weights
        self.act_bytes = self.act_dtype.num_bytes
        self.weight_bytes, self.kv_bytes = weights.num_bytes, kv.num_bytes
        self._attend(layout)

    def with_attention(self, layout: Layout) -> StepSplit:
        """The same under a layout that differs in attention roles alone."""
        found = object.__new__(StepSplit)
        found.__dict__.update(self.__dict__)
        found._attend(layout)
        return found

    def with_experts(self, layout: Layout, phase: Phase) -> StepSplit:
        """The same under a layout and a phase that differ in what they say of experts alone."""
        found = object.__new__(StepSplit)
        found.__dict__.update(self.__dict__, layout=layout, phase=phase)
        return found

    def with_shape(self, shape: StepShape) -> StepSplit:
        """The same roles in a step of another shape."""
        found = object.__new__(StepSplit)
        found.__dict__.update(self.__dict__, shape=shape)
        return found

    def with_whole_residual(self) -> StepSplit:
        """The same where what passes between sublayers is whole (`Phase.whole`)."""
        found = object.__new__(StepSplit)
        found.__dict__.update(self.__dict__, whole=True, between=self.e)
        return found

    def _attend(self, layout: Layout) -> None:
        self.layout = layout
        self.kv_digits = self._nontrivial(kv_head_axes(layout, self.sizes, self.model.num_kv_heads))
        self.kv_stored = tuple(axis for axis in self.kv_digits if axis in self.f_stored)
        self.kv = tuple(axis for axis in self.kv_digits if axis in self.f)
        self.decode, self.prefill = self._group(layout.decode), self._group(layout.prefill)

    def moves(self, elements: int, source: Split, target: Split) -> tuple[Moved, ...]:
        """The collectives that bring a tensor from one split to another, as this program does it."""
        known, key = self.pricing.known_moves, (elements, source, target)
        found = known.get(key)
        if found is None:
            found = known[key] = tuple(moves(elements, source, target, self.sizes, self.looped, self.pricing.slice.scatter_order))
        return found

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """The windows of the layers and how many have each. A layer without one has a window without end, and so have all in a program
        that masks what lies outside instead of skipping it, where no page tables leave it out."""
        if not self.pricing.program.skips_windows and not self.shape.page_size:
            return ((NEVER, self.model.num_layers),)
        return self.model.windows

    def decode_keys(self, context: int, window: int) -> int:
        """Keys that a lane with so much context is computed with: those of its window, or all in its page table where a program masks."""
        if self.pricing.program.skips_windows:
            return min(context, window)
        ways = self.ways(self.decode.sequence)
        return self._of_table(context, window, window, ways)

    def earlier_keys(self, window: int, moved: bool = False) -> int:
        """Keys of earlier context that a slot's tokens are computed with, likewise.

        Args:
            moved: those that are brought to where they are needed: all in the page table in every program.
        """
        context = self.shape.prefill_context
        if self.pricing.program.skips_windows and not moved:
            return min(context, window)
        multiple = self.ways(tuple({*self.decode.sequence, *self.prefill.sequence}))
        return self._of_table(context, window, window - 1, multiple)

    def _of_table(self, context: int, window: int, positions: int, multiple: int) -> int:
        size, ways = self.shape.page_size, self.ways(self.decode.sequence)
        if window == NEVER:
            return context
        if not size:
            return min(context, positions)
        return min(context, table_pages(positions, size, ways, multiple) * size)

    @property
    def looped(self) -> bool:
        """Whether the program is the paper's; see `Program`."""
        return self.pricing.program.looped

    @property
    def gathers_behind(self) -> bool:
        """Whether gathers of weights run behind products."""
        return gathers_behind(self.pricing, self.model, self.ahead)

    @property
    def parallel(self) -> bool:
        return self.model.block.parallel

    @property
    def wide_dtype(self) -> DType:
        """Of activations between int8 weights' scales: into the second matrices and out of them."""
        return DType.F32 if self.looped and self.weight_dtype is DType.INT8 else self.act_dtype

    @property
    def logit_cols(self) -> Axes:
        """The axes over which E is split in the product that makes logits."""
        if self.looped or self.pricing.program.residual is Residual.WHOLE:
            return self.e_stored
        return self.w_stored if self.model.tied_embeddings else ()

    def ways(self, axes: Axes) -> int:
        return ways(axes, self.sizes)

    @property
    def local_tokens(self) -> int:
        """Tokens of the linear layers on one device."""
        return ceil_div(self.shape.num_tokens, self.ways(self.t))

    @property
    def q_projected(self) -> Split:
        """Queries as their way to the core begins: [T.t, H.f, Q] {e unreduced}; in a looped program [T.t, H.fe, Q]."""
        return Split(self.t, self.f + self.e) if self.looped else Split(self.t, self.f, self.e)

    @property
    def heads_wanted(self) -> Split:
        """The heads' output as its way from the core ends."""
        return Split(self.t, self.f + self.e) if self.looped else Split(self.t, self.f)

    @property
    def kv_projected(self) -> Split:
        """Keys and values as projected: [T.t, 2, K.kv, Q] {e unreduced}."""
        return Split(self.t, self.kv, self.e)

    def _nontrivial(self, axes: Axes) -> Axes:
        return tuple(axis for axis in axes if self.sizes[axis] > 1)

    def _group(self, phase: Phase) -> Group:
        known, key = self.pricing.known_groups, (phase.attention, self.kv_digits)
        found = known.get(key)
        if found is None:
            roles = (AttentionRole.BATCH, AttentionRole.HEADS, AttentionRole.SEQUENCE)
            batch, heads, sequence = (self._nontrivial(phase.attention_axes(role)) for role in roles)
            found = known[key] = Group(batch, heads, tuple(a for a in self.kv_digits if a in heads), sequence)
        return found
