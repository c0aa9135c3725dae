"""The price of one phase under one choice of roles, with everything that choices share computed once.

What the linear layers cost depends on storage and gathered axes, what attention costs on its roles besides; the way of new keys and
values to the cache is the only thing that depends on both phases. The three are cached apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

from partinf.buckets import num_programs
from partinf.cost.attention import decode_cores, prefill_cores
from partinf.cost.experts import expert_bytes, expert_pieces, mixture_key
from partinf.cost.ledger import Entry, Ledger, total_seconds
from partinf.cost.memory import LinearSet, MemoryBudget, activation_bytes, dense_set, kv_bytes, usable_bytes, weight_bytes
from partinf.cost.movement import ways
from partinf.cost.overlap import compute_left, fetches
from partinf.cost.pricing import Pricing
from partinf.cost.split import Shares, StepShape, StepSplit, gathers_behind
from partinf.cost.step import attention_part, cache_part, dense_part
from partinf.foundation.rounding import ceil_div, round_up
from partinf.layout import AttentionRole, Layout, Phase, Role, head_axes, kv_head_axes
from partinf.model.config import ModelConfig
from partinf.planner.candidates import Attention
from partinf.plans import row_axes
from partinf.workload import SERVED_PROMPT_TOKENS, Workload

# Padding heads beyond this factor is refused: another layout is always better.
_MOST_PADDING = 2.0
FEW_ROWS = 512  # of a device, for which the residual may be whole


class Priced(NamedTuple):
    """One phase priced: the padded shape of a step and its time, the memory of its activations, and what its ledger is made of.

    In a pipeline the batch is spread over the stages: the shape is that of one stage's, and time and entries are those of as many ticks as
    there are stages, in which the whole batch comes once through all layers. attention: what attention adds to the rest. whole: with what
    passes between sublayers whole.
    """

    shape: StepShape
    seconds: float
    activations: int
    entries: tuple[tuple[Entry, ...], tuple[Entry, ...]]
    attention: Part
    whole: bool = False


class Part(NamedTuple):
    """Entries and their sums: seconds of what is not gathered ahead, seconds of what is, and compute that this can run behind; of the
    first, seconds that wait for HBM alone, and seconds that leave it alone."""

    entries: tuple[Entry, ...]
    seconds: float
    ahead: float
    left: float
    early: float = 0.0
    free: float = 0.0

    @classmethod
    def of(cls, entries: tuple[Entry, ...], times: int) -> Part:
        """Of a step that runs so many times."""
        if times > 1:
            entries = tuple(entry._replace(count=entry.count * times) for entry in entries)
        ahead = sum(entry.ahead * entry.count for entry in entries)
        return cls(entries, total_seconds(entries) - ahead, ahead, compute_left(entries), *fetches(entries))

    def with_(self, other: Part) -> Part:
        """Both."""
        return Part(
            self.entries + other.entries,
            self.seconds + other.seconds,
            self.ahead + other.ahead,
            self.left + other.left,
            self.early + other.early,
            self.free + other.free,
        )

    def seconds_with(self, seconds: float, left: float, early: float = 0.0, free: float = 0.0) -> float:
        """Seconds with other work, which gathers nothing ahead, leaves some compute for those that do, waits for HBM and leaves it
        alone for so long."""
        waits, leaves = self.early + early, self.free + free  # searches ask this most often: no calls
        total = self.seconds + seconds - (waits if waits < leaves else leaves)
        if not self.ahead:
            return total
        return total + self.ahead - min(self.ahead, max(0.0, self.left + left))


class _Linear(NamedTuple):
    """Entries and working sets of everything but attention."""

    part: Part
    working_set: LinearSet


class ExpertFigures(NamedTuple):
    """What experts add to a step at least.

    Attributes:
        seconds: where all that waits for HBM passes while others leave it alone. apart: where all that leaves HBM alone passes while others
            wait for it. size: bytes of their working set.
    """

    seconds: float
    apart: float
    size: int

    @classmethod
    def of(cls, part: Part, size: int) -> ExpertFigures:
        shown = part.ahead - min(part.ahead, max(0.0, part.left))
        return cls(part.seconds + shown - part.early, part.seconds - part.free, size)


class Least(NamedTuple):
    """What a phase's linear layers take whatever its attention roles are, their split, and what an attention core takes at least."""

    part: Part
    split: StepSplit | None
    core: float = 0.0

    @property
    def seconds(self) -> float:
        """What a step takes at least."""
        return self.with_core(self.core)

    def with_core(self, core: float) -> float:
        """The same with a core of so many seconds, whose compute may hide gathers too."""
        return self.part.seconds_with(core, core, free=core)

    def with_attention(self, part: Part) -> float:
        """The same with all that attention takes."""
        return self.part.seconds_with(part.seconds, part.left, part.early, part.free)


