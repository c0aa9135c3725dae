"""The tables of the README: `python -m experiments.calibrated_cpu.table` prints them from results.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from experiments.results import read

Row = dict[str, Any]

GROUPS: dict[str, Callable[[Row], bool]] = {
    "all": lambda row: True,
    "float32": lambda row: row["dtype"] == "f32",
    "float32, decode at batch 2 to 64, and prefill": lambda row: row["dtype"] == "f32" and row["tokens"] > 1,
    "float32, decode at batch 1": lambda row: row["dtype"] == "f32" and row["tokens"] == 1,
    "bfloat16, decode": lambda row: row["dtype"] == "bf16" and row["phase"] == "decode",
    "bfloat16, prefill": lambda row: row["dtype"] == "bf16" and row["phase"] == "prefill",
}


def median_error(rows: list[Row], key: str) -> str:
    """Median of |predicted - measured| over measured."""
    return f"{statistics.median(abs(row[key] / row['measured'] - 1) for row in rows):.0%}"


def steps(rows: list[Row]) -> str:
    """Steps of one device, by type and phase."""
    lines = ["| steps | | calibrated in turn | calibrated before |", "|---|---|---|---|"]
    for name, belongs in GROUPS.items():
        mine = [row for row in rows if belongs(row)]
        errors = (median_error(mine, key) for key in ("predicted", "predicted_before"))
        lines.append(f"| {name} | {len(mine)} | {' | '.join(errors)} |")
    return "\n".join(lines)


def layouts(rows: list[Row]) -> str:
    """Ten layouts over eight devices, by the planner's rank."""
    best = min(row["measured"] for row in rows)
    lines = ["| rank | layout | measured | predicted in turn | predicted before | over the best |", "|---|---|---|---|---|---|"]
    for row in rows:
        times = " | ".join(f"{row[key]:.2f}" for key in ("measured", "predicted", "predicted_before"))
        lines.append(f"| {row['rank']} | {row['layout']} | {times} | {row['measured'] / best - 1:+.0%} |")
    return "\n".join(lines)


def main() -> None:
    found = read(__file__)
    print(steps(found["f32"]["steps"] + found["bf16"]["steps"]), layouts(found["eight_devices"]["layouts"]), sep="\n\n")


if __name__ == "__main__":
    main()
