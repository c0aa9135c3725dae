"""Draw the training curve of results.json: `python experiments/train_demo/plot.py` writes training.png next to it."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    history = json.loads((HERE / "results.json").read_text())["history"]
    evaluated = [entry for entry in history if "exact_match" in entry]
    figure, (loss, match) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    loss.semilogy([entry["step"] for entry in history], [entry["loss"] for entry in history])
    loss.set(xlabel="step", ylabel="cross-entropy of the answers, nats")
    for kind in evaluated[0]["exact_match"]:
        match.plot(
            [entry["step"] for entry in evaluated], [100 * entry["exact_match"][kind] for entry in evaluated], label=kind, marker="."
        )
    match.set(xlabel="step", ylabel="exact match on held-out tasks, %", ylim=(0, 102))
    match.legend()
    for axes in (loss, match):
        axes.grid(alpha=0.3)
    figure.savefig(HERE / "training.png", dpi=90)


if __name__ == "__main__":
    main()
