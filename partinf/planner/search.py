"""The search: price every role assignment, order by objective, and join prefill and decode over one storage.

For one phase all its options are priced. For a whole workload every storage and decode option is joined with the prefill option that is
best with it: prefill options are tried from the cheapest up until none that is left can win, which is exact because what the two
phases pay for each other is never negative.

Where there are more assignments than one would list (four axes have some hundred thousand), those that take some quarter more than the
best (of those that use the network between slices alike), by what their linear layers and attention core take at least, are left out and
counted: what is listed is what full enumeration would list first.
"""

from __future__ import annotations

import gc
import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from partinf.cost.ledger import Entry, Ledger
from partinf.cost.memory import MemoryBudget
from partinf.foundation.errors import raise_offences
from partinf.hardware.slices import Link, Slice
from partinf.layout import PHASES, Layout, Role
from partinf.model.weights import active_params
from partinf.planner.candidates import Gather, Storage, Stored, num_options, storages
from partinf.planner.expert_storage import NO_FASTER, ExpertStorage
from partinf.planner.options import BestSoFar, Bounds, Choice, Options, Space
from partinf.planner.pairs import Pair, Pairing
from partinf.planner.question import Question
from partinf.planner.results import Candidate, PhaseResult, Refused

TIE = 1.05
MOST_AXES = 4
# How many times as slow as the best what is listed may be, by the number of assignments of one phase, and of both together.
_CUTS = {1: ((4_000, None), (40_000, 1.5), (1 << 62, 1.2)), 2: ((400_000, None), (10_000_000, 1.25), (1 << 62, 1.1))}


class _Step(NamedTuple):
    """Time of a step and the entries that make it up."""

    seconds: float
    parts: tuple[tuple[Entry, ...], ...]

    def with_coupling(self, coupling: Ledger) -> _Step:
        return _Step(self.seconds + coupling.seconds, (*self.parts, coupling.entries))


class _Found(NamedTuple):
    """Roles for all weights, with what a step of each phase takes at least, and the bounds of the last phases."""

    stored: Stored
    floors: tuple[float, ...]
    known: list[Bounds]

    def least(self, times: Sequence[int]) -> float:
        """What all phases take at least, each so many times."""
        left = len(self.floors) - len(self.known)
        bounds = (*self.floors[:left], *(one.soonest for one in self.known))
        return sum(n * seconds for n, seconds in zip(times, bounds, strict=True))


def given(question: Question, slice_: Slice, layouts: Iterable[tuple[Layout, int]]) -> tuple[Candidate, ...]:
    """Candidates for layouts given by name, each with its padded heads, in their order, priced as a search prices them."""
    search_ = Search(question, slice_, BestSoFar(None))
    return tuple(search_.of(layout, padded) for layout, padded in layouts)


