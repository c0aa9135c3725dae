"""Draw policies.json and results.json: `python -m experiments.scheduling_on_cpu.draw` writes scheduling.png and prints the tables."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from experiments.results import next_to, read

COLOURS = {
    "request-level": "tab:gray",
    "fastertransformer": "tab:red",
    "orca": "tab:blue",
    "fcfs": "tab:cyan",
    "mlfq": "tab:orange",
    "mlfq 30": "tab:brown",
    "mlfq-naive": "tab:pink",
    "srpt": "tab:green",
}


def main() -> int:
    policies = read(__file__, "policies.json")
    simulator = read(__file__)["simulator"]
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    _curves(axes[0], policies["orca"], "p50_per_token", "Orca's lengths / 8: median latency per token, ms")
    _curves(axes[1], policies["fastserve"], "mean_per_token", "conversations / 16: mean latency per token, ms")
    _curves(axes[2], policies["fastserve"], "mean_completion", "conversations / 16: mean completion time, ms")
    _errors(axes[3], simulator)
    figure.suptitle("Policies over load on the real engine (demo model, one CPU device), and the simulator's error", fontsize=11)
    figure.savefig(next_to(__file__, "scheduling.png"), dpi=110)
    print_table(policies["orca"], "p50_per_token")
    for key in ("mean_per_token", "mean_completion", "mean_ttft"):
        print_table(policies["fastserve"], key)
    return 0


def print_table(found: dict[str, Any], key: str) -> None:
    """A figure in ms by load and policy, as lines of the README's tables."""
    curves = found["curves"]
    print(f"\n{key}, {found['date']}, α {1e3 * found['alpha']:.0f} ms\n\n| load | {' | '.join(curves)} |\n|---{'|---' * len(curves)}|")
    for number, point in enumerate(next(iter(curves.values()))):
        print(f"| {point['load']} | {' | '.join(f'{1e3 * points[number][key]:.1f}' for points in curves.values())} |")


def _curves(axis: plt.Axes, found: dict[str, Any], key: str, title: str) -> None:
    for policy, points in found["curves"].items():
        label = f"mlfq, α {1e3 * found['alpha']:.0f} ms" if policy == "mlfq" else policy.replace("mlfq 30", "mlfq, α 30 s")
        axis.plot([p["load"] for p in points], [1e3 * p[key] for p in points], marker="o", markersize=4, color=COLOURS[policy], label=label)
    axis.set_title(title, fontsize=9)
    axis.set(xlabel="arrivals over what orca works off", yscale="log")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.2, which="both")


def _errors(axis: plt.Axes, simulator: list[dict[str, Any]]) -> None:
    keys = {"throughput": 0.15, "mean_completion": 0.15, "p95_completion": 0.25}
    labels = []
    for row in simulator:
        for key, bound in keys.items():
            place = len(labels)
            axis.plot([place - 0.4, place + 0.4], [bound, bound], color="black", linewidth=0.7)
            axis.plot([place - 0.4, place + 0.4], [-bound, -bound], color="black", linewidth=0.7)
            axis.bar(place - 0.2, row["error_measured"][key], 0.4, color="tab:blue")
            axis.bar(place + 0.2, row["error_calibrated"][key], 0.4, color="tab:orange")
            labels.append(f"{row['load']}, {row['scheduler']}: {key.replace('_completion', '')}")
    axis.set_title("predicted/real - 1: measured (blue), calibrated", fontsize=9)
    axis.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)


if __name__ == "__main__":
    raise SystemExit(main())
