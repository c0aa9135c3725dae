"""Draw results.json: `python -m experiments.orca_175b_on_16_a100.draw` writes orca.png and prints the tables."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from experiments.orca_175b_on_16_a100.measure import whole_curves
from experiments.results import next_to, read

STYLE = {"orca": ("tab:blue", "-"), "fastertransformer": ("tab:red", "--"), "request-level": ("tab:gray", ":")}
MARKER = {1: "o", 8: "s", 16: "^", 32: "D"}


def print_loads(results: dict[str, Any]) -> None:
    """Requests per second of every setting at both latencies, as lines of the README's table; factors of the best ones."""
    names = [(title, where) for title in ("175b", "same", "341b") for where in ("190 ms", "twice low load")]
    columns = [results[f"{title} at {where}"] for title, where in names]
    print("| | " + " | ".join(f"{title}, {1e3 * found['latency']:.0f} ms" for (title, _), found in zip(names, columns, strict=True)) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in dict.fromkeys(name for column in columns for name in column["each"]):
        loads = [column["each"].get(name, "") for column in columns]
        print(f"| {name} | " + " | ".join("none" if load is None else load if load == "" else f"{load:.3g}" for load in loads) + " |")
    for baseline in ("fastertransformer", "request-level"):
        factors = [column[f"factor over {baseline}"] for column in columns]
        print(f"| over {baseline} | " + " | ".join("" if factor is None else f"{factor:.1f}×" for factor in factors) + " |")


def main() -> int:
    results = read(__file__)
    print_loads(results)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), sharey=True, layout="constrained")
    panels = {
        "175b": "175B, 2 stages: U(32, 512) in, U(1, 128) out",
        "same": "175B, 2 stages: all 272 in, 64 out",
        "341b": "341B, 4 stages: U(32, 512) in, U(1, 128) out",
    }
    for axis, (kind, title) in zip(axes, panels.items(), strict=True):
        for name, points in whole_curves(results["parts"], kind).items():
            scheduler, size = name.rsplit(" ", 1)
            color, line = STYLE[scheduler]
            x, y = [point["throughput"] for point in points], [1e3 * point["latency"] for point in points]
            axis.plot(x, y, line, color=color, marker=MARKER[int(size)], markersize=4, label=f"{scheduler}, batch {size}")
        axis.axhline(190, color="black", linewidth=0.7)
        axis.set(title=title, xlabel="requests per second", xscale="log", ylim=(0, 600))
    axes[0].set_ylabel("median latency per generated token, ms")
    axes[0].legend(fontsize=7)
    figure.suptitle("GPT-3 on pipeline stages of 8 A100-40GB, simulated; the line is 190 ms per token")
    figure.savefig(next_to(__file__, "orca.png"), dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
