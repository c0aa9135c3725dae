"""The figures of a run, simulated or real, as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any


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
