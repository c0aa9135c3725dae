"""What constrained rows cost those beside them: 32 free rows and 4 constrained ones against 36 free ones, on the demo model.

    python -m experiments.constrained_rows.measure          # writes results.json

The ways take turns on one runner. A share is the median of all turns, and of the best tenth of each way's turns, which other work on the
machine disturbs least. While the host is a step ahead, a constrained row runs in every second step, so no more than 34 of 36 rows (0.944)
can be had.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from experiments.results import write
from partinf import api
from partinf.buckets import Capacity
from partinf.engine import Engine, SamplingParams
from partinf.engine.constraint import Grammar
from partinf.structured import Grammars, Structure
from partinf.workload import DType, Workload

ROWS, CONSTRAINED = 36, 4
STEPS, MAX_LEN = 60, 128


def load_demo() -> api.Model:
    workload = Workload(ROWS, 32, 96, weights=DType.F32, kv=DType.F32)
    capacity = Capacity(max_rows=ROWS, max_len=MAX_LEN, prefill_tokens=128, random=True, extended=True, constrained=True)
    return api.load("demo", api.plan("demo", "cpu:1", workload, capacity=capacity))


def throughput(model: api.Model, grammar: Grammar, constrained: int, threads: int) -> float:
    """Tokens per second while nobody joins or ends."""
    engine = Engine(model.runner, tokenizer=model.tokenizer, lag=1, num_mask_threads=threads)
    for number in range(ROWS):
        held = grammar if number < constrained else None
        engine.add_request([5, number + 4], SamplingParams(max_tokens=100, ignore_eos=True, constraint=held), str(number))
    while engine.load.num_running < ROWS or engine.metrics.iterations < 10:
        engine.step()
    engine.metrics.clear()
    started = time.perf_counter()
    while engine.metrics.iterations < STEPS:
        engine.step()
    found = engine.metrics.generated_tokens / (time.perf_counter() - started)
    for number in range(ROWS):
        engine.cancel(str(number))
    while engine.has_work:
        engine.step()
    return found


def measure(turns: int) -> dict[str, Any]:
    model = load_demo()
    grammar = Grammars(model.tokenizer, model.runner.limits.vocab_size)(Structure.regex("( [a-z]){200}"))
    ways = {"free": (0, 0), "between steps": (CONSTRAINED, 0), "two threads": (CONSTRAINED, 2)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, (constrained, threads) in ways.items():
            speed = throughput(model, grammar, constrained, threads)
            if turn:
                found[name].append(speed)
    shares = {name: statistics.median(a / b for a, b in zip(speeds, found["free"], strict=True)) for name, speeds in found.items()}
    best = {name: statistics.median(sorted(speeds)[-max(1, turns // 10) :]) for name, speeds in found.items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],
        "turns": turns,
        "tokens_per_second": {name: statistics.median(speeds) for name, speeds in found.items()},
        "share_of_free": shares,
        "best_tokens_per_second": best,
        "best_share_of_free": {name: speed / best["free"] for name, speed in best.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=25)
    args = parser.parse_args()
    results = measure(args.turns)
    write(__file__, results)
    for name, share in results["share_of_free"].items():
        print(f"{name}: {results['tokens_per_second'][name]:.0f} tokens/s, {share:.3f}; best {results['best_share_of_free'][name]:.3f}")


if __name__ == "__main__":
    main()
