"""What `simulate` and `bench` share: flags for scheduler and requests, and the table of a run's figures."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from partinf.errors import collect, nearest, raise_offences

if TYPE_CHECKING:
    from partinf.engine.policies.registry import PolicyOptions
    from partinf.simulation.arrivals import Arrival
    from partinf.simulation.report import Bounds

_T = TypeVar("_T")


@dataclass(frozen=True)
class Load:
    """Scheduler, requests and bounds, read and checked."""

    scheduler: str
    options: PolicyOptions
    arrivals: list[Arrival]
    bounds: Bounds


def add_load_arguments(parser: argparse.ArgumentParser, requests: int, lengths: str) -> None:
    """Scheduler, arrivals, bounds and output; with the command's own defaults for the number of requests and their lengths."""
    from partinf.engine.policies.registry import PREEMPTIVE, described

    parser.add_argument("--scheduler", default="fcfs", metavar="NAME", help=f"{described()} (default: fcfs)")
    parser.add_argument("--arrivals", default="poisson:1", metavar="HOW", help="poisson:RATE, gamma:RATE:CV, backlog or trace:FILE")
    parser.add_argument("--lengths", default=lengths, metavar="HOW", help=f"uniform:LOW-HIGH:LOW-HIGH, fixed:IN:OUT or chat ({lengths})")
    parser.add_argument("--requests", default="0", metavar="N", help=f"how many (default: {requests}, or the whole trace)")
    parser.add_argument("--seed", default="0", metavar="N", help="of arrivals and lengths (default: 0)")
    parser.add_argument("--max-batch", default="0", metavar="N", help="sequences per iteration")
    parser.add_argument(
        "--eviction", default="recompute", metavar="HOW", help=f"of {', '.join(PREEMPTIVE)}: recompute, reactive, proactive, defer"
    )
    parser.add_argument("--alpha-ms", default="300", metavar="MS", help="waiting time after which mlfq promotes (default: 300)")
    parser.add_argument("--prefix-caching", action="store_true", help="share KV pages of equal prompt beginnings")
    parser.add_argument("--ttft", metavar="MS", help="bound on the time to first token, for goodput")
    parser.add_argument("--tpot", metavar="MS", help="bound on the time per output token, for goodput")
    parser.add_argument("--trace", metavar="FILE", help="write the schedule as a Chrome/Perfetto trace")
    parser.add_argument("--format", default="table", metavar="FORMAT", help="table or json")
    parser.set_defaults(default_requests=requests)


def read_load(args: argparse.Namespace, offences: list[str], default_batch: int) -> Load | None:
    """What `add_load_arguments` declared; what is wrong joins `offences`."""
    from partinf.engine.policies.ranked import Eviction
    from partinf.engine.policies.registry import POLICIES, PREEMPTIVE, PolicyOptions
    from partinf.simulation.arrivals import parse_arrivals, parse_lengths
    from partinf.simulation.report import Bounds

    before = len(offences)
    if args.scheduler not in POLICIES:
        offences.append(f"--scheduler {args.scheduler}: unknown{nearest(args.scheduler, POLICIES)}")
    if args.eviction not in list(Eviction):
        offences.append(f"--eviction {args.eviction}: valid: {', '.join(Eviction)}")
    elif args.eviction != Eviction.RECOMPUTE and args.scheduler in POLICIES and not POLICIES[args.scheduler].preemptive:
        offences.append(f"--eviction {args.eviction}: scheduler {args.scheduler} has no such choice; {', '.join(PREEMPTIVE)} have it")
    if args.format not in ("table", "json"):
        offences.append(f"--format {args.format}: valid: table, json")
    numbers = {flag: whole(args, flag, offences) for flag in ("requests", "seed", "max_batch")}
    alpha, ttft, tpot = (number(args, flag, offences) for flag in ("alpha_ms", "ttft", "tpot"))
    lengths = collect(offences, lambda: parse_lengths(args.lengths))
    if lengths is None or len(offences) > before:
        return None
    count = numbers["requests"] or (None if args.arrivals.startswith("trace:") else args.default_requests)
    arrivals = collect(offences, lambda: parse_arrivals(args.arrivals, lengths, count, numbers["seed"]))
    if arrivals is None or alpha is None:
        return None
    options = PolicyOptions(numbers["max_batch"] or default_batch, alpha / 1e3, Eviction(args.eviction))
    bounds = Bounds(None if ttft is None else ttft / 1e3, None if tpot is None else tpot / 1e3)
    return Load(args.scheduler, options, arrivals, bounds)


