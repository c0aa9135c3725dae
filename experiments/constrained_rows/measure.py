"""What constrained rows cost the rows next to them: 32 free rows and 4 constrained ones against 36 free ones.

    python -m experiments.constrained_rows.measure          # writes results.json

On the demo model, and on a simulated device whose steps take 6 ms. The ways take turns on one runner. A share is the median of all turns,
and of the best tenth of each way's turns, which other work on the machine disturbs least; a gap is the time between two tokens of a free
row. While the host is a step ahead, a constrained row runs in every second step, so no more than 34 of 36 rows (0.944) can be had; 32 free
rows alone are 0.889.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from experiments.constrained_rows.simulated import ROWS, Device
from experiments.results import write
from partinf import api
from partinf.buckets import Capacity
from partinf.checkpoint.tokenizer import Tokenizer
from partinf.engine import Engine, SamplingParams
from partinf.engine.runner import Runner
from partinf.foundation.errors import InvalidInput
from partinf.structured import Grammars, Isolated, Structure
from partinf.workload import DType, Workload

CONSTRAINED = 4
STEPS, MAX_LEN = 60, 128
ORDINARY = Structure.regex("( [a-z]){200}")
# Read in many ways: seconds for a token. States without end: memory, and tens of milliseconds for a token.
HOSTILE = [
    Structure.grammar("start: s\ns: s s s | s s | /[a-z ]/"),
    Structure.grammar("start: a* b*\na: a a | c\nb: b b | c\nc: /[a-z ]/ | c c"),
    Structure.regex("(.*a.{14}c?)+d"),
    Structure.regex("(.*a.{20,30}){1,50}"),
]


@dataclass(frozen=True)
class Way:
    """How rows are constrained.

    Attributes:
        threads: of the engine, for masks. served: structures are compiled as `partinf serve` does it. compiling: others are all the while.
        turns: that are enough; None for all.
    """

    structures: tuple[Structure, ...] = ()
    threads: int = 0
    served: bool = True
    compiling: bool = False
    turns: int | None = None


WAYS = {
    "free": Way(),
    "between steps": Way((ORDINARY,) * CONSTRAINED, served=False),
    "as served": Way((ORDINARY,) * CONSTRAINED, threads=1),
    "hostile, between steps": Way(tuple(HOSTILE), served=False, turns=1),
    "hostile, as served": Way(tuple(HOSTILE), threads=1),
    "hostile ones compiled": Way(threads=1, compiling=True),
}
"""What is measured in turns."""


@dataclass(frozen=True)
class Served:
    """A runner, and both ways to compile for its vocabulary."""

    runner: Runner
    tokenizer: Tokenizer
    plain: Grammars
    isolated: Isolated


def load_demo() -> api.Model:
    workload = Workload(ROWS, 32, 96, weights=DType.F32, kv=DType.F32)
    capacity = Capacity(max_rows=ROWS, max_len=MAX_LEN, prefill_tokens=128, random=True, extended=True, constrained=True)
    return api.load("demo", api.plan("demo", "cpu:1", workload, capacity=capacity))


def throughput(served: Served, way: Way) -> tuple[float, list[float]]:
    """Tokens per second while no request joins or ends, and the seconds between the tokens of a free row."""
    compile_ = served.isolated if way.served else served.plain
    held = [compile_(structure) for structure in way.structures]
    engine = Engine(served.runner, tokenizer=served.tokenizer, lag=1, num_mask_threads=way.threads)
    for number in range(ROWS):
        grammar = held[number] if number < len(held) else None
        engine.add_request([5, number + 4], SamplingParams(max_tokens=100, ignore_eos=True, constraint=grammar), str(number))
    while engine.metrics.iterations < 10:
        engine.step()
    engine.metrics.clear()
    times = [time.perf_counter()]
    with _compiling(served.isolated) if way.compiling else contextlib.nullcontext():
        while engine.metrics.iterations < STEPS:
            engine.step()
            times.append(time.perf_counter())
    found = engine.metrics.generated_tokens / (times[-1] - times[0])
    for number in range(ROWS):
        engine.cancel(str(number))
    while engine.has_work:
        engine.step()
    return found, [later - earlier for earlier, later in itertools.pairwise(times)]


@contextlib.contextmanager
def _compiling(isolated: Isolated) -> Iterator[None]:
    """Hostile structures, one after the other, each another one."""
    over = threading.Event()

    def work() -> None:
        for number in itertools.count(time.monotonic_ns() % 1_000_000):
            with contextlib.suppress(InvalidInput):
                isolated(Structure.json_schema({"type": "integer", "multipleOf": 1_000_000 + number, "minimum": 1}))
            if over.is_set():
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def measure(served: Served, turns: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    gaps: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(turns + 1):
        for name, way in WAYS.items():
            if turn > (turns if way.turns is None else way.turns):
                continue
            speed, between = throughput(served, way)
            if turn:
                found[name].append(speed)
                gaps[name] += between
    best = {name: statistics.median(sorted(speeds)[-max(1, turns // 10) :]) for name, speeds in found.items()}
    return {
        name: {
            "tokens_per_second": statistics.median(speeds),
            "share_of_free": statistics.median(a / b for a, b in zip(speeds, found["free"], strict=False)),
            "best_share_of_free": best[name] / best["free"],
            "gap_ms": {q: 1e3 * _quantile(gaps[name], share) for q, share in (("p50", 0.5), ("p99", 0.99), ("longest", 1.0))},
        }
        for name, speeds in found.items()
    }


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=25)
    args = parser.parse_args()
    model = load_demo()
    size = model.runner.limits.vocab_size
    plain, isolated = Grammars(model.tokenizer, size), Isolated(model.tokenizer, size)
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "load_average": os.getloadavg()[0], "turns": args.turns}
    try:
        for where, runner in (("demo model", model.runner), ("steps of 6 ms", Device(size))):
            results[where] = measure(Served(runner, model.tokenizer, plain, isolated), args.turns)
            for name, row in results[where].items():
                gap = row["gap_ms"]
                print(
                    f"{where}, {name}: {row['tokens_per_second']:.0f} tokens/s, {row['share_of_free']:.3f}, "
                    f"best {row['best_share_of_free']:.3f}; gaps {gap['p50']:.1f}, {gap['p99']:.1f}, {gap['longest']:.1f} ms",
                    flush=True,
                )
    finally:
        isolated.close()
    write(__file__, results)


if __name__ == "__main__":
    main()
