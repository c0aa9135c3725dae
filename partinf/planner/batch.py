"""How large a decode batch is worth having under a candidate, and what stops it from growing.

Five things can: the critical batch of the chip, from which reading the weights hides behind their products; the memory that weights leave
to the cache; a latency bound; the requests that arrive, of which no more are ever in flight than rate times stay (Little's law); and
padding, because lanes form equal blocks over the axes that split them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from partinf.cost.memory import MemoryBudget
from partinf.cost.movement import ways
from partinf.cost.roofline import critical_batch
from partinf.cost.routing import routed
from partinf.foundation.rounding import round_up
from partinf.layout import AttentionRole, Role
from partinf.planner.evaluate import Evaluator
from partinf.planner.results import Candidate
from partinf.plans import row_axes

_MOST_BATCH = 1 << 14
_NEARLY_ALL = 0.95  # of the experts


@dataclass(frozen=True)
class ExpertLoad:
    """What decode batches do to experts, as routers are expected to choose (`partinf.cost.routing`).

    Attributes:
        count: X, of one layer. batch: the batch that was requested; hit: experts that it hits in one layer. rows: for each of these.
        all_hit: the batch from which nearly all are hit, so that more sequences read hardly more.
        busy: the batch from which each expert that is hit gets as many rows as hide the reading of its matrices behind their products;
            critical: as many.
    """

    count: int
    batch: int
    hit: float
    rows: float
    all_hit: int
    busy: int
    critical: float

    def __str__(self) -> str:
        return (
            f"Experts: {self.batch:,} sequences are expected to hit {self.hit:.3g} of {self.count} per layer, with {self.rows:.3g} rows "
            f"each. From {self.all_hit:,} sequences on, {_NEARLY_ALL:.0%} are hit, and larger batches read hardly more weights. From "
            f"{self.busy:,} on, experts are busy: each gets the {self.critical:.0f} rows whose products take as long "
            "as reading its matrices."
        )


def expert_load(evaluator: Evaluator, critical: float) -> ExpertLoad | None:
    """What the batch of a workload does to experts; None for a model without them.

    Args:
        critical: tokens from which reading a matrix is hidden behind its product.
    """
    of, batch, skew = evaluator.model.experts, evaluator.workload.batch, evaluator.pricing.skew
    if of is None:
        return None
    count, per_token = of.count, of.per_token

    def hit(tokens: int) -> float:
        return routed(count, per_token, tokens, 1, 1, skew).hit

    def rows(tokens: int) -> float:
        return tokens * per_token / hit(tokens)

    all_hit = _largest(lambda tokens: hit(tokens) < _NEARLY_ALL * count) + 1
    busy = _largest(lambda tokens: rows(tokens) < critical, most=math.ceil(critical) * count) + 1
    return ExpertLoad(count, batch, hit(batch), rows(batch), all_hit, busy, critical)


@dataclass(frozen=True)
class BatchAdvice:
    """How large a decode batch is worth having, and what limits it.

    Attributes:
        critical: tokens per step at which reading the weights is hidden behind their products, of experts those that are hit.
        by_memory: largest batch whose weights, cache and activations fit. memory: the budget of that batch.
        by_latency: largest batch whose step keeps the latency bound; None without a bound.
        by_arrivals: sequences in flight at the rate that was given; None without one, or where the slice cannot carry the rate.
        most_requests: requests per second that the slice can carry at the largest batch that fits; None without a rate.
        multiple: lanes come in multiples of this; others are padded.
        limit: `memory`, `latency`, `arrivals` or `compute`: what stops the batch from growing (with profit) beyond `batch`.
        experts: what batches do to experts; None for a model without them.
    """

    critical: float
    by_memory: int
    memory: MemoryBudget
    by_latency: int | None
    by_arrivals: int | None
    most_requests: float | None
    multiple: int
    batch: int
    limit: str
    experts: ExpertLoad | None = None

    @property
    def lanes(self) -> int:
        """The batch with its padding."""
        return round_up(self.batch, self.multiple)

    def __str__(self) -> str:
        reasons = {
            "memory": f"no more fit in memory next to the weights (critical batch {self.critical:.0f})",
            "latency": f"a larger batch misses the latency bound (memory holds {self.by_memory})",
            "compute": f"larger batches are limited by compute, not by reading weights (memory holds {self.by_memory})",
            "arrivals": f"at this rate no more are in flight (memory holds {self.by_memory}, critical batch {self.critical:.0f})",
        }
        text = f"{self.batch} sequences; {reasons[self.limit]}"
        if self.lanes > self.batch:
            text += f"; padded to {self.lanes}, a multiple of {self.multiple}"
        if self.most_requests is not None and self.by_arrivals is None:
            text += f"; this slice carries {self.most_requests:.3g} requests per second, fewer than arrive"
        return text


def batch_advice(evaluator: Evaluator, best: Candidate) -> BatchAdvice | None:
    """The largest batch worth decoding together under a candidate's roles; None where nothing decodes or nothing fits.

    The critical batch is that of the chip; the latency bound is that of a decode step when the question has one phase.
    """
    if not best.fits or best.phase("decode") is None:
        return None
    workload, steps = evaluator.workload, _Steps(evaluator, best)
    critical = critical_batch(evaluator.pricing.slice.chip, workload.weights)
    experts = expert_load(evaluator, critical)
    critical = critical if experts is None else float(experts.busy)
    by_memory = _largest(lambda batch: steps.memory(batch).fits)
    bound = workload.max_latency if workload.phase == "decode" else None
    by_latency = None if bound is None else _largest(lambda batch: steps.seconds(batch) <= bound)
    most = None if workload.arrival_rate is None else steps.requests_per_second(max(by_memory, 1))
    by_arrivals = steps.in_flight(workload.arrival_rate, by_memory) if workload.arrival_rate else None
    limits = {"memory": by_memory, "compute": int(critical), "latency": by_latency, "arrivals": by_arrivals}
    known = {name: size for name, size in limits.items() if size is not None}
    limit = min(known, key=lambda name: known[name])
    memory = steps.memory(max(by_memory, 1))
    return BatchAdvice(critical, by_memory, memory, by_latency, by_arrivals, most, steps.multiple, known[limit], limit, experts)


class _Steps:
    """Steps of a candidate at other batches."""

    def __init__(self, evaluator: Evaluator, best: Candidate) -> None:
        self.evaluator, self.best = evaluator, best
        self._known: dict[int, Evaluator] = {}
        layout = self.best.layout
        split = {*layout.decode.attention_axes(AttentionRole.BATCH), *row_axes(evaluator.model, layout, layout.decode)}
        self.multiple = ways((*split, *layout.storage_axes(Role.STAGE)), evaluator.pricing.slice.axis_sizes)

    def _at(self, batch: int) -> Evaluator:
        found = self._known.get(batch)
        if found is None:
            workload = self.evaluator.workload
            together = None if workload.prefill_batch is None else min(workload.prefill_batch, batch)
            found = self._known[batch] = self.evaluator.under(replace(workload, batch=batch, prefill_batch=together))
        return found

    def memory(self, batch: int) -> MemoryBudget:
        evaluator, best = self._at(batch), self.best
        priced = [evaluator.price(best.layout, result.name, best.padded_heads) for result in best.phases]
        return evaluator.memory(best.layout, priced, best.padded_heads)

    def seconds(self, batch: int) -> float:
        """One decode step."""
        return self._at(batch).price(self.best.layout, "decode", self.best.padded_heads).seconds

    def _prefill_seconds(self, batch: int) -> float:
        """What the prefill of one request takes of the slice's time."""
        evaluator = self._at(batch)
        return evaluator.price(self.best.layout, "prefill", self.best.padded_heads).seconds / evaluator.workload.prompts_per_step

    def requests_per_second(self, batch: int) -> float:
        """Requests that the slice carries when `batch` of them are always decoding."""
        return 1 / (self._prefill_seconds(batch) + self.evaluator.workload.output_len * self.seconds(batch) / batch)

    def in_flight(self, rate: float, most: int) -> int | None:
        """Sequences that decode at a time: rate · output · step, held up by prefills in between; None if more than fit."""
        output = self.evaluator.workload.output_len

        def holds(batch: int) -> bool:
            left = 1 - rate * self._prefill_seconds(batch)  # share of the time that is left for decoding
            return left > 0 and rate * output * self.seconds(batch) / left <= batch

        if most < 1 or not holds(most):
            return None
        return _largest(lambda batch: batch < most and not holds(batch)) + 1


def _largest(holds: Callable[[int], bool], most: int = _MOST_BATCH) -> int:
    """The largest batch, up to twice `most`, for which a property holds that larger ones lose; 0 if none has it."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
