"""The loop that feeds any engine, simulated or real, with requests as they arrive, and the clocks that it goes by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from partinf.engine.engine import Engine
from partinf.engine.request import SamplingParams
from partinf.foundation.errors import InvalidInput, Overloaded
from partinf.simulation.arrivals import Arrival


class Clock(Protocol):
    """Tells the time, and lets it pass."""

    def __call__(self) -> float: ...

    def advance_to(self, time: float, /) -> None: ...


class WallClock:
    """Seconds since it was made; `advance_to` sleeps."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start

    def advance_to(self, when: float) -> None:
        time.sleep(max(0.0, when - self()))


def play(
    engine: Engine,
    arrivals: Iterable[Arrival],
    clock: Clock,
    *,
    next_finish: Callable[[], float] | None = None,
    prompt: Callable[[int, int], list[int]] | None = None,
    on_finished: Callable[[int], None] | None = None,
) -> int:
    """Give the engine each request at its time, counted from now, and run it until all are answered; returns how many were refused.

    Args:
        clock: the engine's. next_finish: when the oldest step in flight will be done, where that is known: a request that comes before
            then can still join the step after it.
        prompt: (number, length) → token ids; by default prompts that share no prefix.
        on_finished: called with the number of requests that ended in an iteration.
    """
    start, refused = clock(), 0
    coming = sorted(arrivals, key=lambda arrival: arrival.time)
    coming.reverse()
    number, make = 0, prompt or (lambda number, length: distinct_prompt(number, length, engine.limits.vocab_size))
    while coming or engine.has_work:
        now = clock()
        while coming and start + coming[-1].time <= now:
            arrival = coming.pop()
            try:
                params = SamplingParams(max_tokens=arrival.output_len, ignore_eos=True, seed=number)
                engine.add_request(make(number, arrival.input_len), params, f"arrival-{number}", arrival=start + arrival.time)
            except (InvalidInput, Overloaded):
                refused += 1
            number += 1
        upcoming = start + coming[-1].time if coming else None
        if not engine.has_work:
            if upcoming is not None:
                clock.advance_to(upcoming)
            continue
        early = next_finish is not None and upcoming is not None and engine.num_in_flight > 0 and upcoming < next_finish()
        before = engine.metrics.iterations + engine.num_in_flight
        ended = engine.step(wait=not early)
        if early and upcoming is not None and engine.metrics.iterations + engine.num_in_flight == before:
            clock.advance_to(upcoming)
        if ended and on_finished is not None:
            on_finished(len(ended))
    return refused


def distinct_prompt(number: int, length: int, vocab_size: int) -> list[int]:
    """Token ids that differ from request to request at the beginning: the number's digits in base `vocab_size` or 256."""
    base = min(256, vocab_size)
    return [number % base, number // base % base, number // base**2 % base][:length] + [0] * (length - 3)
