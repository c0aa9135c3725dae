"""`Plan`: a layout bound to a model and a slice, checked, with everything that is fixed before a device is touched.

Binding finds all offences at once: roles for axes that the slice lacks, dimensions that do not divide (with the sizes that would and
what padding would cost). Everything that runs, proves or prices a model takes a `Plan`.

The module is called `plans` because `partinf.plan` is the library's function that makes one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.foundation.limits import NEVER
from partinf.foundation.paging import PAGE_SIZE, table_pages
from partinf.foundation.rounding import round_up
from partinf.hardware.slices import DCN_AXIS, Slice
from partinf.layout import PHASES, AttentionRole, Dispatch, ExpertRole, Layout, Phase, Role, letter_axes, readable_name
from partinf.layout import head_axes as head_axes
from partinf.layout import kv_head_axes as kv_head_axes
from partinf.model.config import ModelConfig
from partinf.model.weights import layer_params
from partinf.workload import DType

if TYPE_CHECKING:
    from partinf.cost.ledger import Ledger


@dataclass(frozen=True)
class Bucket:
    """The padded shapes of one compiled step.

    Attributes:
        decode_rows: decode lanes, in equal blocks per shard of decode's batch axes.
        decode_pages: KV pages that each lane may read.
        prefill_tokens: flat prompt tokens. prefill_slots: prompts (or chunks of them) that share those tokens.
        prefill_pages: pages of earlier context that each slot may read; 0 when every prompt begins in this step.
        random: whether the program can sample, when some row of a step wants it; False compiles greedy selection alone.
        extended: whether it supports extended sampling: penalties, logit biases, top log-probabilities, log-probabilities of prompts. A
            step in which no request uses them skips this work at run time.
        constrained: whether rows may be held to a mask of tokens; likewise skipped where none is.
    """

    decode_rows: int = 0
    decode_pages: int = 0
    prefill_tokens: int = 0
    prefill_slots: int = 0
    prefill_pages: int = 0
    random: bool = False
    extended: bool = False
    constrained: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that the linear layers of this step process, padding included."""
        return self.decode_rows + self.prefill_tokens

    def holds(self, other: Bucket) -> bool:
        """Whether what fits the other fits this one too."""
        return (
            self.decode_rows >= other.decode_rows
            and self.decode_pages >= other.decode_pages
            and self.prefill_tokens >= other.prefill_tokens
            and self.prefill_slots >= other.prefill_slots
            and self.prefill_pages >= other.prefill_pages
            and self.random >= other.random
            and self.extended >= other.extended
            and self.constrained >= other.constrained
        )

    def __str__(self) -> str:
        parts = []
        if self.decode_rows:
            parts.append(f"decode {self.decode_rows} × {self.decode_pages} pages")
        if self.prefill_tokens:
            parts.append(f"prefill {self.prefill_tokens} in {self.prefill_slots} slots, {self.prefill_pages} pages before")
        kinds = ("sampling" if self.random else "greedy", "extended" if self.extended else "", "constrained" if self.constrained else "")
        return ", ".join(["; ".join(parts), *filter(None, kinds)])


@dataclass(frozen=True)
class CacheConfig:
    """Sizes of the paged KV cache.

    Attributes:
        page_size: tokens per page.
        pages_per_shard: pages owned by each shard of decode's batch axes, split evenly over the sequence axes within it; of the first
            group of the cache.
        num_slots: sequences that may be resident (each has a slot for its last sampled token).
        other_pages: the same of every further group (`Plan.cache_groups`); empty for as many as of the first.
    """

    page_size: int = PAGE_SIZE
    pages_per_shard: int = 64
    num_slots: int = 32
    other_pages: tuple[int, ...] = ()


@dataclass(frozen=True)
class CacheGroup:
    """What layers keep together: their keys and values lie on the same pages.

    Attributes:
        window: positions that a query sees, the latest ones, its own included; 0 for all. layers: their numbers, in order.
        pages_per_shard: as in `CacheConfig`.
    """

    window: int
    layers: tuple[int, ...]
    pages_per_shard: int

    def columns(self, pages: int, plan: Plan) -> int:
        """Columns of a lane's page table in a bucket whose lanes read so many pages."""
        if not self.window:
            return pages
        return min(pages, table_pages(self.window, plan.cache.page_size, plan.num_sequence_shards, plan.num_sequence_shards))

    def earlier_columns(self, pages: int, plan: Plan) -> int:
        """Columns of a prompt's table of earlier context in a bucket that reads so many pages of it."""
        if not self.window:
            return pages
        return min(pages, table_pages(self.window - 1, plan.cache.page_size, plan.num_sequence_shards, plan.prefill_page_multiple()))


