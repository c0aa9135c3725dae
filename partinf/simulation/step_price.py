"""What one step of an engine costs under the cost model: the closed form of `partinf.cost`, fast enough to be evaluated in every iteration.

The price of a step falls into three parts that share nothing but the compute behind which gathers of weights can hide: linear layers
(a function of the tokens), the decode core (rows and keys), and what prompts add (tokens, prompts, earlier keys). Each is cached by its
rounded shape, so that an hour of traffic asks the cost model for a few thousand shapes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from partinf.buckets import fit, group_page_bytes, runner_limits, shape_of, smallest_first
from partinf.cost.ledger import Entry, total_seconds
from partinf.cost.overlap import compute_left, fetches
from partinf.cost.pricing import Pricing
from partinf.cost.split import Shares, StepShape, StepSplit
from partinf.cost.step import attention_part, cache_part, linear_part
from partinf.engine.estimates import Estimates
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import Step
from partinf.foundation.rounding import round_up
from partinf.plans import Bucket, Plan

_ROUND_BITS = 5  # shapes keep so many leading bits beyond the first: within 1/32 of the true size


class Price(NamedTuple):
    """Time of a step, or of a tick of the pipeline.

    Attributes:
        seconds: on one stage. tokens: that went through the linear layers, padding included.
    """

    seconds: float
    tokens: int


class _Sum(NamedTuple):
    """Sums over entries: time if no weight were gathered or read ahead, time of gathers that can be, compute that they could hide behind;
    time that waits for HBM alone, and time that leaves it alone."""

    seconds: float
    hidden: float
    behind: float
    early: float
    free: float

    @classmethod
    def of(cls, entries: tuple[Entry, ...]) -> _Sum:
        return cls(total_seconds(entries), sum(entry.ahead * entry.count for entry in entries), compute_left(entries), *fetches(entries))


class StepPrice:
    """Prices the steps of one plan, each on one of its stages.

    Attributes:
        page_bytes: of one page of every group of the cache on one device that has it, all its layers. page_seconds: of one of many pages of
            the first group to host memory or back.
        shares: useful part of padded dimensions.
    """

    def __init__(self, plan: Plan, pricing: Pricing, *, buckets: tuple[Bucket, ...] = (), sampling: bool = True) -> None:
        """
        Args:
            buckets: padded shapes; a step is priced at the one in which it would run. Without them, at its own shape: decode rows as on the
                fullest shard, contexts at their mean, prompts at the length that gives their mean work.
        """
        self.plan = plan
        self._pricing = pricing.compiled(plan.unrolled)
        self._sampling = sampling
        self._buckets = smallest_first(buckets)
        self._limits = runner_limits(replace(plan, buckets=self._buckets)) if buckets else None
        # Simulated requests use neither extended sampling nor constraints, and such a step skips both.
        self._shape_of = {bucket: replace(shape_of(bucket, plan.cache.page_size), extended=False, constrained=False) for bucket in buckets}
        self.shares = Shares(heads=plan.model.num_heads / plan.padded_model.num_heads)
        self._linear: dict[Hashable, _Sum] = {}
        self._decode: dict[Hashable, _Sum] = {}
        self._prompt: dict[Hashable, _Sum] = {}
        self._page_size = plan.cache.page_size
        # Evaluated in every iteration.
        self._row_multiple, self._token_multiple = plan.decode_row_multiple(), plan.prefill_token_multiple()
        self._slot_multiple, self._num_shards = plan.prefill_slot_multiple(), plan.num_shards
        self._decode_rows: dict[int, int] = {}
        self._shapes: deque[tuple[Step, StepShape]] = deque(maxlen=2 * plan.num_stages)  # of the last steps: each is priced on every stage
        self.page_bytes = group_page_bytes(plan)
        chip = plan.slice.chip
        self.page_seconds = (
            self.page_bytes[0] * chip.devices_per_chip / chip.host_bandwidth / plan.num_sequence_shards
        )  # which copy at the same time

    def __call__(self, *steps: Step) -> Price:
        """A step, or a tick in which the stages hold these steps: a program whose shape holds each of them runs on all stages."""
        shape = self.shape(*steps)
        if not shape.num_tokens:
            return Price(0.0, 0)
        return Price(self.seconds(shape), shape.num_tokens)

    def shape(self, *steps: Step) -> StepShape:
        """At which a tick is priced in which the stages hold these steps."""
        if self._limits is None:
            return _common([self._cached_shape(step) for step in steps])
        return self._shape_of[fit(self._buckets, self._limits, *steps)]

    def seconds(self, shape: StepShape) -> float:
        """Time of a step of this shape on one stage."""
        rows, prompt = shape.decode_rows, shape.prefill_tokens
        sums = [self._part(self._linear, (rows, prompt, shape.prefill_slots), shape, linear_part)]
        if rows:
            alone = StepShape(decode_rows=rows, decode_context=shape.decode_context)
            sums.append(
                self._part(
                    self._decode, (rows, shape.decode_context, prompt >= self.plan.prefill_from_tokens), alone, attention_part, shape
                )
            )
        if prompt:
            alone = StepShape(prefill_tokens=prompt, prefill_slots=shape.prefill_slots, prefill_context=shape.prefill_context)
            key = (prompt, shape.prefill_slots, shape.prefill_context, shape.num_tokens >= self.plan.prefill_from_tokens)
            sums.append(self._part(self._prompt, key, alone, lambda split: attention_part(split) + cache_part(split), shape))
        seconds, hidden, behind, early, free = map(sum, zip(*sums, strict=True))
        return seconds - min(hidden, max(behind, 0.0)) - min(early, free)

    def prefill_seconds(self, num_tokens: int) -> float:
        """Time of a step on one stage that prefills one prompt of so many tokens and does nothing else."""
        return self.seconds(StepShape(prefill_tokens=self._tokens(num_tokens), prefill_slots=self._slots(1), sampling=self._sampling))

    def decode_seconds(self, rows: int, context: int) -> float:
        """Time of a step on one stage that decodes so many rows after so many tokens each."""
        rows = self.plan.decode_rows(rows)
        return self.seconds(StepShape(decode_rows=rows, decode_context=_rounded(context), sampling=self._sampling))

    def estimates(self, limits: RunnerLimits) -> Estimates:
        """What a policy needs to know: an iteration is a way through all stages."""
        stages = self.plan.num_stages
        longest = [limits.reserved_pages(group.window or self.plan.max_len, self.plan.max_len) for group in limits.groups]
        of_all = sum(count * size for count, size in zip(longest, self.page_bytes, strict=True))
        page = self.page_seconds * of_all / (longest[0] * self.page_bytes[0])  # with its share of the windows' pages
        decode = stages * self.decode_seconds(1, limits.page_size)
        first_iteration = cache(lambda tokens: stages * self.prefill_seconds(tokens))
        return Estimates(first_iteration, decode, page, page, limits.pages_for)

    def _part(
        self,
        kept: dict[Hashable, _Sum],
        key: Hashable,
        shape: StepShape,
        entries: Callable[[StepSplit], tuple[Entry, ...]],
        whole: StepShape | None = None,
    ) -> _Sum:
        found = kept.get(key)
        if found is None:
            found = kept[key] = _Sum.of(entries(self._split(shape, whole)))
        return found

    def _split(self, shape: StepShape, whole: StepShape | None = None) -> StepSplit:
        """`whole`: the step that this shape is a part of, whose tokens choose the FFN roles."""
        plan = self.plan
        phase = plan.ffn_phase((whole or shape).num_tokens)
        return StepSplit(plan.padded_model, plan.layout, phase, shape, self._pricing, plan.weights, plan.kv, self.shares)

    def _cached_shape(self, step: Step) -> StepShape:
        """`_real`, remembered for a while."""
        for known, shape in self._shapes:
            if known is step:
                return shape
        shape = self._real(step)
        self._shapes.appendleft((step, shape))
        return shape

    def _real(self, step: Step) -> StepShape:
        """The step's own shape, rounded to what the plan's axes divide and to a few leading bits."""
        rows, context = 0, 0
        if step.decode:
            rows, context = self._decode_shape(step)
        tokens = self._prompt_tokens(step) + step.idle_tokens
        if not tokens:
            padded = self._decode_rows.get(rows)
            if padded is None:
                padded = self._decode_rows[rows] = self.plan.decode_rows(rows)
            return StepShape(decode_rows=padded, decode_context=context, sampling=self._sampling)
        lens = [len(chunk.tokens) for chunk in step.prefill]
        alike = round(step.num_prefill_tokens**2 / max(1, sum(length * length for length in lens)))
        earlier = sum(chunk.start for chunk in step.prefill) // max(1, len(lens))
        return StepShape(
            decode_rows=round_up(rows, self._row_multiple),
            decode_context=context,
            prefill_tokens=self._tokens(tokens),
            prefill_slots=self._slots(max(1, alike)),
            prefill_context=_rounded(earlier),
            sampling=self._sampling,
        )

    def _decode_shape(self, step: Step) -> tuple[int, int]:
        rows = step.decode
        count = len(rows) + step.idle_rows
        shards = self._num_shards
        if shards > 1:
            per_shard = [0] * shards
            for row in rows:
                per_shard[row.shard] += 1
            count = max(count, max(per_shard) * shards)
        context = sum([row.position for row in rows]) // len(rows) + 1
        return count, _rounded(context)

    def _prompt_tokens(self, step: Step) -> int:
        """Prompt tokens with the padding to the fullest prefill shard."""
        shards = self._slot_multiple
        if shards == 1:
            return step.num_prefill_tokens
        per_shard = [0] * shards
        for chunk in step.prefill:
            per_shard[chunk.prefill_shard] += len(chunk.tokens)
        return max(per_shard) * shards

    def _tokens(self, count: int) -> int:
        return round_up(_rounded(count), self._token_multiple)

    def _slots(self, count: int) -> int:
        return round_up(count, self._slot_multiple)


def _common(shapes: list[StepShape]) -> StepShape:
    """The smallest shape that holds each of these."""
    if len(shapes) == 1:
        return shapes[0]
    return StepShape(
        decode_rows=max([shape.decode_rows for shape in shapes]),
        decode_context=max([shape.decode_context for shape in shapes]),
        prefill_tokens=max([shape.prefill_tokens for shape in shapes]),
        prefill_slots=max([shape.prefill_slots for shape in shapes]),
        prefill_context=max([shape.prefill_context for shape in shapes]),
        sampling=shapes[0].sampling,
    )


def _rounded(size: int) -> int:
    """The size with a few leading bits, rounded to nearest."""
    shift = max(0, size.bit_length() - 1 - _ROUND_BITS)
    return (size + (1 << shift >> 1)) >> shift << shift
