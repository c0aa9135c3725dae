"""A recorded hour of conversations on two models: which scheduler, batch and slice meets a bound. Writes results.json.

    python -m experiments.azure_trace.measure TRACE.csv [--requests N]
    python -m experiments.azure_trace.measure TRACE.csv --requests N --only TEXT    # slices with this text; the others stay as they are

TRACE.csv is AzureLLMInferenceTrace_conv.csv (Patel et al., Splitwise, ISCA 2024; Azure public data set, CC-BY-4.0). Only figures are kept.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from experiments.results import read, write
from partinf.cost.calibration import calibration_for
from partinf.cost.pricing import Pricing
from partinf.engine import Engine
from partinf.engine.policies.ranked import Eviction
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.hardware.slices import parse_slice
from partinf.layout import readable_name
from partinf.model.load import load_model_config
from partinf.model.weights import num_params
from partinf.plans import Plan
from partinf.simulation.arrivals import Arrival, read_trace
from partinf.simulation.play import play
from partinf.simulation.report import LatencyBounds, Machine, RunReport
from partinf.simulation.serving_plan import Terms, Traffic, serving_plan
from partinf.simulation.sizing import Sizing, cost_runner

BOUNDS = LatencyBounds(ttft=1.0, time_per_token=0.05)
# Model, slice, batch, of how many equal replicas this is one (it gets every n-th request), and pipeline stages (None: as many as the
# planner likes).
CASES: list[tuple[str, str, int, int, int | None]] = [
    ("palm-62b", slice_, size, 1, None) for slice_ in ("v4:2x2x2", "v4:4x2x2") for size in (32, 128)
]
CASES += [("palm-62b", "v4:4x4x2", 128, 1, None)]
CASES += [("llama-3-70b", slice_, size, 4, None) for slice_ in ("v5e:4x4", "v5e:4x8") for size in (32, 128)]
CASES += [("llama-3-70b", "v5e:8x8", 128, replicas, stages) for replicas in (1, 4) for stages in (1, None)]
SCHEDULERS = ("request-level", "orca", "fcfs", "fcfs-chunked", "mlfq")
CHUNK = 1024  # prompt tokens per iteration where prompts are cut


@cache
def plan_for(model_name: str, slice_name: str, traffic: Traffic, stages: int | None) -> Plan:
    """One search for all schedulers."""
    return serving_plan(load_model_config(model_name), parse_slice(slice_name), traffic, Terms(num_stages=stages))


def simulate(job: tuple[str, str, int, int, int | None, str, list[Arrival]]) -> dict[str, Any]:
    """One scheduler on one slice; None as figures where the model leaves no room for the longest request."""
    model_name, slice_name, size, replicas, stages, scheduler, everything = job
    arrivals = everything[::replicas]
    longest = max(arrival.input_len + arrival.output_len for arrival in arrivals)
    started = time.perf_counter()
    plan = plan_for(model_name, slice_name, Traffic.of(arrivals, size), stages)
    model, slice_ = plan.model, plan.slice
    pricing = Pricing(slice_, calibration_for(slice_.chip))
    residents = 4 * size if scheduler == "mlfq" else 0
    prompt = CHUNK if scheduler == "fcfs-chunked" else longest
    runner, price = cost_runner(plan, pricing, Sizing(size, residents, longest, prompt, page_size=64, host_bytes=64e9))
    options = PolicyOptions(size, 0.3, Eviction.PROACTIVE)
    engine = Engine(runner, policy=make_policy(scheduler, options, price.estimates(runner.limits)), clock=runner.clock)
    refused = play(engine, arrivals, runner.clock, next_finish=lambda: runner.next_finish)
    seconds = runner.clock.now - arrivals[0].time
    machine = Machine(num_params(model), slice_.num_chips, slice_.chip.peak_bf16)
    report = RunReport.of(engine.metrics, seconds, refused, BOUNDS, machine)
    wall = time.perf_counter() - started
    print(f"{model_name} {slice_name} {size} 1/{replicas} {scheduler}: {report.goodput:.1%} in {wall:.0f} s", file=sys.stderr)
    names = {"model": model_name, "slice": slice_name, "max_batch": size, "replicas": replicas, "stages": stages}
    return names | {"scheduler": scheduler, "layout": readable_name(plan.layout, plan.axis_sizes), "wall_seconds": wall} | report.as_json()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, help="only the first so many")
    parser.add_argument("--only", default="", metavar="TEXT", help="slices whose name has this text; the rows of others are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args()
    arrivals = read_trace(args.trace, args.requests)
    chosen = [case for case in CASES if args.only in case[1]]
    kept = [run for run in read(__file__, missing={"runs": []})["runs"] if args.only not in run["slice"]]
    with concurrent.futures.ProcessPoolExecutor(max_workers=args.workers) as pool:
        runs = sorted([*kept, *pool.map(simulate, [(*case, name, arrivals) for case in chosen for name in SCHEDULERS])], key=_place)
    write(__file__, {"trace": args.trace.name, "requests": len(arrivals), "seconds": arrivals[-1].time, "runs": runs})
    return 0


def _place(run: dict[str, Any]) -> tuple[int, int]:
    case = run["model"], run["slice"], run["max_batch"], run["replicas"], run["stages"]
    return CASES.index(case), SCHEDULERS.index(run["scheduler"])


if __name__ == "__main__":
    raise SystemExit(main())
