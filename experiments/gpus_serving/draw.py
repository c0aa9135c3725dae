"""Draw the selection: `python -m experiments.gpus_serving.draw` writes gpus.png, predicted over measured by chip, GPUs and requests."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from experiments.gpus_serving.measure import RESULTS, Fitted
from experiments.gpus_serving.rows import SELECTION, compared, read

COLORS = {1: "tab:blue", 2: "tab:green", 4: "tab:orange", 8: "tab:red"}
MARKERS = {"trtllm": "o", "vllm": "s", "sglang": "^"}


def main() -> int:
    fitted = Fitted(**json.loads(RESULTS.read_text())["constants"])
    rows, _ = compared(read(SELECTION))
    chips = ("h100", "h200", "b200")
    figure, axes = plt.subplots(1, len(chips), figsize=(14, 4.5), sharex=True, sharey=True, layout="constrained")
    for axis, chip in zip(axes, chips, strict=True):
        for ways, color in COLORS.items():
            for engine, marker in MARKERS.items():
                own = [row for row in rows if (row.chip, row.ways, row.engine) == (chip, ways, engine)]
                if own:
                    pairs = [(1e3 * row.tpot, fitted.of(row) / row.tpot) for row in own]
                    axis.scatter(*zip(*pairs, strict=True), c=color, marker=marker, s=14, label=f"{engine}, {ways}")
        axis.axhspan(0.9, 1.1, color="tab:gray", alpha=0.2)
        axis.axhline(1.0, color="black", linewidth=0.7)
        axis.set(title=chip.upper(), xlabel="measured ms per output token", xscale="log")
        axis.legend(fontsize=7, ncols=2, title="engine, GPUs", title_fontsize=7)
    axes[0].set_ylabel("predicted over measured")
    figure.savefig(Path(__file__).with_name("gpus.png"), dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
