"""What must hold when a leg of the soak is over."""

from __future__ import annotations

import itertools
import statistics
import threading
from collections.abc import Sequence

from experiments.soak.clients import Tally
from partinf.engine import Engine, FinishReason
from partinf.engine.metrics import Summary


def num_threads() -> int:
    """Threads, but for those that an engine keeps for masks while it lives."""
    return sum(not thread.name.startswith("partinf-masks") for thread in threading.enumerate())


def left_over(engine: Engine, threads: int) -> list[str]:
    """What an engine that is done still holds."""
    load, scheduler, limits = engine.load, engine._scheduler, engine.limits
    more = num_threads() - threads
    checks = {
        "has work": engine.has_work,
        f"{load.num_running} sequences hold slots": load.num_running,
        f"{load.num_waiting} sequences wait": load.num_waiting,
        f"{load.page_usage:.1%} of the pages are in use": load.page_usage,
        f"{limits.num_host_pages - scheduler.pool.num_free_host_pages} pages of host memory are in use": scheduler.pool.num_free_host_pages
        < limits.num_host_pages,
        f"{limits.num_slots - scheduler.pool.num_free_slots} slots are in use": scheduler.pool.num_free_slots < limits.num_slots,
        f"{engine.num_in_flight} steps are in flight": engine.num_in_flight,
        f"{more} threads more than before": more > 0,
    }
    try:
        scheduler.pool.check([])
    except AssertionError as error:
        checks[str(error)] = True
    return [f"at the end: {text}" for text, wrong in checks.items() if wrong]


def uncounted(tally: Tally, summary: Summary, offered: int) -> list[str]:
    """What does not add up between the clients and the engine, and what a soak should have seen and did not."""
    found = []
    if sum(tally.outcomes.values()) != offered:
        found.append(f"{offered} requests were sent, {sum(tally.outcomes.values())} are accounted for")
    if summary.num_finished != tally.samples:
        found.append(f"{tally.samples} samples were accepted, {summary.num_finished} have ended")
    if summary.finished.get(FinishReason.FAILED):
        found.append(f"{summary.finished[FinishReason.FAILED]} samples failed")
    found += [
        f"no request was {outcome}"
        for outcome in ("answered", "cancelled", "timeout", "left", "refused", "invalid")
        if not tally.outcomes[outcome]
    ]
    if tally.drifted > max(1, 0.01 * tally.compared):
        found.append(f"{tally.drifted} of {tally.compared} sampled answers are not what they are alone")
    if tally.largest_difference > 1e-3:
        found.append(f"a log-probability differs by {tally.largest_difference}")
    return found


def growth(memory: Sequence[float]) -> float:
    """Memory in the last fifth of the run over that in the second, less one; medians."""
    fifth = len(memory) // 5
    return statistics.median(memory[-fifth:]) / statistics.median(memory[fifth : 2 * fifth]) - 1 if fifth else 0.0


def thinned(memory: Sequence[float], most: int = 60) -> list[float]:
    """Medians of equal parts."""
    parts = min(most, len(memory))
    cuts = [len(memory) * part // parts for part in range(parts + 1)]
    return [round(statistics.median(memory[low:high]), 1) for low, high in itertools.pairwise(cuts)]