def order(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those that fit and meet the bound first, each group by score; candidates within 5 % of the first are marked as ties."""
    ranked = sorted(candidates, key=lambda c: (not c.fits, not c.meets_bound, c.score))
    best = ranked[0]
    return tuple(
        replace(c, tie_with_best=True) if c.fits == best.fits and c.meets_bound == best.meets_bound and c.score <= TIE * best.score else c
        for c in ranked
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without collections of cycles: a search makes no cycles and some hundred thousand tuples that live until it ends, and to go through
    them again and again takes an eighth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _axis_offences(slice_: Slice) -> list[str]:
    free = [axis.name for axis in slice_.axes if axis.size > 1 and axis.link is not Link.DCN]
    if len(free) <= MOST_AXES:
        return []
    return [
        f"mesh '{slice_.mesh}': {len(free)} axes have 21**{len(free)} assignments; at most {MOST_AXES} axes can be searched, merge some"
    ]


class Search:
    """The search over the roles of one mesh's axes.

    Attributes:
        space: the roles that they may have. refused: how many assignments were, by reason.
    """

    def __init__(self, question: Question, slice_: Slice, limit: BestSoFar | None = None, known: float = math.inf) -> None:
        raise_offences(_axis_offences(slice_))
        self.question, self.model, self.slice, self.workload = question, question.model, slice_, question.workload
        self.sizes = slice_.axis_sizes
        self.space = Space(question, slice_, limit, known)
        self.table, self.evaluator, self.refused = self.space.table, self.space.evaluator, self.space.refused
        self._active, self._best_over = active_params(self.model), dict[Storage, float]()
        if limit is None:
            together = 1 if self.workload.phase else 2
            many = sum(num_options(self.table, storage, self.model.experts is not None) ** together for storage in self.storages)
            self.space.cut = next(cut for most, cut in _CUTS[together] if many <= most)

    @cached_property
    def storages(self) -> list[Storage]:
        """Every storage."""
        return storages(self.table, self.model.num_kv_heads)

    def candidates(self, over: Iterable[Storage] | None = None) -> list[Candidate]:
        """Those that come near the best so far, over every storage or over these."""
        chosen = self.storages if over is None else over
        with _no_collections():
            return self._single(chosen) if self.workload.phase else self._whole(chosen)

    def estimate(self, storage: Storage) -> float:
        """About what the question takes over a storage, in seconds, as `partinf.planner.floors` has it."""
        workload = self.workload
        if workload.phase:
            return self.space.floors.estimate(storage, workload.phase)
        prefill, decode = (self.space.floors.estimate(storage, label) for label in PHASES)
        return workload.counted_prefills * prefill + workload.output_len * decode

    def reasons(self) -> tuple[Refused, ...]:
        """What was refused or passed over, the most frequent first."""
        return tuple(Refused(reason, count) for reason, count in self.refused.most_common())

    def _single(self, over: Iterable[Storage]) -> list[Candidate]:
        """Candidates of the one phase of the question; the other phase is like it, but decode does not gather with prefill."""
        label = self.workload.phase or "decode"
        found = []
        for storage, (bounds,) in self._ordered(over, (label,), (1,)):
            options = Options(self.space, storage, label, bounds)
            for choice in options:
                found.append(self._seen(self._alone(storage, label, choice)))
            self._pass_over(options.num_left)
        return found

    def _whole(self, over: Iterable[Storage]) -> list[Candidate]:
        """For every storage and decode option, the best prefill option with it."""
        found: list[Candidate] = []
        times = (self.workload.counted_prefills, self.workload.output_len)
        pairing = Pairing(self.space)
        for storage, (prefill, decode) in self._ordered(over, PHASES, times):
            prefills = Options(self.space, storage, "prefill", prefill, times[1] * decode.soonest, times[0], merged=False)
            decodes = Options(self.space, storage, "decode", decode, times[0] * prefills.soonest, times[1])
            for choice in decodes:
                best = pairing.best_with(storage, choice, prefills)
                if best is not None:
                    found.append(self._seen(self._joined(storage, best)))
            self._pass_over(decodes.num_left)
        return found

    def of(self, layout: Layout, padded: int) -> Candidate:
        """One layout, in the phase of the question or in both."""
        labels = (self.workload.phase,) if self.workload.phase else PHASES
        priced = {label: self.evaluator.price(layout, label, padded) for label in labels}
        steps = {label: _Step(one.seconds, one.entries) for label, one in priced.items()}
        if "prefill" in steps:
            steps["prefill"] = steps["prefill"].with_coupling(self.evaluator.coupling(layout, padded))
        return self._candidate(layout, padded, steps, self.evaluator.memory(layout, list(priced.values()), padded))

    def _ordered(self, over: Iterable[Storage], labels: Sequence[str], times: Sequence[int]) -> Iterator[tuple[Stored, list[Bounds]]]:
        """Storages that hold the model, those that may be fastest first, with what each phase takes at least.

        Roles for experts are looked for with a storage when it comes up. A phase is bounded when roles for all weights come up, the last
        one first: where that takes too long already the others need no bound.
        """
        experts, heap = ExpertStorage(self.space, labels, times), list[tuple[float, tuple[int, int], Storage | _Found]]()
        for index, storage in enumerate(storage for storage in over if self._holds(storage)):
            floors = (n * self.space.soonest(storage, label) for n, label in zip(times, labels, strict=True))
            heap.append((sum(floors), (index, 0), storage))
        heapq.heapify(heap)
        while heap:
            least, place, node = heapq.heappop(heap)
            storage = node.stored.roles if isinstance(node, _Found) else node
            if not self.space.limit(storage).allows(least):
                self._pass_over(num_options(self.table, storage, self.model.experts is not None))
            elif not isinstance(node, _Found):
                for number, worth in enumerate(experts.worth_considering(storage), start=1):
                    found = _Found(Stored(storage, worth.experts), worth.seconds, [])
                    if number == 1 and worth.experts and found.least(times) < self.space.limit(storage).score:
                        # Looked at now, so that what is far slower is passed over before it is priced.
                        yield found.stored, [Bounds(self.space, found.stored, label) for label in labels]
                    else:
                        heapq.heappush(heap, (found.least(times), (place[0], number), found))
            elif node.stored.experts and self.space.cut and least >= self._best_over.get(storage, math.inf):
                self.refused[NO_FASTER] += 1
            elif len(node.known) == len(labels):
                yield node.stored, node.known
            else:
                left = len(labels) - len(node.known) - 1  # phases without a bound, after this one has it
                found = node._replace(known=[Bounds(self.space, node.stored, labels[left]), *node.known])
                heapq.heappush(heap, (found.least(times), place, found))

    def _seen(self, candidate: Candidate) -> Candidate:
        if candidate.fits and candidate.meets_bound:
            storage = tuple(role for _, role in candidate.layout.storage)
            self.space.limit(storage).see(candidate.score)
            self._best_over[storage] = min(candidate.score, self._best_over.get(storage, math.inf))
        return candidate

    def _pass_over(self, count: int) -> None:
        if count:
            self.refused[f"more than {self.space.cut:g} times as slow as the best"] += count

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
        reasons += model.stage_offences(stages) if model.num_layers % stages == 0 else []
        self.refused.update(reasons)
        return not reasons

    def _alone(self, storage: Stored, label: str, choice: Choice) -> Candidate:
        nothing = Gather((False,) * len(storage.roles))
        kept = choice.option._replace(gather=nothing) if label == "prefill" else choice.option
        whole = choice.priced.whole
        layout = self.table.layout(storage, choice.option, kept, (whole and label == "prefill", whole and label == "decode"))
        step = _Step(choice.priced.seconds, choice.priced.entries)
        if label == "prefill":
            step = step.with_coupling(self.evaluator.coupling(layout, choice.padded_heads))
        memory = self.evaluator.memory(layout, [choice.priced], choice.padded_heads)
        return self._candidate(layout, choice.padded_heads, {label: step}, memory)

    def _joined(self, storage: Stored, pair: Pair) -> Candidate:
        priced = pair.prefill_priced, pair.decode_priced
        layout = self.table.layout(storage, pair.prefill.option, pair.decode.option, (priced[0].whole, priced[1].whole))
        prefill, decode = (_Step(one.seconds, one.entries) for one in priced)
        steps = {"prefill": prefill.with_coupling(pair.coupling), "decode": decode}
        return self._candidate(layout, pair.padded_heads, steps, pair.memory)

    def _candidate(self, layout: Layout, padded: int, steps: dict[str, _Step], memory: MemoryBudget) -> Candidate:
        results = {label: self._result(layout, label, steps[label]) for label in PHASES if label in steps}
        main = results[self.workload.phase or "decode"]
        score = latency = main.step_seconds
        if not self.workload.phase:
            prefill, decode = results["prefill"].step_seconds, self.workload.output_len * results["decode"].step_seconds
            score, latency = self.workload.counted_prefills * prefill + decode, prefill + decode
        bound = self.workload.max_latency
        meets_bound = bound is None or latency <= bound
        return Candidate(layout, tuple(results.values()), memory, score, main, self.slice.num_chips, padded, meets_bound)

    def _result(self, layout: Layout, label: str, step: _Step) -> PhaseResult:
        workload, chip = self.workload, self.slice.chip
        each = 1 if label == "decode" else (workload.input_len or workload.context_len or 1)
        tokens = (workload.batch if label == "decode" else workload.prompts_per_step) * each
        seconds = step.seconds
        mfu = 2.0 * self._active * tokens / (self.slice.num_chips * chip.peak_bf16 * seconds)
        return PhaseResult(label, layout, self.sizes, step.parts, seconds, mfu, tokens, each)
