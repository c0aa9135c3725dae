"""The load that `simulate` and `bench` put on an engine: scheduler, requests and bounds, declared as flags and read."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partinf.cli.flags import FORMATS, Flags
from partinf.foundation.limits import MAX_BATCH, MAX_REQUESTS, MAX_SECONDS

if TYPE_CHECKING:
    from partinf.engine.policies.registry import PolicyOptions
    from partinf.simulation.arrivals import Arrival
    from partinf.simulation.report import LatencyBounds


@dataclass(frozen=True)
class OfferedLoad:
    """Scheduler, requests and bounds, read and checked."""

    scheduler: str
    options: PolicyOptions
    arrivals: list[Arrival]
    bounds: LatencyBounds


def add_load_arguments(parser: argparse.ArgumentParser, requests: int, lengths: str, rate: int = 1) -> None:
    """Scheduler, arrivals, bounds and output; with the command's own defaults for the number of requests, their lengths, and how many of
    them come in a second."""
    from partinf.engine.policies.registry import PREEMPTIVE, described

    parser.add_argument("--scheduler", default="fcfs", metavar="NAME", help=f"{described()} (default: fcfs)")
    arrivals = f"poisson:RATE, gamma:RATE:CV, backlog or trace:FILE (default: poisson:{rate})"
    parser.add_argument("--arrivals", default=f"poisson:{rate}", metavar="HOW", help=arrivals)
    parser.add_argument(
        "--lengths", default=lengths, metavar="HOW", help=f"uniform:LOW-HIGH:LOW-HIGH, fixed:IN:OUT or chat (default: {lengths})"
    )
    parser.add_argument("--requests", default="0", metavar="N", help=f"how many (default: {requests}, or the whole trace)")
    parser.add_argument("--seed", default="0", metavar="N", help="of arrivals and lengths (default: 0)")
    parser.add_argument("--max-batch", default="0", metavar="N", help="sequences per iteration")
    parser.add_argument(
        "--eviction", default="recompute", metavar="HOW", help=f"of {', '.join(PREEMPTIVE)}: recompute, reactive, proactive, defer"
    )
    parser.add_argument(
        "--alpha-ms", default="300", metavar="MS", help="waiting time in ms after which mlfq promotes a request (default: 300)"
    )
    parser.add_argument("--prefix-caching", action="store_true", help="share KV pages of common prompt prefixes")
    parser.add_argument("--ttft", metavar="MS", help="bound on the time to first token, for goodput")
    parser.add_argument("--tpot", metavar="MS", help="bound on the time per output token, for goodput")
    parser.add_argument("--trace", metavar="FILE", help="write the schedule as a Chrome/Perfetto trace")
    parser.add_argument("--format", default="table", metavar="FORMAT", help="table or json")
    parser.set_defaults(default_requests=requests)


def read_load(flags: Flags, default_batch: int) -> OfferedLoad | None:
    """What `add_load_arguments` declared; None where some of it is wrong, which the flags' offences say."""
    from partinf.engine.policies.ranked import Eviction
    from partinf.engine.policies.registry import POLICIES, PREEMPTIVE, PolicyOptions
    from partinf.simulation.arrivals import parse_arrivals, parse_lengths
    from partinf.simulation.report import LatencyBounds

    args, before = flags.args, len(flags.offences)
    scheduler, eviction = flags.word("scheduler", POLICIES), flags.member("eviction", Eviction)
    if eviction != Eviction.RECOMPUTE and args.scheduler in POLICIES and not POLICIES[args.scheduler].preemptive:
        flags.refuse("eviction", f"scheduler {args.scheduler} has no such choice; {', '.join(PREEMPTIVE)} have it")
    requests, seed, batch = flags.whole("requests", high=MAX_REQUESTS), flags.whole("seed"), flags.whole("max_batch", high=MAX_BATCH)
    alpha = flags.number("alpha_ms", high=1e3 * MAX_SECONDS)
    ttft, tpot = (flags.optional_number(name, high=1e3 * MAX_SECONDS) for name in ("ttft", "tpot"))
    flags.word("format", FORMATS)
    flags.target("trace")
    lengths = flags.collect(lambda: parse_lengths(args.lengths))
    if lengths is None or len(flags.offences) > before:
        return None
    count = requests or (None if args.arrivals.startswith("trace:") else args.default_requests)
    arrivals = flags.collect(lambda: parse_arrivals(args.arrivals, lengths, count, seed))
    if arrivals is None:
        return None
    bounds = LatencyBounds(None if ttft is None else ttft / 1e3, None if tpot is None else tpot / 1e3)
    return OfferedLoad(scheduler, PolicyOptions(batch or default_batch, alpha / 1e3, eviction), arrivals, bounds)
