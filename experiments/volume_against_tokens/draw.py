"""Draw results.json: bytes moved per chip and layer against tokens.

python -m experiments.volume_against_tokens.draw        writes volume.png next to this file
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.results import AMBER, BLUE, GREY, PURPLE, RED, next_to, read

COLOURS = {"ws-2d": BLUE, "wg-x": AMBER, "wg-xy": RED, "wg-xyz": PURPLE}


def main() -> None:
    results = read(__file__)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True, sharey=True)
    for panel, (block, volumes) in zip(panels, results["bytes_per_chip_and_layer"].items(), strict=True):
        for name, values in volumes.items():
            panel.plot(results["tokens"], [value / 1e6 for value in values], color=COLOURS[name], marker=".", label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(block, fontsize=10)
        panel.set_xlabel("tokens in the batch", fontsize=8)
        panel.grid(True, which="both", alpha=0.15)
    for crossing in results["crossings"]:
        panels[0].axvline(crossing["tokens"], color=GREY, linewidth=0.8, linestyle=":")
        panels[0].text(crossing["tokens"], 12, f" {crossing['tokens']:,}", fontsize=7, rotation=90, va="bottom")
    panels[0].set_ylabel("MB through one chip, per layer", fontsize=8)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{results['model']} on {results['slice']}: communication volume against tokens", fontsize=11)
    figure.savefig(next_to(__file__, "volume.png"), dpi=100)


if __name__ == "__main__":
    main()
