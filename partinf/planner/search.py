"""The search: price every role assignment, order by objective, and join prefill and decode over one storage.

For one phase all its options are priced. For a whole workload every storage and decode option is joined with the prefill option that is
best beside it: prefill options are tried from the cheapest up until none that is left can win, which is exact because what the two
phases pay for each other is never negative.

Where there are more assignments than one would list (four axes have some hundred thousand), those that take more than 1.5 times
the best, by what their linear layers take at least, are left out and counted: what is listed is what full enumeration would list first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from partinf.cost.calibration import calibration_for
from partinf.cost.collectives import BandwidthModel
from partinf.cost.ledger import Entry, Ledger
from partinf.cost.memory import MemoryBudget
from partinf.cost.pricing import LOOPED, Pricing, Program
from partinf.errors import InvalidInput, raise_offences
from partinf.hardware import Link, Slice
from partinf.layout import PHASES, AttentionRole, Layout, Role, attention_name, ffn_name, readable_name
from partinf.model_config import ModelConfig
from partinf.planner.candidates import (
    AxisTable,
    Gather,
    HeadSplits,
    PhaseOption,
    Storage,
    attentions_of,
    axis_table,
    gathers,
    num_options,
    option_signature,
    phase_options,
    storages,
)
from partinf.planner.evaluate import Evaluator, Priced
from partinf.planner.report import Candidate, PhaseResult, PlanReport, Refused
from partinf.workload import Workload

TIE = 1.05
MOST_AXES = 4
_MANY = 10_000  # assignments beyond which slow ones are left out
_CUT = 1.5
_SLOW = f"more than {_CUT:g} times as slow as the best"


class _Choice(NamedTuple):
    """A priced option of one phase, for a storage; `kv` marks the axes that split key-value heads."""

    option: PhaseOption
    kv: tuple[bool, ...]
    priced: Priced
    padded_heads: int


class _Step(NamedTuple):
    """Time of a step and the entries that make it up."""

    seconds: float
    parts: tuple[tuple[Entry, ...], ...]

    def beside(self, coupling: Ledger) -> _Step:
        return _Step(self.seconds + coupling.seconds, (*self.parts, coupling.entries))


class _Pair(NamedTuple):
    """Prefill and decode over one storage, as priced beside each other."""

    prefill: _Choice
    decode: _Choice
    prefill_priced: Priced
    decode_priced: Priced
    coupling: Ledger
    padded_heads: int
    memory: MemoryBudget
    fits: bool
    seconds: float


def search(
    model: ModelConfig,
    slice_: Slice,
    workload: Workload,
    *,
    calibration: str = "fitted",
    bandwidth_model: BandwidthModel = BandwidthModel.AXIS,
    program: Program = LOOPED,
) -> PlanReport:
    """Price every role assignment of `slice_` for this workload.

    Args:
        calibration: `fitted` or `none` (the pure roofline).
        program: what is credited, see `partinf.cost.pricing`.

    Raises:
        InvalidInput: when no assignment can hold the model at all, with the reasons, or when the mesh has too many axes to try all.
    """
    raise_offences(_axis_offences(slice_))
    constants = calibration_for(slice_.chip, calibration)
    search_ = _Search(model, slice_, workload, Pricing(slice_, constants, bandwidth_model, program))
    found = search_.single() if workload.phase else search_.whole()
    if not found:
        reasons = [f"model {model.name} on {slice_.name}: {reason}" for reason, _ in search_.refused.most_common()]
        raise InvalidInput(reasons)
    refused = tuple(Refused(reason, count) for reason, count in search_.refused.most_common())
    return PlanReport(model, slice_, workload, constants, bandwidth_model, program, order(found), refused)


def order(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those that fit and meet the bound first, each group by score; candidates within 5 % of the first are marked as ties."""
    ranked = sorted(candidates, key=lambda c: (not c.fits, not c.meets_bound, c.score))
    best = ranked[0]
    return tuple(
        replace(c, tie_with_best=True) if c.fits == best.fits and c.meets_bound == best.meets_bound and c.score <= TIE * best.score else c
        for c in ranked
    )


def _axis_offences(slice_: Slice) -> list[str]:
    free = [axis.name for axis in slice_.axes if axis.size > 1 and axis.link is not Link.DCN]
    if len(free) <= MOST_AXES:
        return []
    return [
        f"mesh '{slice_.mesh}': {len(free)} axes have 21**{len(free)} assignments; at most {MOST_AXES} axes can be searched, merge some"
    ]


