"""Draw results.json: `python -m experiments.fastserve_opt_on_a100.draw` writes fastserve.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLORS = {"orca": "tab:gray", "fcfs": "tab:red", "mlfq": "tab:blue", "mlfq-naive": "tab:cyan", "srpt": "tab:green"}


def label(point: dict[str, Any]) -> str:
    alpha = f", α {point['alpha']:g} s" if point["scheduler"].startswith("mlfq") else ""
    how = "" if point["eviction"] == "proactive" else f", {point['eviction']}"
    return point["scheduler"] + alpha + how


def main() -> int:
    curves = json.loads((HERE / "results.json").read_text())["curves"]
    models = list(dict.fromkeys(curve[0]["model"] for curve in curves))
    figure, axes = plt.subplots(2, len(models), figsize=(4.2 * len(models), 7), layout="constrained", squeeze=False)
    for column, model in enumerate(models):
        for curve in (c for c in curves if c[0]["model"] == model):
            first = curve[0]
            line = {"proactive": "-", "reactive": "--", "recompute": ":"}[first["eviction"]]
            style = {"color": COLORS[first["scheduler"]], "linestyle": line, "marker": "o" if first["alpha"] < 1 else "s", "markersize": 3}
            rates = [point["rate"] for point in curve]
            axes[0][column].plot(rates, [point["per_token"][0] for point in curve], label=label(first), **style)
            axes[1][column].plot(rates, [point["completion"][0] for point in curve], **style)
        axes[0][column].axhline(0.3, color="black", linewidth=0.7)
        axes[0][column].set(title=model, ylim=(0, 0.6))
        axes[1][column].set(xlabel="requests per second", ylim=(0, 250))
        axes[0][column].legend(fontsize=6)
    axes[0][0].set_ylabel("mean latency per generated token, s")
    axes[1][0].set_ylabel("mean completion time, s")
    figure.savefig(HERE / "fastserve.png", dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
