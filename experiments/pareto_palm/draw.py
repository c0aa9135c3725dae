"""Draw results.json: chip-milliseconds per token against latency, the fronts as lines.

python -m experiments.pareto_palm.draw        writes pareto.png next to this file
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.results import AMBER, BLUE, RED, next_to, read

COLOURS = {"palm-8b": BLUE, "palm-62b": AMBER, "palm-540b": RED}
# Pope et al. (2023), tables 2 and 3: model, phase, latency of the step, chips, tokens of the step.
PUBLISHED = (
    ("palm-540b", "decode", 1.82 / 64, 64, 64),
    ("palm-540b", "decode", 6.0 / 64, 64, 512),
    ("palm-62b", "decode", 0.73 / 64, 16, 32),
    ("palm-62b", "decode", 5.1 / 64, 8, 512),
    ("palm-540b", "prefill", 0.29, 64, 2048),
    ("palm-540b", "prefill", 85.2, 64, 512 * 2048),
    ("palm-62b", "prefill", 0.16, 16, 2048),
    ("palm-62b", "prefill", 20.2, 32, 512 * 2048),
)


def coordinates(points: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [p["latency_s"] for p in points], [p["chip_ms_per_token"] for p in points]


def main() -> None:
    results = read(__file__)
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    for panel, phase in zip(panels, ("decode", "prefill"), strict=True):
        for model, colour in COLOURS.items():
            for weights, style in (("int8", "-"), ("bf16", "--")):
                mine = [p for p in results["points"] if (p["model"], p["phase"], p["weights"]) == (model, phase, weights)]
                front = [p for p in mine if p["front"]]
                panel.scatter([p["latency_s"] for p in mine], [p["chip_ms_per_token"] for p in mine], s=5, color=colour, alpha=0.35)
                panel.plot(
                    [p["latency_s"] for p in front],
                    [p["chip_ms_per_token"] for p in front],
                    style,
                    color=colour,
                    label=f"{model} {weights}",
                )
        for model, which, seconds, chips, tokens in PUBLISHED:
            if which == phase:
                panel.scatter(
                    [seconds], [1e3 * chips * seconds / tokens], marker="*", s=110, color=COLOURS[model], edgecolor="black", zorder=3
                )
        panel.scatter([], [], marker="*", s=110, color="white", edgecolor="black", label="measured (paper)")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("seconds per token" if phase == "decode" else "seconds per prompt batch", fontsize=8)
        panel.set_ylabel("chip-milliseconds per token", fontsize=8)
        panel.set_title(f"{phase}, {results['context']} tokens of context", fontsize=10)
        panel.grid(True, which="both", alpha=0.15)
    panels[0].legend(fontsize=7, frameon=False)
    figure.suptitle("Latency against cost on TPU v4 (predicted): lines are the fronts over batches and slices", fontsize=11)
    figure.savefig(next_to(__file__, "pareto.png"), dpi=100)


if __name__ == "__main__":
    main()
