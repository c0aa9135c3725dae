"""Draw results.json: `python -m experiments.orca_175b_on_16_a100.draw` writes orca.png."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
STYLE = {"orca": ("tab:blue", "-"), "fastertransformer": ("tab:red", "--"), "request-level": ("tab:gray", ":")}
MARKER = {1: "o", 8: "s", 16: "^", 32: "D"}


def main() -> int:
    results = json.loads((HERE / "results.json").read_text())
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), sharey=True, layout="constrained")
    panels = {
        "175b": "GPT-3 175B, 2 stages: prompts U(32, 512), answers U(1, 128)",
        "same": "GPT-3 175B, 2 stages: all 272 in, 64 out",
        "341b": "GPT-3 341B, 4 stages: prompts U(32, 512), answers U(1, 128)",
    }
    for axis, (kind, title) in zip(axes, panels.items(), strict=True):
        curves = {key: value for part, found in results["parts"].items() if part.startswith(kind) for key, value in found.items()}
        for name, points in curves.items():
            scheduler, size = name.rsplit(" ", 1)
            color, line = STYLE[scheduler]
            shown = [point for point in points if point["latency"] < 1.0]
            x, y = [point["throughput"] for point in shown], [1e3 * point["latency"] for point in shown]
            axis.plot(x, y, line, color=color, marker=MARKER[int(size)], markersize=4, label=f"{scheduler}, batch {size}")
        axis.axhline(190, color="black", linewidth=0.7)
        axis.set(title=title, xlabel="requests per second", xscale="log", ylim=(0, 600))
    axes[0].set_ylabel("median latency per generated token, ms")
    axes[0].legend(fontsize=7)
    figure.suptitle("Pipeline stages of 8 A100-40GB, simulated; the line is 190 ms per token")
    figure.savefig(HERE / "orca.png", dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
