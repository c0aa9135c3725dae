"""Draw results.json: `python -m experiments.azure_trace.draw` writes azure.png and the table of the README."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from experiments.results import next_to, place, read


def _case(run: dict[str, Any]) -> tuple[str, ...]:
    stages = {None: "", 1: ", one stage"}[run["stages"]]
    return run["model"], f"{run['replicas']} × {run['slice']}{stages}", f"batch {run['max_batch']}"


def _table(runs: list[dict[str, Any]], cases: list[tuple[str, ...]], schedulers: list[str]) -> str:
    """Shares within both bounds by scheduler; price and times of a token under `fcfs`."""
    shown = " | ".join(f"`{name}`" for name in schedulers)
    lines = [f"| model | slices | batch | {shown} | chip·ms per token | P50 and P95 of a token, ms |", "|---" * (len(schedulers) + 5) + "|"]
    for case in cases:
        mine = {run["scheduler"]: run for run in runs if _case(run) == case}
        shares = " | ".join(f"{100 * mine[name]['goodput']['share']:.1f} %" for name in schedulers)
        each = mine["fcfs"]["latency"]["time_per_token"]
        times = f"{1e3 * each['p50']:.1f}, {1e3 * each['p95']:.1f}"
        lines.append(f"| {' | '.join(case)} | {shares} | {mine['fcfs']['chip_ms_per_token']:.1f} | {times} |")
    return "\n".join(lines)


def main() -> int:
    runs = read(__file__)["runs"]
    cases = list(dict.fromkeys(_case(run) for run in runs))
    schedulers = list(dict.fromkeys(run["scheduler"] for run in runs))
    figure, axes = plt.subplots(2, 1, figsize=(10, 6), sharex=True, layout="constrained")
    width = 0.8 / len(schedulers)
    for at, scheduler in enumerate(schedulers):
        mine = {_case(run): run for run in runs if run["scheduler"] == scheduler}
        where = [number + at * width for number in range(len(cases))]
        axes[0].bar(where, [mine[case]["goodput"]["share"] for case in cases], width, label=scheduler)
        axes[1].bar(where, [mine[case]["latency"]["ttft"]["p95"] for case in cases], width)
    axes[0].set_ylabel("share within 1 s TTFT\nand 50 ms per token")
    axes[0].set_ylim(0, 1.2)
    axes[0].legend(ncols=5, fontsize=8)
    axes[1].set(ylabel="P95 time to first token, s", yscale="log")
    axes[1].set_xticks([n + 0.3 for n in range(len(cases))], ["\n".join(case).replace(", ", "\n") for case in cases], fontsize=6)
    figure.savefig(next_to(__file__, "azure.png"), dpi=110)
    table = _table(runs, cases, schedulers)
    print(table)
    place(__file__, table)
    for run in runs:
        latency = run["latency"]
        figures = ", ".join(f"{name} {latency[name]['p50']:.3f}, {latency[name]['p95']:.3f} s" for name in ("ttft", "time_per_token"))
        print(f"{', '.join(_case(run))}, {run['scheduler']}: {run['layout']}; P50 and P95: {figures}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