def whole(args: argparse.Namespace, name: str, offences: list[str]) -> int:
    """A flag that is a whole number of at least 0."""
    text = getattr(args, name)
    if text.isdigit():
        return int(text)
    offences.append(f"--{name.replace('_', '-')} {text}: a whole number, at least 0, is needed")
    return 0


def number(args: argparse.Namespace, name: str, offences: list[str]) -> float | None:
    """A flag that is a number of at least 0, or absent."""
    text = getattr(args, name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if math.isfinite(value) and value >= 0:
        return value
    offences.append(f"--{name.replace('_', '-')} {text}: a number, at least 0, is needed")
    return None


def need(offences: list[str], value: _T | None) -> _T:
    """The value, or every offence so far."""
    raise_offences(offences)
    assert value is not None
    return value


def show(figures: dict[str, Any], form: str, heading: Sequence[str]) -> None:
    """Print a report as JSON, or as tables under the lines of `heading`."""
    if form == "json":
        print(json.dumps(figures, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    from partinf.simulation.report import latency_rows

    console = Console()
    for line in heading:
        console.print(line, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms")
    for title in ("mean", "P50", "P95", "P99"):
        table.add_column(title, justify="right")
    for name, values in latency_rows(figures):
        label = {"ttft": "time to first token", "normalized_latency": "completion / tokens"}.get(name, name.replace("_", " "))
        table.add_row(label, *(f"{1e3 * value:.1f}" for value in (values.mean, values.p50, values.p95, values.p99)))
    console.print(table)
    rest = Table(box=None, pad_edge=False, show_header=False)
    rest.add_column()
    rest.add_column(justify="right")
    for label, value in _lines(figures):
        rest.add_row(label, value)
    console.print(rest)


def _lines(figures: dict[str, Any]) -> list[tuple[str, str]]:
    requests, rates, counters, good = (figures[key] for key in ("requests", "throughput", "counters", "goodput"))
    bounds = " and ".join(
        f"{label} ≤ {1e3 * good[key]:g} ms"
        for label, key in (("TTFT", "ttft_bound"), ("TPOT", "time_per_token_bound"))
        if good[key] is not None
    )
    shown: list[tuple[str, Callable[[], str]]] = [
        ("requests answered, refused", lambda: f"{requests['finished']}, {requests['refused']}"),
        ("seconds", lambda: f"{figures['seconds']:.2f}"),
        ("requests/s", lambda: f"{rates['requests_per_second']:.3f}"),
        ("generated, prompt tokens/s", lambda: f"{rates['generated_tokens_per_second']:.1f}, {rates['prompt_tokens_per_second']:.1f}"),
        (f"goodput, {bounds or 'no bound'}", lambda: f"{good['share']:.1%}, {good['requests_per_second']:.3f}/s"),
        ("iterations, sequences in each", lambda: f"{counters['iterations']}, {figures['mean_batch_size']:.2f}"),
        ("share of slots occupied, padding", lambda: f"{figures['occupancy']:.1%}, {figures['padding']:.1%}"),
        ("queue, mean and longest", lambda: f"{counters['mean_queue']:.2f}, {counters['longest_queue']}"),
        ("preemptions, tokens computed again", lambda: f"{counters['preemptions']}, {counters['recomputed_tokens']}"),
        (
            "swapped out, pages out and in",
            lambda: f"{counters['swap_outs']}, {counters['swapped_out_pages']}, {counters['swapped_in_pages']}",
        ),
        ("prompt tokens found in the prefix cache", lambda: f"{figures['cache_hits']:.1%}"),
        ("MFU", lambda: f"{figures['mfu']:.2%}"),
        ("chip·ms per generated token", lambda: f"{figures['chip_ms_per_token']:.3f}"),
    ]
    lines = []
    for label, text in shown:
        try:
            lines.append((label, text()))
        except TypeError:  # a figure that cannot be said is null
            lines.append((label, "–"))
    return lines
