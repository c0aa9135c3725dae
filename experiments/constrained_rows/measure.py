"""What constrained rows cost the rows next to them: 32 free rows and 4 constrained ones against 36 free ones.

    python -m experiments.constrained_rows.measure          # three runs; writes results.json and the figures of the README

On the demo model, and on a simulated device whose steps take 6 ms. A round is a turn of free rows alone, two turns of a way and one of free
rows again, so that what else happens on the machine strikes both; a share is the throughput of the way over that of free rows in its round,
and what is shown the median of all rounds with its quartiles. A gap is the time between two tokens of a free row. While the host is a step
ahead, a constrained row runs in every second step, so no more than 34 of 36 rows (0.944) can be had where all steps take the same time; 32
free rows alone are 0.889.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from experiments.constrained_rows.simulated import ROWS, Device
from experiments.constrained_rows.table import write_figures
from experiments.results import machine, read, write
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
        slow: a turn takes seconds, so that one round is enough.
    """

    structures: tuple[Structure, ...] = ()
    threads: int = 0
    served: bool = True
    compiling: bool = False
    slow: bool = False


WAYS = {
    "between steps": Way((ORDINARY,) * CONSTRAINED, served=False),
    "as served": Way((ORDINARY,) * CONSTRAINED, threads=1),
    "hostile, between steps": Way(tuple(HOSTILE), served=False, slow=True),
    "hostile, as served": Way(tuple(HOSTILE), threads=1),
    "hostile ones compiled": Way(threads=1, compiling=True),
}
FREE = Way()


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


@dataclass(frozen=True)
class Turn:
    """Tokens while no request joined or ended, and the seconds between those of a free row."""

    tokens: int
    gaps: list[float]


def run_turn(served: Served, way: Way) -> Turn:
    _wait_for(served.isolated)
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
    tokens = engine.metrics.generated_tokens
    for number in range(ROWS):
        engine.cancel(str(number))
    while engine.has_work:
        engine.step()
    return Turn(tokens, [later - earlier for earlier, later in itertools.pairwise(times)])


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


def measure(served: Served, way: Way, rounds: int) -> dict[str, Any]:
    """So many rounds, after one that is not counted."""
    shares, speeds, gaps = list[float](), list[float](), list[float]()
    for number in range((1 if way.slow else rounds) + 1):
        found = [run_turn(served, one) for one in (FREE, way, way, FREE)]
        ours, free = _speed(found[1:3]), _speed(found[::3])
        if number:
            shares.append(ours / free)
            speeds.append(ours)
            gaps += found[1].gaps + found[2].gaps
    quartiles = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
    return {
        "rounds": len(shares),
        "tokens_per_second": statistics.median(speeds),
        "share_of_free": statistics.median(shares),
        "quartiles": [quartiles[0], quartiles[2]],
        "gap_ms": {q: 1e3 * _quantile(gaps, share) for q, share in (("p50", 0.5), ("p99", 0.99), ("longest", 1.0))},
    }


def _speed(turns: list[Turn]) -> float:
    """Tokens per second."""
    return sum(turn.tokens for turn in turns) / sum(sum(turn.gaps) for turn in turns)


def _wait_for(isolated: Isolated) -> None:
    """Until its processes have done with what the last turn left behind."""
    stats = lambda: [Path(f"/proc/{process.pid}/stat").read_text().split()[13:15] for process in isolated.processes]  # noqa: E731
    before = None
    while (now := stats()) != before:
        before = now
        time.sleep(0.03)


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def run(rounds: int) -> dict[str, Any]:
    """All ways, on both devices."""
    model = load_demo()
    size = model.runner.limits.vocab_size
    plain, isolated = Grammars(model.tokenizer, size), Isolated(model.tokenizer, size)
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "load_average": os.getloadavg()[0], "rows": {}}
    try:
        for where, runner, count in (("demo model", model.runner, rounds), ("steps of 6 ms", Device(size), max(1, rounds // 5))):
            rows = found["rows"][where] = {}
            for name, way in WAYS.items():
                row = rows[name] = measure(Served(runner, model.tokenizer, plain, isolated), way, count)
                low, high = row["quartiles"]
                print(f"{where}, {name}: {row['share_of_free']:.3f} ({low:.3f} to {high:.3f})", flush=True)
    finally:
        isolated.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40, help="on the demo model; a fifth of them on the device")
    parser.add_argument("--add", action="store_true", help="keep the runs that results.json has")
    args = parser.parse_args()
    runs = read(__file__, missing=[]) if args.add else []
    for _ in range(args.runs):
        runs.append(run(args.rounds))
        write(__file__, runs)
    write_figures(runs)


if __name__ == "__main__":
    main()
