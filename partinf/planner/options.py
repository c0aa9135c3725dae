"""The options of one phase over one storage, cheapest first and priced lazily.

What the linear layers take depends on the gathered axes alone, and an attention core takes at least what its work takes when it is spread
evenly: both bound an option from below before it is priced. A heap holds sets of gathered axes, options and priced options, each at what
it takes at least; what is taken from it is expanded or priced and goes back, until a priced option comes out first.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from partinf.hardware.slices import Link, Slice
from partinf.layout import Role
from partinf.planner.candidates import (
    Gather,
    HeadSplits,
    PhaseOption,
    Storage,
    Stored,
    axis_table,
    gathers,
    option_signature,
)
from partinf.planner.evaluate import NOTHING, Least, Part, Priced
from partinf.planner.expert_prices import ExpertPrices
from partinf.planner.floors import Floors
from partinf.planner.question import Question
from partinf.plans import row_axes


class Choice(NamedTuple):
    """A priced option of one phase, for a storage; `kv` marks the axes that split key-value heads."""

    option: PhaseOption
    kv: tuple[bool, ...]
    priced: Priced
    padded_heads: int


_Node = Gather | PhaseOption | Choice


@dataclass
class BestSoFar:
    """The best score that a search has met, and how many times as slow others may be; without a `cut` there is no limit."""

    cut: float | None
    score: float = float("inf")

    def see(self, score: float) -> None:
        self.score = min(self.score, score)

    def allows(self, least: float) -> bool:
        return self.cut is None or least <= self.cut * self.score


class Space:
    """The roles that the axes of a slice may have, and what steps cost under them; counts what is refused.

    Attributes:
        cut: how many times as slow as the best an option may be; None for no limit. looked: candidates that were looked at: sets of
            gathered axes that were bounded, and options that were priced. floors, experts: what is known before that.
    """

    def __init__(self, question: Question, slice_: Slice, limit: BestSoFar | None = None, known: float = math.inf) -> None:
        """
        Args:
            limit: the best that other meshes had, in place of one of its own. known: a score that some candidate is known to have.
        """
        self.model, self.cut = question.model, limit.cut if limit else None
        self._shared, self._limits = limit, dict[tuple[Role, ...], BestSoFar]()
        self._known = known
        self._between = [index for index, axis in enumerate(slice_.axes) if axis.link is Link.DCN]
        self.table = axis_table(slice_)
        self.heads = HeadSplits(self.table, self.model.num_kv_heads)
        self.evaluator = question.evaluator(slice_)
        self.floors, self.experts = Floors(self.table, self.heads, self.evaluator), ExpertPrices(self.table, self.evaluator)
        self.refused: Counter[str] = Counter()
        self.looked = 0
        self._attended: dict[object, dict[int, Part]] = {}
        self._cores: dict[tuple[Storage, str], list[float]] = {}

    def limit(self, storage: Storage) -> BestSoFar:
        """The best that a storage is measured against: among those that use the network between slices alike, so that a report has all ways
        to use it."""
        key = tuple(storage[index] for index in self._between)
        return self._shared or self._limits.setdefault(key, BestSoFar(self.cut, math.inf if key else self._known))

    def padded(self, parts: int) -> int | None:
        """Query heads padded so that they split into `parts`; counts it if they do not."""
        padded = self.evaluator.padded_heads(parts)
        if padded is None:
            self.refused[f"{self.model.num_heads} query heads do not split into {parts} parts"] += 1
        return padded

    def soonest(self, storage: Storage, label: str) -> float:
        """What a step of a phase takes at least, whatever is gathered and however experts are split."""
        return 0.0 if self.cut is None else self.floors.soonest(storage, label)

    def least(self, storage: Stored, gather: Gather, label: str) -> float:
        """What a step of a phase takes at least; nothing is worked out where there is no limit."""
        if self.cut is None:
            return 0.0
        if not storage.experts:
            return self.floors.step(storage.roles, gather.dense, label)
        experts = min(one.seconds for one in self.experts(storage, gather, label))
        return experts + self.floors.without_experts(storage.roles, gather.dense, label)

    def cores(self, least: Least, storage: Storage, label: str) -> list[float]:
        """Seconds that the core takes at least under every choice of attention roles for a storage."""
        attentions, split = self.table.attentions_of(storage), least.split
        if split is None:
            return [0.0] * len(attentions)
        found = self._cores.get((storage, label))
        if found is None:
            kv = (self.heads.of(storage, attention.heads)[1] for attention in attentions)
            found = [self.evaluator.least_core(split, label, *one) for one in zip(attentions, kv, strict=True)]
            self._cores[storage, label] = found
        return found

    def attended(self, storage: Stored, gather: Gather, label: str, least: Least) -> dict[int, Part]:
        """What attention is known to take by the number of its roles, where these change neither the step's shape nor its heads: the same
        however experts are split and gathered, as long as tokens are split alike."""
        if least.split is None:
            return {}
        rows = row_axes(self.model, least.split.layout, least.split.phase)
        return self._attended.setdefault((storage.roles, gather.dense, label, rows, least.split.whole), {})


class Bounds:
    """What a step of a phase takes at least over one storage, by its gathered axes: a floor, until the whole bound is needed.

    Attributes:
        padded: query heads without attention roles, padded so that they split; 0 as they are, None where they do not split.
    """

    def __init__(self, space: Space, storage: Stored, label: str) -> None:
        self._space, self._storage, self._label = space, storage, label
        *_, self._alone = space.table.attentions  # splits nothing
        self.padded = space.padded(space.heads.of(storage.roles, self._alone.heads)[0])
        every = [] if self.padded is None else gathers(space.table, storage)
        self._floors = {gather: space.least(storage, gather, label) for gather in every}
        self._known: dict[Gather, Least] = {}

    def floors(self) -> Iterator[tuple[float, Gather]]:
        """What is known of every choice of gathered axes without more work."""
        for gather, floor in self._floors.items():
            yield self._known[gather].seconds if gather in self._known else floor, gather

    def of(self, gather: Gather) -> Least:
        """The whole bound; nothing is worked out where there is no limit."""
        found = self._known.get(gather)
        if found is None:
            found = self._known[gather] = NOTHING if self._space.cut is None else self._work_out(gather)
        return found

    @property
    def soonest(self) -> float:
        """What a step takes at least whatever is gathered; infinite where nothing can be."""
        best = float("inf")
        for floor, gather in sorted(self.floors(), key=lambda pair: pair[0]):
            if floor >= best:
                break
            best = min(best, self.of(gather).seconds)
        return best

    def _work_out(self, gather: Gather) -> Least:
        space, option = self._space, PhaseOption(gather, self._alone)
        space.looked += 1
        assert self.padded is not None
        least = space.evaluator.least(space.table.layout(self._storage, option, option), self._label, self.padded)
        return least._replace(core=space.floors.attending(self._storage.roles, self._label))


class Options:
    """The options of one phase over a storage; iterating over it prices them, once however often it is done.

    It ends where nothing that is left can come near the best so far.
    """

    def __init__(
        self, space: Space, storage: Stored, label: str, bounds: Bounds, rest: float = 0.0, times: int = 1, merged: bool = True
    ) -> None:
        """
        Args:
            bounds: what a step takes at least. rest, times: there are `times` steps of this phase, and seconds of others. merged: options
                that differ only by swapping equal axes appear once.
        """
        self._space, self._storage, self._label, self._bounds = space, storage, label, bounds
        self._limit = space.limit(storage.roles)
        self._rest, self._times, self._merged = rest, times, merged
        self._attentions = space.table.attentions_of(storage.roles)
        self._count = itertools.count()  # ties are taken in the order of enumeration
        self._heap: list[tuple[float, int, _Node]] = []
        self._num_beyond = 0  # options that were beyond the limit when they came up
        for floor, gather in bounds.floors():
            self._push(floor, gather)
        self._found: list[Choice] = []
        self._seen: dict[object, Choice | None] = {}

    def __iter__(self) -> Iterator[Choice]:
        index = 0
        while index < len(self._found) or self._advance():
            yield self._found[index]
            index += 1

    @property
    def soonest(self) -> float:
        """Seconds of the cheapest; infinite where there is none."""
        return next((choice.priced.seconds for choice in self), float("inf"))

    @property
    def num_left(self) -> int:
        """Options that were never priced, equal axes counted apart."""
        waiting = sum(1 if isinstance(node, PhaseOption | Choice) else len(self._attentions) for _, _, node in self._heap)
        return self._num_beyond + waiting

    def _push(self, least: float, node: _Node) -> None:
        heapq.heappush(self._heap, (least, next(self._count), node))

    def _advance(self) -> bool:
        """Finds one more option; False where there is none worth it."""
        while self._heap and self._limit.allows(self._rest + self._times * self._heap[0][0]):
            least, _, node = heapq.heappop(self._heap)
            if isinstance(node, Choice):
                self._found.append(node)
                return True
            if isinstance(node, PhaseOption):
                self._price(node)
            elif self._bounds.of(node).seconds > least:
                self._push(self._bounds.of(node).seconds, node)
            else:
                self._expand(node)
        return False

    def _expand(self, gather: Gather) -> None:
        space, least = self._space, self._bounds.of(gather)
        known = space.attended(self._storage, gather, self._label, least)
        cores = space.cores(least, self._storage.roles, self._label)
        for attention, core in zip(self._attentions, cores, strict=True):
            part = known.get(attention.number)
            seconds = least.with_core(core) if part is None else least.with_attention(part)
            if self._limit.allows(self._rest + self._times * seconds):
                self._push(seconds, PhaseOption(gather, attention))
            else:
                self._num_beyond += 1

    def _price(self, option: PhaseOption) -> None:
        space = self._space
        parts, kv = space.heads.of(self._storage.roles, option.attention.heads)
        signature = option_signature(space.table, self._storage, option, kv)
        if signature in self._seen:
            known = self._seen[signature]
            if known is not None and not self._merged:
                self._push(known.priced.seconds, known._replace(option=option, kv=kv))
            return
        self._seen[signature] = None
        padded = space.padded(parts)
        space.looked += 1
        if padded is not None:
            priced = space.evaluator.cheapest(space.table.layout(self._storage, option, option), self._label, padded)
            choice = self._seen[signature] = Choice(option, kv, priced, padded)
            self._push(priced.seconds, choice)
            self._learn(option, priced, padded)

    def _learn(self, option: PhaseOption, priced: Priced, padded: int) -> None:
        """What attention takes bounds other options with the same roles for it."""
        least = self._bounds.of(option.gather)
        alone = least.split
        if alone and priced.shape == alone.shape and priced.whole == alone.whole and padded == self._bounds.padded:
            self._space.attended(self._storage, option.gather, self._label, least)[option.attention.number] = priced.attention
