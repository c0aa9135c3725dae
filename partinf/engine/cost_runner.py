"""The runner of a simulation: a virtual clock that the cost model moves. The engine above it is the one that serves.

Tokens are dummies, so requests end at their `max_tokens`. Pipeline stages are modelled simply: a step's time splits evenly over the
stages, its activations pass from each to the next through the network between nodes, and a stage takes one step after the other; with
as many batches in flight as stages, the pipeline is full. Copies of pages to and from host memory run beside the compute, one after the
other in each direction; a step waits only for those whose pages it touches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from partinf.engine.runner import RunnerLimits
from partinf.engine.step import PageCopy, SampledToken, Step, StepOutput
from partinf.engine.step_price import Price

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


class CostRunner:
    """Executes steps by waiting for as long as they would take.

    Attributes:
        clock: of the simulation; give it to the engine too. busy_seconds: time for which a stage worked, summed over stages.
    """

    def __init__(
        self,
        limits: RunnerLimits,
        price: Callable[[Step], Price],
        clock: VirtualClock | None = None,
        *,
        overhead_seconds: float = 0.0,
        transfer_seconds: Callable[[int], float] = lambda tokens: 0.0,
        page_seconds: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """
        Args:
            price: time of a step on all stages together, and its tokens with padding.
            overhead_seconds: added to every step on its first stage: what the host needs per iteration.
            transfer_seconds: tokens → time of their activations from one stage to the next.
            page_seconds: one KV page to host memory, and back.
        """
        self.clock = clock or VirtualClock()
        self.busy_seconds = 0.0
        self._limits = limits
        self._price = price
        self._overhead = overhead_seconds
        self._transfer = transfer_seconds
        self._page_seconds = page_seconds
        self._stage_free = [0.0] * limits.num_stages
        self._link_free = [0.0, 0.0]
        self._page_ready: dict[int, float] = {}
        self._host_ready: dict[int, float] = {}
        self._in_flight: deque[tuple[float, StepOutput]] = deque()

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    @property
    def next_finish(self) -> float:
        """When the oldest step in flight is done."""
        return self._in_flight[0][0] if self._in_flight else 0.0

    def submit(self, step: Step) -> None:
        price = self._price(step)
        stages = len(self._stage_free)
        share, transfer = price.seconds / stages, self._transfer(price.tokens) if stages > 1 else 0.0
        ready = max(self.clock.now, self._copied(step))
        if self._page_ready:
            ready = max(ready, self._pages_ready(step))
        first = share + (self._overhead if price.tokens else 0.0)
        began = max(ready, self._stage_free[0])
        done = ready
        for stage in range(stages):
            done = max(done, self._stage_free[stage]) + (share if stage else first)
            self._stage_free[stage] = done
            done += transfer if stage + 1 < stages else 0.0
        self.busy_seconds += price.seconds
        output = StepOutput(
            decode=(_TOKEN,) * len(step.decode),
            prefill=tuple(_TOKEN if chunk.last else None for chunk in step.prefill),
            padded_tokens=price.tokens,
            seconds=done - began,
        )
        self._in_flight.append((done, output))

    def collect(self) -> StepOutput:
        finished, output = self._in_flight.popleft()
        self.clock.advance_to(finished)
        return output

    def reset(self) -> None:
        self._in_flight.clear()

    def _copied(self, step: Step) -> float:
        """Queue the step's copies; the time from which its compute may run as far as they alone matter: a step of copies only is done
        when they have begun, since nothing waits for them but the rows that use their pages."""
        for copy in step.swap_out:
            self._copy(copy, 0, after=0.0)
            for page in copy.host_pages:
                self._host_ready[page] = self._link_free[0]
        for copy in step.swap_in:
            self._copy(copy, 1, after=max((self._host_ready.pop(page, 0.0) for page in copy.host_pages), default=0.0))
        return self._link_free[1] if step.swap_in and not (step.decode or step.prefill) else 0.0

    def _copy(self, copy: PageCopy, direction: int, after: float) -> None:
        began = max(self.clock.now, self._link_free[direction], after)
        done = began + len(copy.pages) * self._page_seconds[direction]
        self._link_free[direction] = done
        for page in copy.pages:
            self._page_ready[page] = done

    def _pages_ready(self, step: Step) -> float:
        """When the last page that the step touches has been copied."""
        now = self.clock.now
        self._page_ready = {page: time for page, time in self._page_ready.items() if time > now}
        if not self._page_ready:
            return now
        touched = self._page_ready.keys() & {page for pages in _page_tables(step) for page in pages}
        return max((self._page_ready[page] for page in touched), default=now)


def _page_tables(step: Step) -> Iterator[tuple[int, ...]]:
    yield from (row.pages for row in step.decode)
    yield from (chunk.pages for chunk in step.prefill)
