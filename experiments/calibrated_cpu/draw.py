"""Draw results.json: predicted against measured steps on one device, and ten layouts over eight.

python -m experiments.calibrated_cpu.draw        writes calibrated.png next to this file
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.results import AMBER, BLUE, PURPLE, RED, next_to, read

COLOURS = {
    ("llama-125m", "f32"): BLUE,
    ("llama-125m", "bf16"): AMBER,
    ("llama-26m", "f32"): PURPLE,
    ("llama-26m", "bf16"): RED,
}
MARKS = {"decode": "o", "prefill": "s"}


def main() -> None:
    results = read(__file__)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    rows = results["f32"]["steps"] + results["bf16"]["steps"]
    for (model, dtype), colour in COLOURS.items():
        for phase, mark in MARKS.items():
            mine = [row for row in rows if (row["model"], row["dtype"], row["phase"]) == (model, dtype, phase)]
            xs, ys = [1e3 * row["measured"] for row in mine], [1e3 * row["predicted"] for row in mine]
            left.scatter(xs, ys, marker=mark, color=colour, s=26, label=f"{model} {dtype}, {phase}")
    _diagonal(left, [1e3 * row[key] for row in rows for key in ("measured", "predicted")], 0.15)
    left.set_title("One CPU device: steps of models that calibration did not use", fontsize=10)
    left.legend(fontsize=7, frameon=False)
    layouts = results["eight_devices"]["layouts"]
    xs, ys = [row["measured"] for row in layouts], [row["predicted"] for row in layouts]
    right.scatter(xs, ys, color=BLUE, s=30)
    for row in layouts:
        right.annotate(row["rank"], (row["measured"], row["predicted"]), fontsize=7, xytext=(4, 3), textcoords="offset points")
    _diagonal(right, xs + ys, 0.15)
    right.set_title("Eight virtual devices: ten layouts by the planner's rank", fontsize=10)
    for panel, unit in ((left, "ms per step"), (right, "s per prefill and 64 decode steps")):
        panel.set_xlabel(f"measured, {unit}", fontsize=8)
        panel.set_ylabel(f"predicted, {unit}", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.2, which="both")
    figure.savefig(next_to(__file__, "calibrated.png"), dpi=110)


def _diagonal(panel: plt.Axes, values: list[float], band: float) -> None:
    ends = [min(values) * 0.8, max(values) * 1.25]
    panel.plot(ends, ends, color="black", linewidth=0.8)
    panel.fill_between(ends, [(1 - band) * end for end in ends], [(1 + band) * end for end in ends], color="black", alpha=0.08)
    panel.set_xscale("log")
    panel.set_yscale("log")


if __name__ == "__main__":
    main()
