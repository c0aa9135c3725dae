"""Orca's and FastServe's comparisons on the real engine: the demo model on one CPU device, policies over load. Writes policies.json.

    python -m experiments.scheduling_on_cpu.compare [orca|fastserve] [--clock cpu]      # two or three minutes each

Two kinds of requests, each a task whose prompt says how long the answer is: prompts and answers uniform, with Orca's lengths over
eight, and lengths of conversations as FastServe draws them, prompts over sixteen and answers over fifty. Loads are shares of the rate
at which `orca` has worked off a backlog just before. All policies of a load run in turns on the same arrivals; figures are medians of
the rounds. Residents may be four batches, as in the simulations, and pages are swapped ahead.
With `--clock cpu` seconds are those of CPU that the process uses, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.results import medians, read, write
from experiments.scheduling_on_cpu.runs import CLOCKS, ROWS, add_clock, load_demo, real
from partinf import api
from partinf.buckets import Capacity
from partinf.engine.estimates import Estimates
from partinf.engine.policies.ranked import Eviction
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.measure.estimates import measured_estimates
from partinf.simulation.arrivals import Lengths, chat_lengths, parse_arrivals, uniform_lengths
from partinf.simulation.play import Clock

ROUNDS, REQUESTS = 3, 200
LOADS = (0.3, 0.6, 0.9, 1.2, 1.5)
ALPHA_STEPS = 15  # FastServe's 0.3 s are about so many iterations of OPT-13B


@dataclass(frozen=True)
class Traffic:
    """Requests of one paper, and the policies that it compares; a policy may be followed by α in seconds."""

    name: str
    lengths: Lengths
    policies: tuple[str, ...]


def scaled_chat(rng: random.Random) -> tuple[int, int]:
    """Lengths of conversations: prompts over sixteen, to 64 tokens, answers over fifty, to 20 and the end."""
    prompt, answer = chat_lengths(rng)
    return max(5, prompt // 16), max(2, answer // 50 + 1)


_BOTH = (
    Traffic("orca", uniform_lengths((5, 64), (2, 17)), ("request-level", "fastertransformer", "orca", "fcfs")),
    Traffic("fastserve", scaled_chat, ("fcfs", "orca", "mlfq", "mlfq 30", "mlfq-naive", "srpt")),
)
TRAFFIC = {traffic.name: traffic for traffic in _BOTH}


def run(model: api.Model, policy: str, arrivals: list[Any], estimates: Estimates, clock: Clock) -> dict[str, float]:
    name, _, alpha = policy.partition(" ")
    options = PolicyOptions(ROWS, float(alpha) if alpha else ALPHA_STEPS * estimates.decode, Eviction.PROACTIVE)
    return real(model, make_policy(name, options, estimates), arrivals, clock)


def compare(model: api.Model, traffic: Traffic, make_clock: Callable[[], Clock]) -> dict[str, Any]:
    """The policies of a paper on its traffic, over load."""
    estimates = measured_estimates(model.runner, model.plan.buckets)
    backlog = parse_arrivals("backlog", traffic.lengths, REQUESTS)
    capacities: list[float] = []
    curves: dict[str, list[dict[str, float]]] = {policy: [] for policy in traffic.policies}
    for load in LOADS:
        runs: dict[str, list[dict[str, float]]] = {policy: [] for policy in traffic.policies}
        for _ in range(ROUNDS):
            capacities.append(run(model, "orca", backlog, estimates, make_clock())["requests_per_second"])
            arrivals = parse_arrivals(f"poisson:{load * capacities[-1]}", traffic.lengths, REQUESTS)
            for policy, found in runs.items():
                found.append(run(model, policy, arrivals, estimates, make_clock()))
        for policy, found in runs.items():
            curves[policy].append({"load": load} | medians(found))
            shown = {key: round(1e3 * curves[policy][-1][key], 1) for key in ("p50_per_token", "mean_per_token", "mean_completion")}
            print(traffic.name, load, policy, shown, file=sys.stderr)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],
        "clock": make_clock.__name__,
        "rows": ROWS,
        "requests": REQUESTS,
        "rounds": ROUNDS,
        "alpha": ALPHA_STEPS * estimates.decode,
        "decode_seconds": estimates.decode,
        "prefill_seconds": estimates.first_iteration(1),
        "page_seconds": estimates.page_out,
        "capacities": capacities,
        "curves": curves,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("traffic", nargs="*", choices=[*TRAFFIC, []], metavar="TRAFFIC", help="orca, fastserve; both if not given")
    add_clock(parser)
    args = parser.parse_args()
    capacity = Capacity(max_rows=ROWS, max_len=128, prefill_tokens=64, random=False, max_prompt_len=64)
    model = load_demo(capacity, residents=4 * ROWS, num_host_pages=512)
    for name in args.traffic or TRAFFIC:
        found = compare(model, TRAFFIC[name], CLOCKS[args.clock])
        results: dict[str, Any] = read(__file__, "policies.json", missing={})
        write(__file__, results | {name: found}, "policies.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
