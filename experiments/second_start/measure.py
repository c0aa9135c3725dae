"""A first and a second start of the engine: the second loads the programs that the first compiled. Writes results.json.

    python -m experiments.second_start.measure [--pairs N] [--add]        # a minute for each of five pairs

Llama of 125 M parameters with random weights on one CPU device. Every start is a process of its own with jax's own cache of compilations
off; each pair begins with an empty directory. Figures are medians over the pairs; times to first token are from before `partinf.load`,
after the imports. The compile phase begins when the weights are drawn, which jax does in the background. With `--add` the pairs join those
that were measured before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.results import medians, read, write

MODEL, ROWS, MAX_LEN, PROMPT = "llama-125m", 32, 512, 128


def child(directory: str) -> dict[str, float]:
    """One start: prepare the engine and answer one request, timed."""
    import partinf
    from partinf import api

    workload = partinf.Workload(ROWS, PROMPT, MAX_LEN - PROMPT, weights=partinf.DType.F32, kv=partinf.DType.F32)
    plan = partinf.plan(MODEL, "cpu:1", workload)
    import jax

    jax.numpy.zeros(1).block_until_ready()  # jax and its client are there
    started = time.perf_counter()
    model = api.load(MODEL, plan, random_weights=True, compile_steps=False, cache=directory)
    jax.block_until_ready(model.runner.params)
    loaded = time.perf_counter()
    done = model.runner.warm_up()
    warm = time.perf_counter()
    next(iter(model.stream(list(range(1, PROMPT + 1)), partinf.SamplingParams(max_tokens=1, ignore_eos=True))))
    return {
        "programs_compiled": done.compiled,
        "programs_loaded": done.loaded,
        "parameters_seconds": loaded - started,
        "compile_phase_seconds": warm - loaded,
        "first_token_seconds": time.perf_counter() - started,
    }


def start(directory: str) -> dict[str, float]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.second_start.measure", "--child", directory]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=900)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--add", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return 0
    starts: dict[str, list[dict[str, float]]] = read(__file__)["starts"] if args.add else {"first": [], "second": []}
    size = 0
    for number in range(args.pairs):
        with tempfile.TemporaryDirectory() as directory:
            for which, runs in starts.items():
                runs.append(start(directory))
                print(number, which, runs[-1], file=sys.stderr)
            size = sum(path.stat().st_size for path in Path(directory).iterdir())
    ratios = [a["compile_phase_seconds"] / b["compile_phase_seconds"] for a, b in zip(*starts.values(), strict=True)]
    results = {
        "model": MODEL,
        "rows": ROWS,
        "max_len": MAX_LEN,
        "pairs": len(ratios),
        "load_average": os.getloadavg()[0],
        "bytes_on_disk": size,
        "medians": {which: medians(runs) for which, runs in starts.items()},
        "compile_phase_ratio": statistics.median(ratios),
        "compile_phase_ratios": ratios,
        "starts": starts,
    }
    write(__file__, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
