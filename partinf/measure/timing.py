"""Timing calls on a machine that has other work: all of them in turn, again and again, and the median of each.

What disturbs a machine lasts longer than one call, so calls that are to be compared alternate: a disturbance then touches all of them
and moves no median by much.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """What a call took.

    Attributes:
        seconds: the median. spread: half the distance of the quartiles over the median. repeats: how often it was called.
    """

    seconds: float
    spread: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The timing of these repeats."""
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (median,) * 3
        return cls(median, (high - low) / 2 / median if median else 0.0, len(seconds))


def alternate(calls: Mapping[str, Call], budget: float, least: int = 3, most: int = 50, latest: float = math.inf) -> dict[str, Timing]:
    """Time every call in turn, round after round.

    Args:
        calls: each returns when its work is done; each is called once before, untimed.
        budget: seconds after which no round begins, once there were `least`.
        latest: by `time.perf_counter`, when the last round but the first has to be over, as far as the one before it tells, however few
            there were.
    """
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    ends, rounds, took = time.perf_counter() + budget, 0, 0.0

    def another() -> bool:
        now = time.perf_counter()
        if rounds and now + took > latest:
            return False
        return rounds < least or (rounds < most and now < ends)

    while another():
        round_began = time.perf_counter()
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - started)
        rounds, took = rounds + 1, time.perf_counter() - round_began
    return {name: Timing.of(seconds) for name, seconds in found.items()}
