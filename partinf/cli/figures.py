"""The figures of a run, simulated or real, as tables or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partinf.simulation.report import RunReport


def load_as_given(args: argparse.Namespace) -> tuple[str, str]:
    """Arrivals and lengths as given, to be repeated in the output; of a trace its file's name."""
    if args.arrivals.startswith("trace:"):
        return f"trace:{Path(args.arrivals.removeprefix('trace:')).name}", "of the trace"
    return args.arrivals, args.lengths


def show(about: Any, report: RunReport, form: str, heading: Sequence[str]) -> None:
    """Print a report as JSON after the fields of `about`, a dataclass, or as tables under the lines of `heading`."""
    if form == "json":
        print(json.dumps(asdict(about) | report.as_json(), indent=2))
        return
    from rich.console import Console

    from partinf.foundation.terminal import plain_table

    console = Console()
    for line in heading:
        console.print(line, highlight=False, soft_wrap=True)
    table = plain_table("ms", ">mean", ">P50", ">P95", ">P99")
    for name, values in report.latencies.items():
        label = {"ttft": "time to first token", "normalized_latency": "completion / tokens"}.get(name, name.replace("_", " "))
        table.add_row(label, *(f"{1e3 * value:.1f}" for value in (values.mean, values.p50, values.p95, values.p99)))
    console.print(table)
    rest = plain_table("", ">", show_header=False)
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
        ("iterations, sequences per iteration", _text("{}, {:.2f}", counted.iterations, counted.mean_batch_size)),
        ("share of slots occupied, padding", _text("{:.1%}, {:.1%}", counted.occupancy, report.padding)),
        ("queue, mean and longest", _text("{:.2f}, {}", counted.mean_queue, counted.longest_queue)),
        ("preemptions, recomputed tokens", _text("{}, {}", counted.preemptions, counted.recomputed_tokens)),
        ("swapped out, pages out and in", _text("{}, {}, {}", counted.swap_outs, counted.swapped_out_pages, counted.swapped_in_pages)),
        ("prompt tokens found in the prefix cache", _text("{:.1%}", report.cache_hits)),
        ("MFU", _text("{:.2%}", report.mfu)),
        ("chip·ms per generated token", _text("{:.3f}", report.chip_ms_per_token)),
    ]


def _text(form: str, *values: float | None) -> str:
    """The figures in this form; a dash where one of them is unknown."""
    return "–" if None in values else form.format(*values)
