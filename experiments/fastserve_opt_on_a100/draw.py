"""Draw results.json and print its tables: `python -m experiments.fastserve_opt_on_a100.draw` writes fastserve.png."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from experiments.results import next_to, read

_TICKS = (1, 1.5, 2, 3, 4, 6, 10)
_SHOWN = (("per_token", 1e3, 0), ("completion", 1.0, 1))
COLOURS = {
    "fcfs": "tab:red",
    "orca": "tab:gray",
    "mlfq, α 0.3 s": "tab:cyan",
    "mlfq, α 3 s": "tab:blue",
    "mlfq, α 30 s": "navy",
    "mlfq, as published": "black",
    "mlfq-naive, α 0.3 s": "tab:olive",
    "srpt": "tab:green",
}


def load_text(curve: dict[str, Any]) -> str:
    """The load at the target, or what the heaviest load gave where that is not enough."""
    last = curve["points"][-1]
    if curve["load_at_0.3"] is not None:
        return f"{curve['load_at_0.3']:.2f}/s"
    heaviest = "all at once" if last["rate"] is None else f"at {last['rate']:.2f}/s"
    return f"{heaviest} {last['per_token'][0]:.2f} s"


def print_loads(curves: list[dict[str, Any]]) -> None:
    """The load that each carries, and over that of `fcfs` on the same model with as many requests."""
    base = {(curve["model"], curve["requests"]): curve["load_at_0.3"] for curve in curves if curve["label"] == "fcfs"}
    for curve in curves:
        load, fcfs = curve["load_at_0.3"], base.get((curve["model"], curve["requests"]))
        ratio = f"{load / fcfs:.2f}×" if load and fcfs else ""
        print(f"{curve['model']:9} {curve['label']:22} {curve['eviction']:10} {curve['requests']:5}  {load_text(curve):>22}  {ratio}")


def print_points(curves: list[dict[str, Any]]) -> None:
    """Per load and policy, as lines of the README's table: mean, P95 and P99 per token in ms, the same of completion in s, mean time to
    first token in s, swaps."""
    print("| load | policy | per token, ms | completion, s | first token, s | swaps |\n|---|---|---|---|---|---|")
    for points in zip(*(curve["points"] for curve in curves), strict=True):
        for curve, point in zip(curves, points, strict=True):
            token, done = (", ".join(f"{scale * value:.{digits}f}" for value in point[key]) for key, scale, digits in _SHOWN)
            print(f"| {point['rate']:.2f}/s | `{curve['label']}` | {token} | {done} | {point['ttft'][0]:.1f} | {point['swap_outs']} |")


def draw(curves: list[dict[str, Any]]) -> None:
    models = list(dict.fromkeys(curve["model"] for curve in curves))
    figure, axes = plt.subplots(2, len(models), figsize=(4.2 * len(models), 7), layout="constrained", squeeze=False)
    for column, model in enumerate(models):
        for curve in (curve for curve in curves if curve["model"] == model):
            points = [point for point in curve["points"] if point["rate"] is not None]
            line = {"proactive": "-", "reactive": "--", "recompute": ":"}[curve["eviction"]]
            label = curve["label"] if curve["eviction"] == "proactive" else None
            style = {"color": COLOURS[curve["label"]], "linestyle": line, "marker": "o", "markersize": 3}
            rates = [point["rate"] for point in points]
            axes[0][column].plot(rates, [point["per_token"][0] for point in points], label=label, **style)
            axes[1][column].plot(rates, [point["completion"][0] for point in points], **style)
        axes[0][column].axhline(0.3, color="black", linewidth=0.7)
        axes[0][column].set(title=model, ylim=(0, 0.4), xscale="log")
        axes[1][column].set(xlabel="requests per second", ylim=(0, 200), xscale="log")
        for axis in axes[:, column]:
            axis.set_xticks(_TICKS, map(str, _TICKS))
            axis.minorticks_off()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    figure.suptitle("400 requests; dashed: swapped when another needs room (reactive), dotted: recomputed", fontsize=10)
    axes[0][0].set_ylabel("mean latency per generated token, s")
    axes[1][0].set_ylabel("mean completion time, s")
    figure.savefig(next_to(__file__, "fastserve.png"), dpi=110)


def main() -> int:
    results = read(__file__)
    models = [curve for part in results if part.startswith("opt-") for curve in results[part].values()]
    draw(models + list(results.get("evictions", {}).values()))
    for part, curves in results.items():
        print(f"\n== {part}")
        (print_points if part == "sustained" else print_loads)(list(curves.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
