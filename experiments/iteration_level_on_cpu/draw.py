"""Draw results.json: `python -m experiments.iteration_level_on_cpu.draw` writes iteration_level.png."""

from __future__ import annotations

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from experiments.results import BLUE, RED, next_to, read

COLOURS = (BLUE, RED, "#d99a6c")  # steps that decode, with the most prompt tokens, with fewer


def main() -> int:
    results = read(__file__)
    rounds = results["rounds"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    kinds = sorted({kind for counts in results["steps"].values() for kind in counts}, key=lambda kind: (kind != "decode", kind))
    for place, (policy, counts) in enumerate(results["steps"].items()):
        bottom = 0.0
        for kind, colour in zip(kinds, COLOURS, strict=False):
            if kind not in counts:
                continue
            seconds = [counts[kind] * each["step_seconds"][policy][kind] for each in rounds]
            height = sorted(seconds)[len(seconds) // 2]
            label = f"steps by themselves: {kind}" if policy == "iteration-level" else None
            left.bar(place, height, 0.5, bottom=bottom, color=colour, label=label)
            left.text(place, bottom + height / 2, f"{counts[kind]} steps", ha="center", va="center", color="white", fontsize=8)
            bottom += height
        real = [each["seconds"][policy] for each in rounds]
        left.plot([place + 0.32] * len(real), real, "k.", label="engine" if place == 0 else None)
    left.set_xticks(range(len(results["steps"])), list(results["steps"]))
    left.set(ylabel="seconds for all requests", xlim=(-0.6, 1.6))
    left.set_ylim(0, 1.5 * left.get_ylim()[1])
    left.legend(fontsize=8, loc="upper center")
    for name, style in (("real", "ko"), ("ideal", "b_"), ("free", "g_")):
        label = {"real": "engine", "ideal": "ideal: the same steps by themselves", "free": "steps that cost what their tokens cost"}[name]
        right.plot(range(1, len(rounds) + 1), [each[name] for each in rounds], style, markersize=7 if name == "real" else 18, label=label)
    right.set(xlabel="round", ylabel="iteration- over request-level throughput", ylim=(0.9, None), xticks=range(1, len(rounds) + 1))
    right.legend(fontsize=8)
    figure.suptitle(
        f"{results['model']}, {results['rows']} sequences per iteration, Orca's lengths / {results['lengths']['scale']}", fontsize=10
    )
    figure.savefig(next_to(__file__, "iteration_level.png"), dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
