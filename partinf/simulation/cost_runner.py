"""The runner of a simulation: a virtual clock that the cost model moves. The engine above it is the one that serves.

Tokens are dummies, so requests end at their `max_tokens`. A step that is submitted enters the first pipeline stage and all before it move
on by one, in one tick, which takes as long as a step that holds each of them: what a stage does not need of it is a bubble. Copies of
copies of pages to and from host memory overlap compute, one after the other in each direction; a step waits only for those whose pages it
touches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from partinf.engine.runner import RunnerLimits
from partinf.engine.step import PageCopy, SampledToken, Step, StepOutput
from partinf.simulation.step_price import Price

_TOKEN = SampledToken(0, 0.0)


class VirtualClock:
    """Seconds of a simulation: moved, never passing by themselves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance_to(self, time: float) -> None:
        """Move on, never back."""
        self.now = max(self.now, time)


class _Passing:
    """A step on its way through the stages: its work on one stage, when each worked on it, its tokens with the padding of its last tick."""

    def __init__(self, step: Step, price: Price) -> None:
        self.step, self.price, self.tokens = step, price, price.tokens
        self.spans: list[tuple[float, float]] = []
        self.began = 0.0
        self.finished: float | None = None


class CostRunner:
    """Executes steps by waiting for as long as they would take.

    Attributes:
        clock: of the simulation; give it to the engine too.
        busy_seconds: time for which a stage worked on its own step, summed over stages.
        stage_seconds: length of all ticks, summed likewise.
    """

    def __init__(
        self,
        limits: RunnerLimits,
        price: Callable[..., Price],
        clock: VirtualClock | None = None,
        *,
        overhead_seconds: float = 0.0,
        page_seconds: tuple[float, float] = (0.0, 0.0),
        page_sizes: tuple[float, ...] = (),
    ) -> None:
        """
        Args:
            price: of a tick in which the stages hold these steps, `price(*steps)`.
            overhead_seconds: added to every tick: what the host needs per iteration.
            page_seconds: one KV page to host memory, and back; every stage its own part at once; of the first group of the cache.
            page_sizes: of a page of each group, in pages of the first; all alike if not given.
        """
        self.clock = clock or VirtualClock()
        self.busy_seconds = self.stage_seconds = 0.0
        self._limits = limits
        self._price = price
        self._overhead = overhead_seconds
        self._page_seconds = page_seconds
        self._page_sizes = page_sizes or (1.0,) * len(limits.groups)
        self._pipeline: deque[_Passing | None] = deque([None] * limits.num_stages, maxlen=limits.num_stages)  # by stage
        self._free = 0.0  # end of the last tick
        self._link_free = [0.0, 0.0]
        self._page_ready: dict[tuple[int, int], float] = {}  # (group, page)
        self._host_ready: dict[tuple[int, int], float] = {}
        self._in_flight: deque[_Passing] = deque()  # not collected

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    @property
    def bubbles(self) -> float:
        """Share of the stages' time in which they had no step, or waited in a tick for one that takes longer than theirs."""
        return 1 - self.busy_seconds / self.stage_seconds if self.stage_seconds else 0.0

    @property
    def next_finish(self) -> float:
        """When the oldest step in flight is done if nothing enters before."""
        if not self._in_flight:
            return 0.0
        oldest, end, stages = self._in_flight[0], self._free, list(self._pipeline)
        if oldest.finished is not None:
            return oldest.finished
        while stages[-1] is not oldest:
            stages = [None, *stages[:-1]]
            end += self._tick_price(stages).seconds + self._overhead
        return end

    def submit(self, step: Step) -> None:
        while self._free < self.clock.now and any(each is not None and each.finished is None for each in self._pipeline):
            self._tick(None, 0.0)
        ready = max(self.clock.now, self._copied(step))
        if self._page_ready:
            ready = max(ready, self._pages_ready(step))
        passing = _Passing(step, self._price(step))
        self._in_flight.append(passing)
        self._tick(passing, ready)

    def collect(self) -> StepOutput:
        passing = self._in_flight.popleft()
        while passing.finished is None:
            self._tick(None, 0.0)
        self.clock.advance_to(passing.finished)
        step = passing.step
        return StepOutput(
            decode=(_TOKEN,) * len(step.decode),
            prefill=tuple(_TOKEN if chunk.last else None for chunk in step.prefill),
            padded_tokens=passing.tokens,
            seconds=passing.finished - passing.began,
            stages=tuple(passing.spans) if len(self._pipeline) > 1 else (),
        )

    def reset(self) -> None:
        self._in_flight.clear()
        self._pipeline.extend([None] * self._limits.num_stages)

    def _tick(self, entering: _Passing | None, ready: float) -> None:
        """Let a step enter the first stage from a time on, and all others move on by one."""
        self._pipeline.appendleft(entering)
        price = self._tick_price(self._pipeline)
        began = max(ready, self._free)
        self._free = began + price.seconds + (self._overhead if price.tokens else 0.0)
        self.stage_seconds += (self._free - began) * len(self._pipeline)
        for passing in self._pipeline:
            if passing is not None:
                passing.began = passing.began if passing.spans else began
                passing.spans.append((began, began + passing.price.seconds))
                self.busy_seconds += passing.price.seconds
                passing.tokens = price.tokens
        leaving = self._pipeline[-1]
        if leaving is not None:
            leaving.finished = self._free

    def _tick_price(self, stages: Iterable[_Passing | None]) -> Price:
        """Of a tick in which these are in the stages."""
        held = [passing for passing in stages if passing is not None]
        if len(held) <= 1:
            return held[0].price if held else Price(0.0, 0)
        return self._price(*(passing.step for passing in held))

    def _copied(self, step: Step) -> float:
        """Queue the step's copies; the time from which its compute may run as far as they alone matter: a step of copies only is done
        when they have begun, since nothing waits for them but the rows that use their pages."""
        for copy in step.swap_out:
            self._copy(copy, 0, after=0.0)
            for page in copy.host_pages:
                self._host_ready[copy.group, page] = self._link_free[0]
        for copy in step.swap_in:
            self._copy(copy, 1, after=max((self._host_ready.pop((copy.group, page), 0.0) for page in copy.host_pages), default=0.0))
        return self._link_free[1] if step.swap_in and not (step.decode or step.prefill) else 0.0

    def _copy(self, copy: PageCopy, direction: int, after: float) -> None:
        began = max(self.clock.now, self._link_free[direction], after)
        done = began + len(copy.pages) * self._page_sizes[copy.group] * self._page_seconds[direction]
        self._link_free[direction] = done
        for page in copy.pages:
            self._page_ready[copy.group, page] = done

    def _pages_ready(self, step: Step) -> float:
        """When the last page that the step touches has been copied."""
        now = self.clock.now
        self._page_ready = {page: time for page, time in self._page_ready.items() if time > now}
        if not self._page_ready:
            return now
        moving: list[set[int]] = [set() for _ in self._limits.groups]
        for group, page in self._page_ready:
            moving[group].add(page)
        return max((self._page_ready[place] for place in _touched(step, moving)), default=now)


def _touched(step: Step, moving: list[set[int]]) -> Iterator[tuple[int, int]]:
    """Those of the moving pages of each group that rows of the step have in their tables."""
    for row in step.rows:
        for group, (table, pages) in enumerate(zip(row.tables, moving, strict=True)):
            yield from ((group, page) for page in pages.intersection(table.ids))