@dataclass(frozen=True)
class Plan:
    """A layout bound to a model and a slice.

    Attributes:
        weights, kv: storage types. Activations are bf16 unless the weights are f32.
        max_len: longest context that is served, in tokens.
        prefill_from_tokens: a step with at least this many tokens runs the FFN roles of the prefill phase.
        padded_heads: query heads with padding, where the layout splits them into more parts than divide them; 0 for no padding.
        predicted: phase name → priced ledger of the workload for which the plan was made; empty for a plan made by hand.
        note: one sentence on why this layout, for the reader.
        buckets: the padded shapes that are compiled before serving, see `partinf.buckets.with_capacity`.
    """

    model: ModelConfig
    slice: Slice
    layout: Layout
    weights: DType = DType.BF16
    kv: DType = DType.BF16
    max_len: int = 2048
    cache: CacheConfig = field(default_factory=CacheConfig)
    prefill_from_tokens: int = NEVER
    predicted: tuple[tuple[str, Ledger], ...] = ()
    note: str = ""
    padded_heads: int = 0
    buckets: tuple[Bucket, ...] = ()

    def __post_init__(self) -> None:
        raise_offences(layout_offences(self.model, self.slice, self.layout, self.padded_heads) + self._bucket_offences())

    def __repr__(self) -> str:
        """One line for the reader; `as_dict` has everything."""
        where, how = f"{self.slice.name} ({self.slice.mesh})", readable_name(self.layout, self.axis_sizes)
        stored = f"weights {self.weights}, KV {self.kv}, contexts to {self.max_len:,} tokens"
        return f"<Plan of {self.model.name} on {where}: {how}; {stored}, {len(self.buckets)} steps>"

    def as_dict(self, *without: str) -> dict[str, object]:
        """Its fields by name but these; the representation of the result tells any two plans apart."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in without}

    @property
    def padded_model(self) -> ModelConfig:
        """The architecture with the padded number of heads: what is stored and computed."""
        return self.model.with_padded_heads(self.padded_heads)

    @cached_property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """The groups of the cache, by what layers keep of contexts of at most `max_len` positions: all of them first, then the windows, the
        longest first.

        Raises:
            InvalidInput: pages of other groups than there are.
        """
        windows = [window for window, _ in self.model.kept_windows(self.max_len)]
        pages = (self.cache.pages_per_shard, *(self.cache.other_pages or (self.cache.pages_per_shard,) * (len(windows) - 1)))
        if len(pages) != len(windows):
            raise InvalidInput(f"cache: pages of {len(pages)} groups; {self.model.name} has {len(windows)} in contexts of {self.max_len}")
        kept = [self.model.layer_kinds[kind].attention.window for kind in self.model.kind_of_layers]
        kept = [window if window < self.max_len else 0 for window in kept]
        layers = [tuple(layer for layer, window in enumerate(kept) if window == own) for own in windows]
        return tuple(map(CacheGroup, windows, layers, pages))

    @property
    def runnable(self) -> str | None:
        """None when the library can run this plan; otherwise what is missing."""
        if self.padded_heads in (0, self.model.num_heads) or self.model.num_kv_heads in (1, self.model.num_heads):
            return None
        return f"heads in groups, padded from {self.model.num_heads} to {self.padded_heads}"

    @property
    def axis_sizes(self) -> dict[str, int]:
        return self.slice.axis_sizes

    @property
    def extended(self) -> bool:
        """Whether penalty counts and logit biases of every slot are stored on the devices, because some bucket needs them."""
        return any(bucket.extended for bucket in self.buckets)

    @property
    def constrained(self) -> bool:
        """Whether masks of tokens of every slot are stored on the devices, because some bucket reads them."""
        return any(bucket.constrained for bucket in self.buckets)

    def ways(self, axes: tuple[str, ...]) -> int:
        """Product of the sizes of these axes."""
        return math.prod(self.axis_sizes[axis] for axis in axes)

    @property
    def stage_axes(self) -> tuple[str, ...]:
        """The axes that split the layers, in mesh order."""
        return self.layout.storage_axes(Role.STAGE)

    @property
    def letter_axes(self) -> dict[str, tuple[str, ...]]:
        """The mesh axes that split each letter of a stored parameter or of the cache (`partinf.layout.letter_axes`)."""
        return letter_axes(self.layout, self.axis_sizes, self.padded_model.num_kv_heads)

    @property
    def num_stages(self) -> int:
        """Pipeline stages: so many batches are in flight, each one tick behind the one before."""
        return self.ways(self.stage_axes)

    @property
    def unrolled(self) -> bool:
        """Whether its layers are compiled one by one: what an engine compiles by default, and what steps are priced as."""
        return self.slice.chip.platform.unrolls(self.model.num_layers * max(len(self.buckets), 1), self.num_stages)

    @property
    def carried_rows(self) -> tuple[int, int]:
        """Decode rows and prompt tokens of the activations that pass from stage to stage: those of all buckets."""
        if self.num_stages == 1:
            return 0, 0
        buckets = self.buckets or (Bucket(),)
        return max(bucket.decode_rows for bucket in buckets), max(bucket.prefill_tokens for bucket in buckets)

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The axes that split decode lanes and KV pages into shards, in mesh order."""
        return self.layout.decode.attention_axes(AttentionRole.BATCH)

    @property
    def sequence_axes(self) -> tuple[str, ...]:
        """The axes that split the pages of one sequence, in mesh order."""
        return self.layout.decode.attention_axes(AttentionRole.SEQUENCE)

    @property
    def page_axes(self) -> tuple[str, ...]:
        """The axes that split the pages of the cache: those that split whole sequences, then those that split the pages of one."""
        return self.batch_axes + self.sequence_axes

    @property
    def num_shards(self) -> int:
        """Owners of sequences: the number of shards of the batch axes."""
        return self.ways(self.batch_axes)

    @property
    def num_sequence_shards(self) -> int:
        """Ways in which sequence axes split the pages of a shard, round-robin: page i of a sequence is on sequence shard i modulo this."""
        return self.ways(self.sequence_axes)

    def ffn_phase(self, num_tokens: int) -> Phase:
        """The FFN roles of a step with this many (padded) tokens."""
        return self.layout.prefill if num_tokens >= self.prefill_from_tokens else self.layout.decode

    def decode_row_multiple(self, *phases: Phase) -> int:
        """Decode rows of a bucket must be a multiple of this: every axis that splits lanes, or tokens in these FFN phases (in both, if
        none is given)."""
        return self._multiple(self.batch_axes, phases)

    def decode_rows(self, num_sequences: int) -> int:
        """Rows of a step that decodes so many sequences and does nothing else, with padding: axes that only prefill gathers do not split
        its tokens. In a pipeline every step has the rows of the others."""
        multiple = self.decode_row_multiple(self.layout.decode)
        rows = round_up(num_sequences, multiple)
        if self.num_stages == 1 and rows < self.prefill_from_tokens:
            return rows
        multiple = self.decode_row_multiple()
        return round_up(num_sequences, multiple)

    def prefill_slot_multiple(self) -> int:
        """Prefill slots of a bucket must be a multiple of this: the batch axes of prefill attention."""
        return self.ways(self.layout.prefill.attention_axes(AttentionRole.BATCH))

    def prefill_token_multiple(self) -> int:
        """Prefill tokens of a bucket must be a multiple of this."""
        prefill = self.layout.prefill
        return self._multiple(prefill.attention_axes(AttentionRole.BATCH) + prefill.attention_axes(AttentionRole.SEQUENCE))

    def prefill_page_multiple(self) -> int:
        """Pages of earlier context of a bucket must be a multiple of this: every axis that splits the context in either phase; pages
        that decode lanes read, and the pages of a shard, of `num_sequence_shards`."""
        return self.ways(tuple({*self.sequence_axes, *self.layout.prefill.attention_axes(AttentionRole.SEQUENCE)}))

    def _bucket_offences(self) -> list[str]:
        """A batch keeps its rows from stage to stage, whatever bucket each tick runs in."""
        if self.num_stages == 1:
            return []
        kinds = {
            "decode rows": {bucket.decode_rows for bucket in self.buckets},
            "prefill tokens": {bucket.prefill_tokens for bucket in self.buckets},
            "prefill slots": {bucket.prefill_slots for bucket in self.buckets},
        }
        return [
            f"buckets of {self.num_stages} stages: {', '.join(map(str, sorted(sizes - {0})))} {kind}; a batch passes through all stages in "
            "the same rows, so buckets may differ in pages, and in whether they have such rows at all"
            for kind, sizes in kinds.items()
            if len(sizes - {0}) > 1
        ]

    def _multiple(self, attention_axes: tuple[str, ...], phases: tuple[Phase, ...] = ()) -> int:
        split = {axis for phase in phases or map(self.layout.phase, PHASES) for axis in row_axes(self.model, self.layout, phase)}
        return self.ways(tuple(split | set(attention_axes)))


