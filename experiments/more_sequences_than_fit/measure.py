"""More sequences than fit at full length, on the real engine: what the pool that memory holds gives over the one that is reserved.

    python -m experiments.more_sequences_than_fit.measure [--rounds 5] [--large]

200 requests of mixed lengths are there from the beginning, and the pages hold 20 of them at full length. The reserved pool runs 20 at a
time, which never run out of pages; on the same pages 64 run, and a sequence that finds none free preempts the newest, which is computed
again or has been moved to host memory. Every answer is compared with that of the request alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.results import machine, read, write
from partinf import api
from partinf.buckets import Capacity, held
from partinf.engine.engine import Engine
from partinf.engine.policies.ranked import Eviction
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.engine.request import SamplingParams
from partinf.measure.estimates import measured_estimates
from partinf.workload import DType, Workload

REQUESTS, FULL, PAGE, ROWS, HOST_PAGES = 200, 20, 16, 64, 800


@dataclass(frozen=True)
class Leg:
    """An engine: sequences that run together, pages in sequences of full length, policy, and how it takes pages back."""

    name: str
    rows: int
    full: float = FULL
    policy: str = "fcfs-chunked"
    eviction: Eviction = Eviction.RECOMPUTE


RESERVED = Leg("reserved", FULL)
LEGS = (
    RESERVED,
    Leg("pool, computed again", ROWS),
    Leg("pool, swapped", ROWS, policy="priority", eviction=Eviction.REACTIVE),
    Leg("pool, swapped by a feedback queue", ROWS, policy="mlfq", eviction=Eviction.REACTIVE),
)
# Pages over the longest context as `simulate --as-served` has them for Llama 3.1 8B: 806,768 tokens at 32,768; and as many as one sequence.
RATIOS = (Leg("as on v5e:2x4 at 32k", 32, 806_768 / 32_768), Leg("as on one v5e in int8", 32, 1.0))


def load(model: str, max_len: int, leg: Leg) -> api.Model:
    """The model with this leg's rows and pages."""
    swaps = leg.eviction is not Eviction.RECOMPUTE
    capacity = Capacity(
        max_rows=leg.rows,
        max_len=max_len,
        prefill_tokens=64,
        page_size=PAGE,
        kv_pages=int(leg.full * max_len) // PAGE,
        max_residents=4 * leg.rows if swaps else 0,
    )
    workload = Workload(leg.rows, max_len // 2, max_len // 2, weights=DType.F32, kv=DType.F32)
    plan = api.plan(model, "cpu:1", workload, capacity=capacity)
    return api.load(model, plan, random_weights=model != "demo", num_host_pages=HOST_PAGES if swaps else 0)


def requests(vocab_size: int, max_len: int, count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and answers of 4 tokens to just under half of the context each; every other one samples."""
    rng, most = random.Random(0), max_len // 2 - 1
    prompts = [rng.choices(range(4, vocab_size), k=rng.randint(4, most)) for _ in range(count)]
    params = [SamplingParams(rng.randint(4, most), temperature=float(number % 2), seed=number, ignore_eos=True) for number in range(count)]
    return prompts, params


class Run:
    """One leg on its devices."""

    def __init__(self, model: str, max_len: int, leg: Leg, check: bool = True) -> None:
        self.leg, self.model, self._check = leg, load(model, max_len, leg), check
        self._estimates = measured_estimates(self.model.runner, self.model.plan.buckets)

    def answer(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
        """All answers, and what the engine counted."""
        policy = make_policy(self.leg.policy, PolicyOptions(self.leg.rows, eviction=self.leg.eviction), self._estimates)
        engine = Engine(self.model.runner, policy=policy, check_invariants=self._check)
        started, worked = time.perf_counter(), time.process_time()
        outputs = engine.generate(list(prompts), list(params))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
        tokens = sum(len(output.tokens) for output in outputs)
        summary = engine.metrics.summary()
        figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens_per_second": tokens / seconds}
        counted = {name: getattr(summary, name) for name in ("iterations", "preemptions", "recomputed_tokens", "swapped_out_pages")}
        return [output.tokens for output in outputs], figures | counted


def alone(run: Run, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[tuple[int, ...]]:
    """The answer of every request that has the engine to itself."""
    engine = Engine(run.model.runner)
    return [engine.generate([prompt], [how])[0].tokens for prompt, how in zip(prompts, params, strict=True)]


def compare(model: str, max_len: int, rounds: int, legs: Sequence[Leg], checked: bool) -> list[dict[str, Any]]:
    """Figures of every leg, the legs in turn, medians over the rounds; where `checked`, answers that differ from those alone."""
    runs = [Run(model, max_len, leg, check=False) for leg in legs]
    prompts, params = requests(runs[0].model.plan.model.vocab_size, max_len, REQUESTS)
    expected = alone(runs[0], prompts, params) if checked else None
    found: list[list[dict[str, Any]]] = [[] for _ in runs]
    differing = [0] * len(runs)
    for _ in range(rounds + 1):  # the first has first-call costs
        for place, run in enumerate(runs):
            answers, figures = run.answer(prompts, params)
            found[place].append(figures)
            differing[place] += 0 if expected is None else sum(map(tuple.__ne__, answers, expected))
    return [
        {
            "leg": run.leg.name,
            "rows": run.leg.rows,
            "pages": run.model.plan.cache.pages_per_shard,
            "policy": run.leg.policy,
            "memory": held(run.model.plan).as_json(),
            "differ_from_alone": differing[place] if checked else None,
            "tokens_per_second": statistics.median(one["tokens_per_second"] for one in found[place][1:]),
            "cpu_seconds": statistics.median(one["cpu_seconds"] for one in found[place][1:]),
            "runs": found[place][1:],
        }
        for place, run in enumerate(runs)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="Llama of 125 M parameters with random weights instead, timed alone")
    args = parser.parse_args()
    results = read(__file__, missing={"machine": machine()})
    if args.large:
        results["llama-125m"] = compare("llama-125m", 256, args.rounds, LEGS[:2], checked=False)
    else:
        results["demo"] = compare("demo", 128, args.rounds, LEGS, checked=True)
        results["ratios"] = compare("demo", 128, 1, RATIOS, checked=True)
    write(__file__, results)


if __name__ == "__main__":
    main()