_NO_PART = Part((), 0.0, 0.0, 0.0)
NOTHING = Least(_NO_PART, None)


class _Key(NamedTuple):
    storage: tuple[object, ...]
    experts: tuple[object, ...]
    gather: tuple[str, ...]
    ahead: bool
    whole: bool
    kv_stored: tuple[str, ...]
    shape: StepShape
    heads: int


def _key(split: StepSplit) -> _Key:
    experts = _expert_roles(split.model, split.layout, split.phase)
    return _Key(
        split.layout.storage, experts, split.gathered, split.ahead, split.whole, split.kv_stored, split.shape, split.model.num_heads
    )


def _expert_roles(model: ModelConfig, layout: Layout, phase: Phase) -> tuple[object, ...]:
    """All that a layout and a phase say of experts; nothing where the model has none."""
    return () if model.experts is None else (layout.experts, phase.gather_experts, phase.dispatch)


class Evaluator:
    """Prices phases of one model on one slice under one workload."""

    def __init__(self, model: ModelConfig, pricing: Pricing, workload: Workload) -> None:
        """
        Attributes:
            unrolled: without pipeline stages, an engine for the workload compiles its layers one by one.
        """
        self.model, self.pricing, self.workload = model, pricing, workload
        self.unrolled = pricing.slice.chip.platform.unrolls(model.num_layers * num_programs(workload), stages=1)
        self._unstaged, self._staged = pricing.compiled(self.unrolled), pricing.compiled(unrolled=False)
        self.sizes = pricing.slice.axis_sizes
        self._linear: dict[_Key, _Linear] = {}
        self._dense_parts: dict[_Key, _Linear] = {}
        self._expert_parts: dict[object, Part] = {}
        self._expert_bytes: dict[object, int] = {}
        self._whole: dict[_Key, bool] = {}
        self._attention: dict[object, Part] = {}
        self._splits: dict[object, StepSplit] = {}
        self._prompt_len = workload.input_len or workload.context_len or 1
        prompts = 0 if workload.phase == "decode" else workload.prompts_per_step
        self._prompts = min(prompts * self._prompt_len, workload.chunk or SERVED_PROMPT_TOKENS), prompts  # that an engine computes at once
        self._coupling: dict[object, Ledger] = {}
        self._cores: dict[object, float] = {}
        self._core_seconds: dict[object, float] = {}
        self._shapes: dict[tuple[str, int, int, int], StepShape] = {}
        self._weight_bytes: dict[object, int] = {}
        self._stages: dict[object, int] = {}
        self._cache_bytes: dict[object, int] = {}

    def one_by_one(self, stages: int) -> bool:
        """Whether the priced program has the layers of each of so many stages compiled one by one."""
        return (self._unstaged if stages == 1 else self._staged).program.unrolled

    def least_seconds(self, flops: float, num_bytes: float) -> float:
        """What products of so many FLOPs, with weights of so many bytes, take at least."""
        return self._unstaged.least_seconds(flops, num_bytes)

    @cached_property
    def usable(self) -> int:
        """Bytes that a program may use on one device."""
        return usable_bytes(self.pricing.slice)

    def tokens(self, label: str) -> int:
        """Real tokens of a phase's step."""
        return self.workload.batch if label == "decode" else self.workload.prompts_per_step * self._prompt_len

    @property
    def gathers_hide(self) -> bool:
        """Whether gathers of weights may run behind products."""
        return gathers_behind(self.pricing, self.model, ahead=False)

    def under(self, workload: Workload) -> Evaluator:
        """The same for another workload."""
        return Evaluator(self.model, self.pricing, workload)

    def padded_heads(self, parts: int) -> int | None:
        """Query heads padded so that they split into `parts`; 0 when they do as they are, None when that would be absurd."""
        return padded_heads(self.model, parts)

    def split(self, layout: Layout, label: str, padded_heads: int, shape: StepShape | None = None) -> StepSplit:
        """The roles of `layout` worked out for a step of the workload's phase `label`, or of a given shape with its FFN roles."""
        phase = layout.phase(label)
        model = self.model.with_padded_heads(padded_heads)
        shares = Shares(heads=self.model.num_heads / model.num_heads)
        shape = shape or self.shape(layout, phase, label)
        experts = _expert_roles(model, layout, phase)
        key = (layout.storage, experts, phase.gather, phase.ahead, phase.whole, padded_heads, shape)
        known = self._splits.get(key)
        if known is not None:
            return known.with_attention(layout)
        alike = (layout.storage, (), *key[2:])  # whatever it says of experts
        made = self._splits.get(alike)
        if made is None:
            pricing = self._unstaged if self.stages(layout) == 1 else self._staged
            made = StepSplit(model, layout, phase, shape, pricing, self.workload.weights, self.workload.kv, shares)
            self._splits[alike] = made
        if experts:
            made = self._splits[key] = made.with_experts(layout, phase)
        return made.with_attention(layout) if made.layout is not layout else made

    def shape(self, layout: Layout, phase: Phase, label: str) -> StepShape:
        """The workload's step of a phase, padded to what the roles divide."""
        stages = self.stages(layout)
        owners = phase.attention_axes(AttentionRole.BATCH)
        spread = {*owners, *row_axes(self.model, layout, phase)}
        if label == "prefill":
            spread.update(phase.attention_axes(AttentionRole.SEQUENCE))
        key = (label, stages, ways(owners, self.sizes), ways(tuple(spread), self.sizes))
        found = self._shapes.get(key)
        if found is None:
            found = self._shapes[key] = self._shape(*key)
        return found

    def _shape(self, label: str, stages: int, batch_ways: int, spread: int) -> StepShape:
        """Of a batch in so many stages, split over so many owners, whose tokens are spread over so many devices."""
        if label == "decode":
            batch, context = ceil_div(self.workload.batch, stages), max(self.workload.decode_context, 1)
            return StepShape(decode_rows=round_up(batch, spread), decode_context=context, real_rows=batch)
        batch, length = ceil_div(self.workload.prompts_per_step, stages), self._prompt_len
        slots = round_up(batch, batch_ways)
        tokens = round_up(slots * length, spread)
        return StepShape(prefill_tokens=tokens, prefill_slots=slots, real_tokens=batch * length, real_slots=batch)

    def stages(self, layout: Layout) -> int:
        """Ticks in which a batch that is spread over the pipeline stages passes all layers once."""
        found = self._stages.get(layout.storage)
        if found is None:
            found = self._stages[layout.storage] = ways(layout.storage_axes(Role.STAGE), self.sizes)
        return found

    def linear(self, split: StepSplit) -> _Linear:
        """What does not depend on attention roles."""
        key = _key(split)
        found = self._linear.get(key)
        if found is None:
            found = self._linear[key] = self._dense(split, key._replace(experts=()))
            if split.model.experts is not None:
                part, size = self._experts(split)
                largest = max(found.working_set.largest, size)
                found = self._linear[key] = _Linear(found.part.with_(part), found.working_set._replace(largest=largest))
        return found

    def _dense(self, split: StepSplit, key: _Key) -> _Linear:
        """The same without experts."""
        found = self._dense_parts.get(key)
        if found is None:
            found = self._dense_parts[key] = _Linear(Part.of(dense_part(split), split.num_stages), dense_set(split))
        return found

    def _experts(self, split: StepSplit) -> tuple[Part, int]:
        """What experts take, and their working set: the same whatever dense weights do along axes that split neither tokens nor what
        passes between sublayers."""
        found, size = _NO_PART, self._expert_bytes.get(mixture_key(split))
        for key, make in expert_pieces(split):
            part = self._expert_parts.get(key)
            if part is None:
                part = self._expert_parts[key] = Part.of(tuple(make()), split.num_stages)
            found = found.with_(part)
        if size is None:
            size = self._expert_bytes[mixture_key(split)] = expert_bytes(split)
        return found, size

    def expert_figures(self, layout: Layout, label: str) -> tuple[ExpertFigures, ExpertFigures]:
        """What experts take in a phase's step where what passes between sublayers is split, and where it is whole; twice the first where it
        may not be."""
        split = self.split(layout, label, 0)
        mine = ExpertFigures.of(*self._experts(split))
        if not self._may_be_whole(split):
            return mine, mine
        return mine, ExpertFigures.of(*self._experts(split.with_whole_residual()))

    def _may_be_whole(self, split: StepSplit) -> bool:
        """Many rows leave what passes between sublayers split: each device would pass all of E through its memory, which no entry is there
        for."""
        return self.pricing.program.either_residual and bool(split.f) and split.local_tokens <= FEW_ROWS

    def price(self, layout: Layout, label: str, padded_heads: int) -> Priced:
        """One step of a phase without the coupling of prefill to decode's cache."""
        return self._priced(self.split(layout, label, padded_heads), label)

    def cheapest(self, layout: Layout, label: str, padded_heads: int) -> Priced:
        """The same with what passes between sublayers split or whole, as is cheaper."""
        return self._priced(self._cheaper(self.split(layout, label, padded_heads)), label)

    def _cheaper(self, split: StepSplit) -> StepSplit:
        """The split, or the same with what passes between sublayers whole."""
        if not self._may_be_whole(split):
            return split
        key = _key(split)
        whole = self._whole.get(key)
        if whole is None:
            mine, other = (self.linear(one).part.seconds_with(0.0, 0.0) for one in (split, split.with_whole_residual()))
            whole = self._whole[key] = other < mine
        return split.with_whole_residual() if whole else split

    def least(self, layout: Layout, label: str, padded_heads: int) -> Least:
        """A bound from below for all attention roles, without their cores; those of `layout` must be none."""
        split = self._cheaper(self.split(layout, label, padded_heads))
        return Least(self.linear(split).part, split)

    def least_core(self, split: StepSplit, label: str, attention: Attention, kv: tuple[bool, ...]) -> float:
        """Seconds that the attention core of a phase's step takes at least: real heads, requests and keys, spread as evenly as roles allow.

        Args:
            split: of the storage. kv: marks the axes that split key-value heads.
        """
        key = (label, split.num_stages, attention.number, kv)
        found = self._cores.get(key)
        if found is None:
            sizes = (*self._least_sizes(split, label, attention, kv), attention.sequence_ways)
            found = self._core_seconds.get((label, split.num_stages, sizes))  # of few sizes, however many attention roles have them
            if found is None:
                cores = self._least_cores(split, label, *sizes)
                found = sum(core.seconds * (core.count * split.num_stages) for core in cores)
                self._core_seconds[label, split.num_stages, sizes] = found
            self._cores[key] = found
        return found

    def _least_sizes(self, split: StepSplit, label: str, attention: Attention, kv: tuple[bool, ...]) -> tuple[int, int, int]:
        """Requests, query heads and key-value heads of one device at least."""
        ways = kv_ways = 1
        for index, (size, splits_kv) in enumerate(zip(self.sizes.values(), kv, strict=True)):
            if attention.heads >> index & 1:
                ways *= size
                kv_ways *= size if splits_kv else 1
        requests = self.workload.batch if label == "decode" else self.workload.prompts_per_step
        rows = ceil_div(requests, split.num_stages * attention.batch_ways)
        return rows, ceil_div(self.model.num_heads, ways), ceil_div(self.model.num_kv_heads, kv_ways)

    def _least_cores(self, split: StepSplit, label: str, rows: int, heads: int, kv_heads: int, shards: int) -> list[Entry]:
        if label == "decode":
            context = max(self.workload.decode_context, 1)
            return decode_cores(split, rows, heads, kv_heads, context, shards, context)
        return prefill_cores(split, rows, rows * self._prompt_len, heads, kv_heads, shards)

    def prompts(self, layout: Layout, label: str, padded_heads: int, shape: StepShape) -> Priced:
        """A step of prompts of this shape under the FFN roles of a phase; their attention is always prefill's."""
        return self._priced(self.split(layout, label, padded_heads, shape), "prefill")

    def _priced(self, split: StepSplit, label: str) -> Priced:
        linear, attention = self.linear(split), self._attend(split, label)
        seconds = linear.part.seconds_with(attention.seconds, attention.left, attention.early, attention.free)
        activations = self.activations(split, linear.working_set)
        return Priced(split.shape, seconds, activations, (linear.part.entries, attention.entries), attention, split.whole)

    def activations(self, split: StepSplit, linear: LinearSet | None = None) -> int:
        """The working set of a step, or of the chunk of it that one step processes at most."""
        chunk, shape = self.workload.chunk, split.shape
        if chunk is None or shape.prefill_tokens <= chunk:
            return activation_bytes(split, linear)
        return activation_bytes(split.with_shape(StepShape(prefill_tokens=chunk, prefill_slots=min(chunk, shape.prefill_slots))))

    def _attend(self, split: StepSplit, label: str) -> Part:
        """What depends on attention roles; axes that copy weights and axes that gather them are the same to it."""
        group = split.decode if label == "decode" else split.prefill
        key = (split.t, split.f, split.e, split.kv, group, split.shape, split.model.num_heads, split.stages)
        found = self._attention.get(key)
        if found is None:
            found = self._attention[key] = Part.of(attention_part(split), split.num_stages)
        return found

    def _weights(self, layout: Layout, padded_heads: int) -> int:
        kv_heads = self.model.with_padded_heads(padded_heads).num_kv_heads
        key = (layout.storage, layout.experts, kv_head_axes(layout, self.sizes, kv_heads), padded_heads)
        found = self._weight_bytes.get(key)
        if found is None:
            found = self._weight_bytes[key] = weight_bytes(self.split(layout, "decode", padded_heads))
        return found

    def coupling(self, layout: Layout, padded_heads: int) -> Ledger:
        """What prefill pays for the cache's layout, which is decode's."""
        split = self.split(layout, "prefill", padded_heads)
        key = (split.prefill, split.decode.batch, split.decode.kv, split.decode.sequence, split.shape, split.stages, padded_heads)
        found = self._coupling.get(key)
        if found is None:
            found = self._coupling[key] = Ledger(cache_part(split)).times(split.num_stages)
        return found

    def memory(self, layout: Layout, priced: list[Priced], padded_heads: int) -> MemoryBudget:
        """The budget of a device that runs these phases; without phases, of weights and cache alone."""
        activations = max((p.activations for p in priced), default=0)
        return MemoryBudget(self._weights(layout, padded_heads), self._cache(layout, padded_heads), activations, self.usable)

    def _cache(self, layout: Layout, padded_heads: int) -> int:
        key = (layout.storage, layout.decode.attention, layout.prefill.attention, padded_heads)
        found = self._cache_bytes.get(key)
        if found is None:
            model, context = self.model.with_padded_heads(padded_heads), max(self.workload.max_context, 1)
            rows = self.workload.resident or self.workload.batch
            found = kv_bytes(model, layout, self.pricing.slice, rows, context, self.workload.kv, self._prompts)
            self._cache_bytes[key] = found
        return found


def heads_for(model: ModelConfig, layout: Layout, sizes: Mapping[str, int]) -> int | None:
    """Query heads padded so that they split as this layout splits them; 0 for no padding, None when that would be absurd."""
    return padded_heads(model, ways(head_axes(layout), sizes))


def padded_heads(model: ModelConfig, parts: int) -> int | None:
    """Query heads padded so that they split into `parts`; 0 when they do as they are, None when that would be absurd."""
    heads, kv = model.num_heads, model.num_kv_heads
    if heads % parts == 0:
        return 0
    multiple = parts if kv == heads else math.lcm(parts, kv)
    padded = round_up(heads, multiple)
    return padded if padded <= _MOST_PADDING * heads else None
