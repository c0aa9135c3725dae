"""The engine under more load than it can carry, for minutes, with everything that clients do. Writes results.json.

    python -m experiments.soak.run --minutes 10

The demo model runs on one CPU device with few pages, so that every policy has to preempt. Requests come about twice as fast as they can be
answered: greedy, sampled, adjusted, scored, several samples, held to grammars, of a least length, shared beginnings; some time out, some
are cancelled, some clients leave, some requests are nonsense. Every token is compared with what the same request gets alone. At the end of
every leg nothing may be left: no page, slot, page of host memory, request or thread; nothing may have been compiled; and memory may not
grow. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import psutil

from experiments.results import write
from experiments.soak.checks import growth, left_over, num_threads, thinned, uncounted
from experiments.soak.clients import Tally, offer
from experiments.soak.traffic import Known, known_requests
from partinf import api
from partinf.buckets import Capacity
from partinf.engine import Engine
from partinf.engine.policies.ranked import Eviction
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.measure.estimates import measured_estimates
from partinf.workload import DType, Workload

ROWS, SLOTS, PAGE, PAGES, HOST_PAGES, MAX_LEN = 8, 16, 4, 44, 160, 96
WAITING = 24  # requests that may wait
OVERLOAD = 2.0  # arrivals over what a backlog reaches
KNOWN = 240
FLAT = 0.03  # memory may grow by this share between the second fifth of the run and the last


@dataclass(frozen=True)
class Leg:
    """A policy, how it makes room, and how far the host is ahead."""

    policy: str
    eviction: Eviction = Eviction.RECOMPUTE
    lag: int = 1


LEGS = (
    Leg("fcfs"),
    Leg("mlfq", Eviction.PROACTIVE),
    Leg("orca"),
    Leg("srpt", Eviction.REACTIVE, 0),
    Leg("request-level", lag=0),
    Leg("mlfq", Eviction.REACTIVE, 2),
    Leg("fcfs-chunked", lag=2),
    Leg("priority", Eviction.RECOMPUTE),
    Leg("fastertransformer"),
    Leg("mlfq-naive", Eviction.DEFER),
)


class Compilations:
    """Counts what XLA compiles in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_: Any) -> None:
        self.count += "backend_compile" in event


def load_demo() -> api.Model:
    workload = Workload(ROWS, 24, 24, weights=DType.F32, kv=DType.F32)
    capacity = Capacity(max_rows=ROWS, max_len=MAX_LEN, prefill_tokens=32, page_size=PAGE, random=True, extended=True, constrained=True)
    plan = api.plan("demo", "cpu:1", workload, capacity=capacity)
    plan = replace(plan, cache=replace(plan.cache, pages_per_shard=PAGES, num_slots=SLOTS))
    return api.load("demo", plan, num_host_pages=HOST_PAGES)


def sustained(model: api.Model, requests: Sequence[Known]) -> float:
    """Requests per second that are answered out of a backlog."""
    engine = Engine(model.runner, tokenizer=model.tokenizer, lag=1, prefix_caching=True)
    started = time.perf_counter()
    engine.generate([known.task.prompt for known in requests], [known.params for known in requests])
    return len(requests) / (time.perf_counter() - started)


async def run_leg(
    model: api.Model, leg: Leg, requests: Sequence[Known], rate: float, seconds: float, seed: int, memory: list[float]
) -> dict[str, Any]:
    """One policy under load; what was counted, and under `problems` what was wrong."""
    threads, compiled = num_threads(), COMPILATIONS.count
    policy = make_policy(leg.policy, PolicyOptions(ROWS, 0.1, leg.eviction), measured_estimates(model.runner, model.plan.buckets))
    engine = Engine(
        model.runner,
        tokenizer=model.tokenizer,
        policy=policy,
        lag=leg.lag,
        prefix_caching=True,
        max_waiting=WAITING,
        check_invariants=True,
        num_mask_threads=2,
    )
    tally, started = Tally(), time.perf_counter()
    watch = asyncio.create_task(_watch(memory))
    offered = await offer(engine, requests, rate, seconds, random.Random(seed), tally)
    while engine.has_work and time.perf_counter() < started + seconds + 120:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # the thread that ran the engine ends
    watch.cancel()
    summary = engine.metrics.summary()
    tally.problems += left_over(engine, threads) + uncounted(tally, summary, offered)
    if COMPILATIONS.count > compiled:
        tally.problems.append(f"{COMPILATIONS.count - compiled} programs were compiled while serving")
    counted = vars(summary)
    return {
        "policy": leg.policy,
        "eviction": leg.eviction.value,
        "lag": leg.lag,
        "seconds": time.perf_counter() - started,
        "offered": offered,
        **vars(tally),
        "finished": {reason.value: count for reason, count in summary.finished.items()},
        **{name: counted[name] for name in ("iterations", "generated_tokens", "dropped_tokens", "preemptions", "recomputed_tokens")},
        **{name: counted[name] for name in ("swap_outs", "swapped_out_pages", "swapped_in_pages", "cached_tokens", "mean_queue")},
        "longest_queue": summary.longest_queue,
    }