@dataclass
class BestSoFar:
    """The best candidate that a search has met, and how many times as slow others may be; without a `cut` there is no limit."""

    cut: float | None
    score: float = float("inf")

    def see(self, candidate: Candidate) -> None:
        if candidate.fits and candidate.meets_bound:
            self.score = min(self.score, candidate.score)

    def allows(self, least: float) -> bool:
        return self.cut is None or least <= self.cut * self.score


class _Search:
    """The state of one search: the evaluator's caches, and what was refused."""

    def __init__(self, model: ModelConfig, slice_: Slice, workload: Workload, pricing: Pricing) -> None:
        self.model, self.slice, self.workload = model, slice_, workload
        self.table: AxisTable = axis_table(slice_)
        self.evaluator = Evaluator(model, pricing, workload)
        self.sizes = slice_.axis_sizes
        self.refused: Counter[str] = Counter()
        self.heads = HeadSplits(self.table, model.num_kv_heads)
        self._repriced: dict[object, Priced] = {}
        self._couplings: dict[object, Ledger] = {}
        self._helds: dict[object, MemoryBudget] = {}
        self.storages = storages(self.table, model.num_kv_heads)
        many = sum(num_options(self.table, storage) for storage in self.storages) > _MANY
        self.limit = BestSoFar(_CUT if many else None)

    def single(self) -> list[Candidate]:
        """Candidates of the one phase that was asked for; the other phase is like it, but decode does not gather with prefill."""
        label = self.workload.phase or "decode"
        found = []
        for storage, (bounds,) in self._ordered((label,), (1,)):
            seen: dict[object, _Choice | None] = {}
            for gather in self._within(storage, bounds):
                for choice in self._choices(storage, label, {gather}, seen):
                    found.append(self._alone(storage, label, choice))
                    self.limit.see(found[-1])
        return found

    def _alone(self, storage: Storage, label: str, choice: _Choice) -> Candidate:
        kept = choice.option._replace(gather=(False,) * len(storage)) if label == "prefill" else choice.option
        layout = self.table.layout(storage, choice.option, kept)
        step = _Step(choice.priced.seconds, choice.priced.entries)
        if label == "prefill":
            step = step.beside(self.evaluator.coupling(layout, choice.padded_heads))
        memory = self.evaluator.memory(layout, [choice.priced], choice.padded_heads)
        return self._candidate(layout, choice.padded_heads, {label: step}, memory)

    def _ordered(self, labels: tuple[str, ...], times: tuple[int, ...]) -> Iterator[tuple[Storage, list[dict[Gather, float]]]]:
        """Storages that hold the model, those that may be fastest first, with bounds from below of each phase by its gathered axes."""
        able = [storage for storage in self.storages if self._holds(storage)]
        if self.limit.cut is None:
            yield from ((storage, [dict.fromkeys(gathers(self.table, storage), 0.0) for _ in labels]) for storage in able)
            return
        bounded = [(storage, [self._bounds(storage, label) for label in labels]) for storage in able]
        least = [sum(n * min(bounds.values()) for n, bounds in zip(times, each, strict=True)) for _, each in bounded]
        for index in sorted(range(len(bounded)), key=lambda i: least[i]):
            yield bounded[index]

    def _bounds(self, storage: Storage, label: str) -> dict[Gather, float]:
        """What a step takes at least, by its gathered axes: its linear layers, with no attention in the way."""
        alone = tuple(AttentionRole.NONE for _ in storage)
        found = {}
        for gather in gathers(self.table, storage):
            option = PhaseOption(gather, alone, (False,) * len(storage), -1)
            padded = self.evaluator.padded_heads(self.heads.of(storage, option)[0])
            layout = self.table.layout(storage, option, option)
            found[gather] = float("inf") if padded is None else self.evaluator.bound(layout, label, padded)
        return found

    def _within(self, storage: Storage, bounds: dict[Gather, float], rest: float = 0.0, times: int = 1) -> Iterator[Gather]:
        """Gathered axes in order of their bounds, as long as `times` of them and `rest` may come near the best so far."""
        for gather in sorted(bounds, key=lambda g: bounds[g]):
            if self.limit.allows(rest + times * bounds[gather]):
                yield gather
            else:
                self.refused[_SLOW] += attentions_of(self.table, storage)

    def whole(self) -> list[Candidate]:
        """For every storage and decode option, the best prefill option beside it."""
        found: list[Candidate] = []
        times = (self.workload.counted_prefills, self.workload.output_len)
        for storage, (prefill_bounds, decode_bounds) in self._ordered(PHASES, times):
            seen: dict[object, _Choice | None] = {}
            allowed = set(self._within(storage, prefill_bounds, times[1] * min(decode_bounds.values()), times[0]))
            every = self._choices(storage, "prefill", allowed, {}, merged=False)
            prefills = sorted(every, key=lambda choice: choice.priced.seconds)
            least = times[0] * min(prefill_bounds.values())
            for gather in self._within(storage, decode_bounds, least, times[1]):
                for decode in self._choices(storage, "decode", {gather}, seen):
                    soonest = times[0] * prefills[0].priced.seconds + times[1] * decode.priced.seconds if prefills else 0.0
                    if not self.limit.allows(soonest):
                        self.refused[_SLOW] += 1
                        continue
                    best = self._best_beside(storage, decode, prefills)
                    if best is not None:
                        found.append(self._joined(storage, best))
                        self.limit.see(found[-1])
        return found

    def _best_beside(self, storage: Storage, decode: _Choice, prefills: list[_Choice]) -> _Pair | None:
        """The prefill option that is best beside a decode option: the first that fits and that no later one can beat.

        `prefills` are in order of their own time, which is a bound from below for the pair, as decode's own memory is for the pair's.
        """
        held = self._held(storage, decode, decode, decode.padded_heads, decode.kv)
        room = held.usable - held.total
        hopeless = decode.priced.activations > room or all(prefill.priced.activations > room for prefill in prefills)
        best: _Pair | None = None
        for prefill in prefills:
            base = self.workload.counted_prefills * prefill.priced.seconds + self.workload.output_len * decode.priced.seconds
            if best is not None and (best.fits or hopeless) and base >= best.seconds:
                break
            if not hopeless and prefill.priced.activations > room:
                continue
            pair = self._pair(storage, prefill, decode)
            if pair and (best is None or (not pair.fits, pair.seconds) < (not best.fits, best.seconds)):
                best = pair
        return best

    def _pair(self, storage: Storage, prefill: _Choice, decode: _Choice) -> _Pair | None:
        """Prefill and decode side by side; None when their heads do not split together."""
        parts, kv = self.heads.of(storage, prefill.option, decode.option)
        padded = self.evaluator.padded_heads(parts)
        if padded is None:
            return None
        pair = (prefill, decode)
        beside = [self._beside(storage, choice, pair, label, padded, kv) for label, choice in zip(PHASES, pair, strict=True)]
        held = self._held(storage, prefill, decode, padded, kv)
        memory = held._replace(activations=max(priced.activations for priced in beside))
        prefills = self.workload.counted_prefills
        seconds = prefills * beside[0].seconds + self.workload.output_len * beside[1].seconds
        staged = tuple(role is Role.STAGE for role in storage)
        tokens, slots = beside[0].shape.prefill_tokens, beside[0].shape.prefill_slots
        key = (prefill.option.number, decode.option.number, kv, tokens, slots, staged, padded)
        coupling = self._couplings.get(key)
        if coupling is None:
            layout = self.table.layout(storage, prefill.option, decode.option)
            coupling = self._couplings[key] = self.evaluator.coupling(layout, padded)
        return _Pair(prefill, decode, beside[0], beside[1], coupling, padded, memory, memory.fits, seconds + prefills * coupling.seconds)

    def _held(self, storage: Storage, prefill: _Choice, decode: _Choice, padded: int, kv: tuple[bool, ...]) -> MemoryBudget:
        """Weights and cache alone; both are the same for all prefill options that leave the heads split alike."""
        key = (storage, decode.option.number, kv, padded)
        found = self._helds.get(key)
        if found is None:
            layout = self.table.layout(storage, prefill.option, decode.option)
            found = self._helds[key] = self.evaluator.memory(layout, [], padded)
        return found

    def _beside(
        self, storage: Storage, choice: _Choice, pair: tuple[_Choice, _Choice], label: str, padded: int, kv: tuple[bool, ...]
    ) -> Priced:
        """A phase beside another; priced anew when its heads are split otherwise because of the other phase."""
        if padded == choice.padded_heads and kv == choice.kv:
            return choice.priced
        key = (storage, choice.option, label, padded, kv)
        found = self._repriced.get(key)
        if found is None:
            layout = self.table.layout(storage, pair[0].option, pair[1].option)
            found = self._repriced[key] = self.evaluator.price(layout, label, padded)
        return found

    def _joined(self, storage: Storage, pair: _Pair) -> Candidate:
        layout = self.table.layout(storage, pair.prefill.option, pair.decode.option)
        prefill, decode = (_Step(priced.seconds, priced.entries) for priced in (pair.prefill_priced, pair.decode_priced))
        steps = {"prefill": prefill.beside(pair.coupling), "decode": decode}
        return self._candidate(layout, pair.padded_heads, steps, pair.memory)

    def _choices(
        self, storage: Storage, label: str, allowed: set[Gather], seen: dict[object, _Choice | None], merged: bool = True
    ) -> list[_Choice]:
        """Priced options of a phase that gather one of these sets of axes.

        Args:
            seen: those that were priced for this storage. merged: options that differ only by swapping equal axes appear once.
        """
        found = []
        for option in phase_options(self.table, storage, allowed):
            parts, kv = self.heads.of(storage, option)
            signature = option_signature(self.table, storage, option, kv)
            if signature in seen:
                known = seen[signature]
                if known is not None and not merged:
                    found.append(known._replace(option=option, kv=kv))
                continue
            priced = seen[signature] = self._price(storage, option, label, parts, kv)
            if priced is not None:
                found.append(priced)
        return found

    def _price(self, storage: Storage, option: PhaseOption, label: str, parts: int, kv: tuple[bool, ...]) -> _Choice | None:
        padded = self.evaluator.padded_heads(parts)
        if padded is None:
            self.refused[f"{self.model.num_heads} query heads do not split into {parts} parts"] += 1
            return None
        layout = self.table.layout(storage, option, option)
        return _Choice(option, kv, self.evaluator.price(layout, label, padded), padded)

    def _holds(self, storage: Storage) -> bool:
        """Whether the model's dimensions split over this storage; counts the reason if not."""
        parts, stages = 1, 1
        for role, size in zip(storage, self.table.sizes, strict=True):
            parts *= size if role in (Role.EMBED, Role.FFN) else 1
            stages *= size if role is Role.STAGE else 1
        model = self.model
        dims = [(label, size, parts) for label, size in (("d_model E", model.embed_dim), ("d_ff F", model.ffn_dim))]
        dims += [("padded vocabulary V", model.padded_vocab_size, parts), ("layers N", model.num_layers, stages)]
        reasons = [f"{label} = {size} does not split into {count} parts" for label, size, count in dims if size % count]
        self.refused.update(reasons)
        return not reasons

    def _candidate(self, layout: Layout, padded: int, steps: dict[str, _Step], memory: MemoryBudget) -> Candidate:
        results = {label: self._result(layout, label, steps[label]) for label in PHASES if label in steps}
        asked = results[self.workload.phase or "decode"]
        score = latency = asked.step_seconds
        if not self.workload.phase:
            prefill, decode = results["prefill"].step_seconds, self.workload.output_len * results["decode"].step_seconds
            score, latency = self.workload.counted_prefills * prefill + decode, prefill + decode
        bound = self.workload.max_latency
        name, phases = readable_name(layout, self.sizes), tuple(results.values())
        return Candidate(layout, name, phases, memory, score, asked, self.slice.num_chips, padded, bound is None or latency <= bound)

    def _result(self, layout: Layout, label: str, step: _Step) -> PhaseResult:
        workload, chip = self.workload, self.slice.chip
        each = 1 if label == "decode" else (workload.input_len or workload.context_len or 1)
        tokens = (workload.batch if label == "decode" else workload.prompts_per_step) * each
        seconds = step.seconds
        mfu = 2.0 * self.model.num_params() * tokens / (self.slice.num_chips * chip.peak_bf16 * seconds)
        phase = layout.phase(label)
        ffn, attention = ffn_name(layout, phase, self.sizes), attention_name(phase, self.sizes)
        return PhaseResult(label, phase, ffn, attention, step.parts, seconds, mfu, tokens, each)