def row_axes(model: ModelConfig, layout: Layout, phase: Phase) -> tuple[str, ...]:
    """The axes that split tokens in this phase, in the linear layers or on their way to experts."""
    tokens = layout.token_axes(phase)
    if model.experts is None:
        return tokens
    return tokens + tuple(axis for axis in layout.expert_token_axes(phase) if axis not in tokens)


def layout_for(slice_: Slice, layout: Layout) -> Layout:
    """The roles of a layout for the axes of a slice, where those are others than the layout names.

    Axes of the layout are alike that have the same roles in storage and in both phases. Factors of a torus axis take its roles (`x0` and
    `x1` those of `x`), and axes that the layout does not know those of its last one, the innermost. Where that leaves out a kind of axes,
    the slice's axes take the kinds in the layout's order instead, the last kind all that are left.

    Raises:
        InvalidInput: fewer axes than the layout has kinds of, or a network between slices for which it has no role.
    """
    names = tuple(slice_.axis_sizes)
    if not set(names) ^ set(layout.axes):
        return layout
    if DCN_AXIS in names and DCN_AXIS not in layout.axes:
        missing = f"it has no role for axis {DCN_AXIS}, the network between the slices of {slice_.name}"
        raise InvalidInput(f"layout of axes {', '.join(layout.axes)}: {missing}; give one slice, or a layout file that names that axis")
    kinds: dict[object, list[str]] = {}
    for axis in layout.axes:
        kinds.setdefault(_roles_of(layout, axis), []).append(axis)
    takes = {axis.name: next((n for n in (axis.name, axis.torus) if n in layout.axes), layout.axes[-1]) for axis in slice_.axes}
    firsts = [axes[0] for axes in kinds.values()]
    if len({_roles_of(layout, axis) for axis in takes.values()}) < len(kinds):
        if len(names) < len(kinds):
            kind = " · ".join(" ".join(axes) for axes in kinds.values())
            example = "4x2 for 8 devices" if slice_.chip.torus_dims == 0 else "x0:2,x1:2,y:4 for 4x4 chips"
            raise InvalidInput(
                f"layout of {len(kinds)} kinds of axes ({kind}): it needs a mesh of at least as many axes, and {slice_.name} has "
                f"{len(names)} ({slice_.mesh}); give a slice that has more, or a mesh of factors such as {example}"
            )
        takes = {name: firsts[min(index, len(firsts) - 1)] for index, name in enumerate(names)}
    return _renamed(layout, takes)


