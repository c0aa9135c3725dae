"""The tables of the README, from results.json and compiled.json.

python -m experiments.planner_regret.table      # prints them and puts them into the README
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.results import place, read

_KINDS = ("regret", "regret_for_tiled", "regret_at_stated_rates", "regret_for_plain", "regret_for_plain_unfused")


def roles(line: Mapping[str, Any]) -> str:
    """`E F_xy, ws-1d; heads xy`."""
    axes: dict[str, str] = {}
    for axis, role in line["attention"].items():
        axes[role] = axes.get(role, "") + axis
    gathers = f", gathers {line['gather']}" if line["gather"] else ""
    return f"{line['layout']}{gathers}; " + " ".join(f"{role} {over}" for role, over in axes.items())


def counted(rows: Iterable[Mapping[str, Any]]) -> str:
    """Regret under the counted program."""
    lines = [
        "| case | judged | choice | its ms | best ms | regret | for tiled | at stated rates | for plain | unfused |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        mine = row["chosen"]["judged_ms"]
        cells = (row["case"], str(row["judged"]), roles(row["chosen"]), f"{mine:.3g}", f"{mine / (1 + row['regret']):.3g}")
        lines.append(f"| {' | '.join((*cells, *(f'{row[kind]:.1%}' for kind in _KINDS)))} |")
    return "\n".join(lines)


def compiled(rows: Iterable[Mapping[str, Any]]) -> str:
    """Regret under the compiler."""
    lines = ["| case | compiled, ms by the compiler (by the planner), as they are judged | regret |", "|---" * 3 + "|"]
    for row in rows:
        times = [f"{c['layout']}: {c['compiled_ms']:.4g} ({c['planner_ms']:.4g})" for c in row["candidates"] if c["compiled_ms"]]
        slower = sum(c.get("ruled_out", False) for c in row["candidates"])
        times += [f"{slower} more, slower at the maker's figures"] if slower else []
        left = len(row["candidates"]) - row.get("judged", len(row["candidates"]))
        times += [f"{left} not compiled"] if left else []
        lines.append(f"| {row['case']} | {'<br>'.join(times)} | {'' if row['regret'] is None else format(row['regret'], '.1%')} |")
    return "\n".join(lines)


def outcome(summary: Mapping[str, float]) -> str:
    """What the compiled cases come to, in two sentences."""
    regrets = f"regret {summary['median']:.1%} in the median, {summary['worst']:.1%} at worst"
    return (
        f"**{summary['cases']} cases, {summary['cases_with_all_rivals']} of them with all their rivals: {regrets}** (5 and 12 % were "
        f"wanted). Planner and compiler are {summary['error_median']:.1%} apart in the median of {summary['programs']} programs, "
        f"{summary['error_worst']:.0%} at worst."
    )


def of_products(rows: Iterable[Mapping[str, Any]]) -> str:
    """What limits products, by chip and type of weights, each figure with how many products it is of."""
    names = ("least_rows", "streamed_share", "peak", "peak_into_heads", "peak_into_narrow_heads")
    heads = (
        "least rows",
        "share of HBM, read by itself",
        "share of the peak",
        "of the peak, into heads",
        "into heads narrower than the unit",
    )
    lines = [f"| chip | weights | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for row in rows:
        cells = (f"{row[name]['value']:.3g} ({row[name]['of']})" if name in row else "" for name in names)
        lines.append(f"| {row['chip']} | {row['weights']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    results, judged = read(__file__), read(__file__, "compiled.json")
    tables = {
        "counted": counted(results["rows"]),
        "compiled": f"{outcome(judged['summary'])}\n\n{compiled(judged['rows'])}",
        "products": of_products(read(__file__, "products.json")),
        "earlier": compiled(results["compiled"]),
    }
    for mark, table in tables.items():
        print(table, end="\n\n")
        place(__file__, table, mark)
    for kind in _KINDS:
        found = sorted(row[kind] for row in results["rows"])
        zero, above = sum(value < 5e-4 for value in found), sum(value > 0.05 for value in found)
        print(f"{kind}: zero in {zero}, above 5 % in {above}, worst {found[-1]:.1%}")


if __name__ == "__main__":
    main()
