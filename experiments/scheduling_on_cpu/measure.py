"""The simulator against the real engine: the demo model on one CPU device. Writes results.json.

    python -m experiments.scheduling_on_cpu.measure [--clock cpu]        # two minutes

The same arrivals run on the real engine and in the simulator, for a finite backlog and at 60 % of the throughput that a backlog reaches,
under two policies. The simulator gets its step times in two ways. Measured: they contain the host's share and are taken per bucket in
this process, under the same policy and load on other requests right before and after. Calibrated: the hardware file that `partinf
calibrate` wrote at the start, and nothing else. Five rounds each; errors are medians over the rounds of predicted over real in the same
round.
With `--clock cpu` seconds are those of CPU that the process uses, for a machine that others use too.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from experiments.results import medians, write
from experiments.scheduling_on_cpu.calibrated import calibrated_buckets, calibrated_price, calibrated_slice
from experiments.scheduling_on_cpu.runs import ROWS, StepTimes, at, clock_named_on_the_command_line, load_demo, real, simulated
from partinf.buckets import Capacity
from partinf.engine.estimates import Estimates
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.simulation.arrivals import parse_arrivals, parse_lengths

REPEATS, REQUESTS, LOAD = 5, 150, 0.6
JUDGED = ("throughput", "mean_completion", "p95_completion")
LENGTHS = "uniform:5-24:2-21"
SCHEDULERS = ("orca", "mlfq")
WAYS = ("measured", "calibrated")


def main() -> int:
    clock = clock_named_on_the_command_line()
    slice_ = calibrated_slice()
    model = load_demo(Capacity(max_rows=ROWS, max_len=64, prefill_tokens=128, random=False, max_prompt_len=24))
    lengths = parse_lengths(LENGTHS)
    backlog = parse_arrivals("backlog", lengths, REQUESTS)
    times = StepTimes(model)
    for _ in range(3):
        real(model, make_policy("orca", PolicyOptions(ROWS), Estimates(lambda tokens: 0.0, 1e-3)), backlog, clock(), times)
    seconds = times.means()
    decode = min(value for bucket, value in seconds.items() if not bucket.prefill_tokens)
    prefill = max(value for bucket, value in seconds.items() if bucket.prefill_tokens)
    price = calibrated_price(model.plan, slice_)
    known = {"measured": Estimates(lambda tokens: prefill, decode), "calibrated": price.estimates(model.runner.limits)}
    comparison = []
    for load in (None, LOAD):
        for scheduler in SCHEDULERS:
            make = lambda way="measured", scheduler=scheduler: make_policy(scheduler, PolicyOptions(ROWS), known[way])  # noqa: E731
            rounds: list[dict[str, Any]] = []
            for _ in range(REPEATS):
                how = "backlog" if load is None else f"poisson:{load * real(model, make(), backlog, clock())['requests_per_second']}"
                arrivals, before, after = (parse_arrivals(how, lengths, REQUESTS, seed) for seed in range(3))
                fresh = StepTimes(model)
                real(model, make(), before, clock(), fresh)
                found = {"real": real(model, make(), arrivals, clock())}
                real(model, make(), after, clock(), fresh)
                found["measured"] = simulated(model, make(), arrivals, at(model, seconds | fresh.means()))
                found["calibrated"] = simulated(model, make("calibrated"), arrivals, price)
                rounds.append(found)
            row: dict[str, Any] = {"load": "backlog" if load is None else f"load {load}", "scheduler": scheduler}
            row |= {each: medians([found[each] for found in rounds]) for each in ("real", *WAYS)}
            for way in WAYS:
                errors = [{key: found[way][key] / found["real"][key] - 1 for key in JUDGED} for found in rounds]
                row |= {f"error_{way}": medians(errors), f"errors_{way}": errors}
                print(row["load"], scheduler, way, {key: f"{row[f'error_{way}'][key]:+.1%}" for key in JUDGED}, file=sys.stderr)
            comparison.append(row)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],
        "clock": clock.__name__,
        "rows": ROWS,
        "lengths": LENGTHS,
        "requests": REQUESTS,
        "step_seconds": {str(bucket): value for bucket, value in seconds.items()},
        "calibrated_step_seconds": calibrated_buckets(model.plan, slice_),
        "simulator": comparison,
    }
    write(__file__, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
