"""The tables of the README, from results.json.

python -m experiments.planner_regret.table
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.results import read

_KINDS = ("regret", "regret_for_tiled", "regret_at_stated_rates", "regret_for_plain", "regret_for_plain_unfused")


def roles(line: Mapping[str, Any]) -> str:
    """`E F_xy, ws-1d; heads xy`."""
    axes: dict[str, str] = {}
    for axis, role in line["attention"].items():
        axes[role] = axes.get(role, "") + axis
    gathers = f", gathers {line['gather']}" if line["gather"] else ""
    return f"{line['layout']}{gathers}; " + " ".join(f"{role} {over}" for role, over in axes.items())


def main() -> None:
    results = read(__file__)
    print(
        "| case | judged | choice | its ms | best ms | regret | for tiled | at stated rates | for plain | unfused |",
        "|---" * 10 + "|",
        sep="\n",
    )
    for row in results["rows"]:
        counts = str(row["judged"])
        mine = row["chosen"]["judged_ms"]
        cells = (row["case"], counts, roles(row["chosen"]), f"{mine:.3g}", f"{mine / (1 + row['regret']):.3g}")
        print("|", " | ".join((*cells, *(f"{row[kind]:.1%}" for kind in _KINDS))), "|")
    for kind in _KINDS:
        found = sorted(row[kind] for row in results["rows"])
        zero, above = sum(value < 5e-4 for value in found), sum(value > 0.05 for value in found)
        print(f"{kind}: zero in {zero}, above 5 % in {above}, worst {found[-1]:.1%}")
    print("\n| case | compiled, ms by the compiler (by the planner), as they are judged | regret |", "|---" * 3 + "|", sep="\n")
    for row in [*read(__file__, "compiled.json")["rows"], *results["compiled"]]:
        times = [f"{c['layout']}: {c['compiled_ms']:.4g} ({c['planner_ms']:.4g})" for c in row["candidates"] if c["compiled_ms"]]
        slower = sum(c.get("ruled_out", False) for c in row["candidates"])
        times += [f"{slower} more, slower at the maker's figures"] if slower else []
        left = len(row["candidates"]) - row.get("judged", len(row["candidates"]))
        times += [f"{left} not compiled"] if left else []
        print(f"| {row['case']} | {'<br>'.join(times)} | {'' if row['regret'] is None else format(row['regret'], '.1%')} |")


if __name__ == "__main__":
    main()