async def _watch(memory: list[float]) -> None:
    process = psutil.Process()
    while True:
        memory.append(process.memory_info().rss / 1e6)
        await asyncio.sleep(0.5)


def soak(seconds: float, legs: Sequence[Leg] = LEGS, seed: int = 0) -> dict[str, Any]:
    """All legs, one after the other, in so many seconds together."""
    model = load_demo()
    requests = known_requests(model, KNOWN, seed)
    sustained(model, requests)
    rate = OVERLOAD * sustained(model, requests)
    memory: list[float] = []
    found = []
    for number, leg in enumerate(legs):
        found.append(asyncio.run(run_leg(model, leg, requests, rate, seconds / len(legs), seed + number, memory)))
        print(f"{leg.policy} {leg.eviction} {found[-1]['outcomes']} {found[-1]['problems']}", file=sys.stderr)
    problems = [f"{leg['policy']}, {leg['eviction']}: {problem}" for leg in found for problem in leg["problems"]]
    if growth(memory) > FLAT:
        problems.append(f"memory grew by {growth(memory):.1%}")
    if not COMPILATIONS.count:
        problems.append("no compilation was heard of, not even those of the start")
    if not any(leg["preemptions"] for leg in found) or not any(leg["swapped_in_pages"] for leg in found):
        problems.append("no request was preempted, or none swapped")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "load_average": os.getloadavg()[0],
        "requests_per_second": rate,
        "compiled_before": COMPILATIONS.count,
        "memory_mb": thinned(memory),
        "memory_growth": growth(memory),
        "problems": problems,
        "legs": found,
    }


COMPILATIONS = Compilations()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of all policies together (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = soak(60 * args.minutes, seed=args.seed)
    write(__file__, results)
    show(results)
    return 1 if results["problems"] else 0


def show(results: dict[str, Any]) -> None:
    """A row per leg, then memory and problems."""
    from rich.console import Console
    from rich.table import Table

    outcomes = ("answered", "refused", "cancelled", "left", "timeout", "invalid")
    table = Table(box=None, pad_edge=False)
    for heading in ("policy", "making room", "sent", *outcomes, "compared", "preempted", "swapped", "cached", "wrong"):
        table.add_column(heading, justify="left" if heading in ("policy", "making room") else "right")
    for leg in results["legs"]:
        counts = [leg["offered"], *(leg["outcomes"].get(name, 0) for name in outcomes), leg["compared"]]
        counts += [leg["preemptions"], leg["swap_outs"], leg["cached_tokens"], len(leg["problems"])]
        table.add_row(leg["policy"], leg["eviction"], *map(str, counts))
    console = Console(width=150)
    console.print(table)
    memory = results["memory_mb"]
    console.print(f"memory {min(memory):.0f} to {max(memory):.0f} MB, {results['memory_growth']:+.1%} from the second fifth to the last")
    checked = {name: sum(leg[name] for leg in results["legs"]) for name in ("tokens", "plain", "right", "drifted")}
    console.print("{tokens} tokens heard; {right} of {plain} greedy tasks right; {drifted} other answers not as alone".format(**checked))
    for problem in results["problems"]:
        console.print(f"[red]{problem}[/]")


if __name__ == "__main__":
    raise SystemExit(main())
