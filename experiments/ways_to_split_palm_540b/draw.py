"""Draw results.json as stacked bars.

python -m experiments.ways_to_split_palm_540b.draw        writes layouts.png next to this file
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.results import AMBER, BLUE, GREY, PURPLE, RED, next_to, read

ORDER = ("ws-1d", "ws-2d", "wg-x", "wg-xy", "wg-xyz")
COLOURS = {
    "matmuls": BLUE,
    "attention core": AMBER,
    "activation collectives": RED,
    "weight gathers": PURPLE,
    "other": GREY,
}


CUT = 4.0  # bars longer than so many times the fastest are cut


def time(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.3g} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"


def main() -> None:
    results = read(__file__)
    figure, axes = plt.subplots(1, len(results["steps"]), figsize=(15, 3.6), constrained_layout=True)
    for axis, step in zip(axes, results["steps"], strict=True):
        names = [name for name in ORDER if name in step["best"]]
        fastest = min(names, key=lambda name: step["best"][name]["ms"])
        left = [0.0] * len(names)
        for part, colour in COLOURS.items():
            widths = [step["best"][name]["parts"][part] for name in names]
            axis.barh(names, widths, left=left, color=colour, label=part, height=0.65)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        limit = min(max(left), CUT * step["best"][fastest]["ms"])
        for position, name in enumerate(names):
            weight = "bold" if name == fastest else "normal"
            more = " →" if left[position] > limit else ""
            axis.text(
                min(left[position], limit), position, f" {time(left[position])}{more}", va="center", fontsize=8, fontweight=weight, zorder=3
            )
        axis.set_xlim(0, limit * 1.45)
        axis.axvspan(limit, limit * 1.45, color="white", zorder=2)
        axis.invert_yaxis()
        axis.set_title(step["step"], fontsize=9)
        axis.set_xlabel("ms per step (predicted)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.suptitle(f"{results['model']} on {results['slice']}: the best layout of each kind, and where its time goes", fontsize=11)
    figure.savefig(next_to(__file__, "layouts.png"), dpi=110)


if __name__ == "__main__":
    main()
