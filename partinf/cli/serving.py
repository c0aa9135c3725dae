"""What `simulate` and `bench` share: flags for scheduler and requests, and the table of a run's figures."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from partinf.errors import collect, nearest, raise_offences

if TYPE_CHECKING:
    from partinf.engine.policies.registry import PolicyOptions
    from partinf.simulation.arrivals import Arrival
    from partinf.simulation.report import Bounds, RunReport

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


def said_of_load(args: argparse.Namespace) -> tuple[str, str]:
    """What was said of arrivals and lengths, to be repeated in the output; of a trace its file's name."""
    if args.arrivals.startswith("trace:"):
        return f"trace:{Path(args.arrivals.removeprefix('trace:')).name}", "of the trace"
    return args.arrivals, args.lengths


def need(offences: list[str], value: _T | None) -> _T:
    """The value, or every offence so far."""
    raise_offences(offences)
    assert value is not None
    return value


def show(about: Any, report: RunReport, form: str, heading: Sequence[str]) -> None:
    """Print a report as JSON after the fields of `about`, a dataclass, or as tables under the lines of `heading`."""
    if form == "json":
        print(json.dumps(asdict(about) | report.as_json(), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for line in heading:
        console.print(line, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms")
    for title in ("mean", "P50", "P95", "P99"):
        table.add_column(title, justify="right")
    for name, values in report.latencies.items():
        label = {"ttft": "time to first token", "normalized_latency": "completion / tokens"}.get(name, name.replace("_", " "))
        table.add_row(label, *(f"{1e3 * value:.1f}" for value in (values.mean, values.p50, values.p95, values.p99)))
    console.print(table)
    rest = Table(box=None, pad_edge=False, show_header=False)
    rest.add_column()
    rest.add_column(justify="right")
    for label, value in _lines(report):
        rest.add_row(label, value)
    console.print(rest)


def _lines(report: RunReport) -> list[tuple[str, str]]:
    counted, bounds = report.summary, report.bounds
    given = [(label, bound) for label, bound in (("TTFT", bounds.ttft), ("TPOT", bounds.time_per_token)) if bound is not None]
    bound = " and ".join(f"{label} ≤ {1e3 * seconds:g} ms" for label, seconds in given) or "no bound"
    return [
        ("requests answered, refused", _text("{}, {}", counted.num_finished, report.refused)),
        ("seconds", _text("{:.2f}", report.seconds)),
        ("requests/s", _text("{:.3f}", report.requests_per_second)),
        ("generated, prompt tokens/s", _text("{:.1f}, {:.1f}", report.generated_tokens_per_second, report.prompt_tokens_per_second)),
        (f"goodput, {bound}", _text("{:.1%}, {:.3f}/s", report.goodput, report.good_requests_per_second)),
        ("iterations, sequences in each", _text("{}, {:.2f}", counted.iterations, counted.mean_batch_size)),
        ("share of slots occupied, padding", _text("{:.1%}, {:.1%}", counted.occupancy, report.padding)),
        ("queue, mean and longest", _text("{:.2f}, {}", counted.mean_queue, counted.longest_queue)),
        ("preemptions, tokens computed again", _text("{}, {}", counted.preemptions, counted.recomputed_tokens)),
        ("swapped out, pages out and in", _text("{}, {}, {}", counted.swap_outs, counted.swapped_out_pages, counted.swapped_in_pages)),
        ("prompt tokens found in the prefix cache", _text("{:.1%}", report.cache_hits)),
        ("MFU", _text("{:.2%}", report.mfu)),
        ("chip·ms per generated token", _text("{:.3f}", report.chip_ms_per_token)),
    ]


def _text(form: str, *values: float | None) -> str:
    """The figures in this form; a dash where one of them cannot be said."""
    return "–" if None in values else form.format(*values)