def _roles_of(layout: Layout, axis: str) -> tuple[object, ...]:
    """All that a layout says of an axis."""
    phases = (layout.phase(label) for label in PHASES)
    by_phase = (
        (
            axis in p.gather,
            axis in p.gather_experts,
            dict(p.attention)[axis],
            p.loop if p.loop is not None and p.loop.axis == axis else None,
        )
        for p in phases
    )
    return (dict(layout.storage)[axis], layout.expert_roles[axis], *by_phase)


def _renamed(layout: Layout, takes: Mapping[str, str]) -> Layout:
    """The layout of other axes, by the axis whose roles each takes. What loops over an axis loops over the first that takes its roles."""

    def phase(of: Phase) -> Phase:
        attention = tuple((name, dict(of.attention)[axis]) for name, axis in takes.items())
        loop = of.loop
        if loop is not None:
            loop = replace(loop, axis=next((name for name, axis in takes.items() if axis == loop.axis), loop.axis))
        gather, gather_experts = (tuple(name for name, axis in takes.items() if axis in axes) for axes in (of.gather, of.gather_experts))
        return replace(of, gather=gather, attention=attention, loop=loop, gather_experts=gather_experts)

    storage = tuple((name, dict(layout.storage)[axis]) for name, axis in takes.items())
    experts = tuple((name, layout.expert_roles[axis]) for name, axis in takes.items()) if layout.experts else ()
    return Layout(storage, phase(layout.prefill), phase(layout.decode), experts=experts)


