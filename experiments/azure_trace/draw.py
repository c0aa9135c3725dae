"""Draw results.json: `python -m experiments.azure_trace.draw` writes azure.png."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main() -> int:
    runs = json.loads((HERE / "results.json").read_text())["runs"]
    cases = list(dict.fromkeys((run["model"], run["slice"], run["max_batch"], run["replicas"]) for run in runs))
    schedulers = list(dict.fromkeys(run["scheduler"] for run in runs))
    figure, axes = plt.subplots(2, 1, figsize=(10, 6), sharex=True, layout="constrained")
    width = 0.8 / len(schedulers)
    for place, scheduler in enumerate(schedulers):
        mine = {(run["model"], run["slice"], run["max_batch"], run["replicas"]): run for run in runs if run["scheduler"] == scheduler}
        where = [number + place * width for number in range(len(cases))]
        axes[0].bar(where, [mine[case]["goodput"]["share"] for case in cases], width, label=scheduler)
        axes[1].bar(where, [mine[case]["latency"]["ttft"]["p95"] for case in cases], width)
    axes[0].set_ylabel("share within 1 s TTFT\nand 50 ms per token")
    axes[0].legend(ncols=4, fontsize=8)
    axes[1].set(ylabel="P95 time to first token, s", yscale="log")
    axes[1].set_xticks([n + 0.3 for n in range(len(cases))], [f"{m}\n{n} × {s}\nbatch {b}" for m, s, b, n in cases], fontsize=6)
    figure.savefig(HERE / "azure.png", dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
