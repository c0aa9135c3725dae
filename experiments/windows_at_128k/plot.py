"""Draw results.json: `python -m experiments.windows_at_128k.plot` writes windows.png next to it."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.results import AMBER, BLUE, next_to, read


def main() -> None:
    results = read(__file__)
    models = list(dict.fromkeys(case["model"] for case in results["cases"]))
    figure, rows = plt.subplots(1, len(models), figsize=(10, 3.2), constrained_layout=True, sharey=True)
    for axes, model in zip(rows, models, strict=True):
        cases = [case for case in results["cases"] if case["model"] == model]
        for which, colour, label in (("full_attention", AMBER, "full attention"), ("windows", BLUE, "windows")):
            axes.loglog([case["batch"] for case in cases], [case[which]["step_ms"] for case in cases], color=colour, label=label, zorder=1)
            for fits, marker in ((True, "o"), (False, "x")):
                some = [case for case in cases if case[which]["fits"] is fits]
                axes.scatter(
                    [case["batch"] for case in some], [case[which]["step_ms"] for case in some], color=colour, marker=marker, zorder=2
                )
        batches = [case["batch"] for case in cases]
        axes.set(xlabel=f"{model}, sequences", xticks=batches, xticklabels=[str(batch) for batch in batches])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    rows[0].set(ylabel=f"ms per decode step on {results['slice']}")
    rows[0].legend(title="crosses: does not fit")
    figure.savefig(next_to(__file__, "windows.png"), dpi=90)


if __name__ == "__main__":
    main()