def layout_offences(model: ModelConfig, slice_: Slice, layout: Layout, padded_heads: int = 0) -> list[str]:
    """Everything that keeps this layout from holding this model on this slice; empty when it can be bound."""
    sizes = slice_.axis_sizes
    offences = [f"layout: axis '{axis}' is no axis of {slice_.name} ({slice_.mesh})" for axis in layout.axes if axis not in sizes]
    offences += [f"layout: axis '{axis}' of {slice_.name} has no role" for axis in sizes if axis not in layout.axes]
    offences += _needless(model, layout)
    if offences:
        return offences
    if padded_heads and (padded_heads < model.num_heads or padded_heads % model.kv_heads_with(padded_heads)):
        return [f"model {model.name}: {model.num_heads} query heads cannot be padded to {padded_heads} over {model.num_kv_heads} kv heads"]
    model = model.with_padded_heads(padded_heads)
    weight, ffn, heads = layout.weight_axes, layout.storage_axes(Role.FFN), head_axes(layout)
    embed_stays = any(set(layout.storage_axes(Role.EMBED)) - set(layout.phase(label).gather) for label in PHASES)
    hidden = ffn + layout.storage_axes(Role.EMBED) if embed_stays else ffn
    checks = (
        ("d_model E", model.embed_dim, weight, _params_per_unit(model, "E")),
        ("d_ff F", model.ffn_dim, hidden, _params_per_unit(model, "F")),
        ("query heads H", model.num_heads, heads, _params_per_unit(model, "H")),
        ("padded vocabulary V", model.padded_vocab_size, weight, _params_per_unit(model, "V")),
        ("layers N", model.num_layers, layout.storage_axes(Role.STAGE), layer_params(model)),
        *_expert_checks(model, layout, hidden),
    )
    for label, size, axes, per_unit in checks:
        offences += _divides(model, label, size, axes, sizes, per_unit)
    stages = math.prod(sizes[axis] for axis in layout.storage_axes(Role.STAGE))
    if model.num_layers % stages == 0:
        offences += [f"model {model.name}: {line}" for line in model.stage_offences(stages)]
    return offences


def _needless(model: ModelConfig, layout: Layout) -> list[str]:
    """What a layout says of experts that the model does not have."""
    if model.experts is not None:
        return []
    keys = ["[experts]"] if layout.experts else []
    for label in PHASES:
        phase = layout.phase(label)
        keys += [f"{label}.gather_experts"] if phase.gather_experts else []
        keys += [f"{label}.dispatch"] if phase.dispatch is not Dispatch.GATHER else []
    return [f"layout: {', '.join(keys)}: model {model.name} has no experts; leave this out"] if keys else []


def _expert_checks(model: ModelConfig, layout: Layout, hidden: tuple[str, ...]) -> list[tuple[str, int, tuple[str, ...], int]]:
    """What the roles for experts' matrices split: its name, size, the axes, and the parameters of one more.

    Args:
        hidden: axes that split what lies between the dense matrices, of which the feed-forward next to the experts is one.
    """
    of = model.experts
    if of is None:
        return []
    layers = sum(model.layer_kinds[number].experts is not None for number in model.kind_of_layers)
    matrices = 3 if of.each.gated else 2
    embed = layout.expert_axes(ExpertRole.EMBED)
    between = tuple(axis for axis in embed if any(axis not in layout.phase(label).gather_experts for label in PHASES))
    sizes = (
        ("experts X", of.count, layout.expert_axes(ExpertRole.EXPERT), matrices * of.each.width * model.embed_dim),
        ("d_ff F of experts", of.each.width, layout.expert_axes(ExpertRole.FFN) + between, matrices * of.count * model.embed_dim),
        ("d_model E of experts", model.embed_dim, embed, matrices * of.count * of.each.width),
        ("d_ff F of the shared experts", of.shared, hidden, matrices * model.embed_dim),
    )
    return [(label, size, axes, layers * each) for label, size, axes, each in sizes]


def _divides(model: ModelConfig, label: str, size: int, axes: tuple[str, ...], sizes: dict[str, int], per_unit: int) -> list[str]:
    ways = math.prod(sizes[axis] for axis in axes)
    if size % ways == 0:
        return []
    padded = round_up(size, ways)
    valid = [str(ways * k) for k in range(max(1, padded // ways - 1), padded // ways + 2)]
    splits = ", ".join(str(k) for k in range(1, min(size, 4096) + 1) if size % k == 0)
    over = "·".join(f"{axis}:{sizes[axis]}" for axis in axes)
    return [
        f"model {model.name}: {label} = {size} does not divide over {over} ({ways} ways); {size} splits into {splits}; "
        f"sizes that divide {ways} ways: {', '.join(valid)}; padding to {padded} adds {(padded - size) * per_unit / 1e6:.4g} M parameters"
    ]


def _params_per_unit(model: ModelConfig, letter: str) -> int:
    """Parameters that one more unit of a dimension adds to the whole model."""
    matrices = 3 if model.gated else 2
    if letter == "E":
        per_layer = model.head_dim * 2 * (model.num_heads + model.num_kv_heads) + matrices * model.ffn_dim
        return model.num_layers * per_layer + model.vocab_size * (1 if model.tied_embeddings else 2)
    if letter == "F":
        return model.num_layers * model.embed_dim * matrices
    if letter == "H":
        return model.num_layers * model.embed_dim * model.head_dim * 2
    return model.embed_dim * (1 if model.tied_embeddings else 2)
