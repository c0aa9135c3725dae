"""The figures of the README, from results.json: `python -m experiments.constrained_rows.table` writes them anew."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.results import next_to, read

NAMES = {
    "between steps": "4 by an expression, all masks between steps",
    "as served": "4 by an expression, as `partinf serve` does it",
    "hostile, between steps": "4 by hostile grammars, all masks between steps",
    "hostile, as served": "4 by hostile grammars, as `partinf serve` does it",
    "hostile ones compiled": "36 free ones, hostile schemas compiled all the while",
}
HEADINGS = {
    "demo model": "The demo model on one CPU device:",
    "steps of 6 ms": "A simulated device that works while the host does, with steps of 6 ms:",
}
_BEGIN, _END = "<!-- from results.json -->", "<!-- end -->"


def table(runs: Sequence[Mapping[str, Any]], where: str) -> str:
    """Medians of the runs, and every run's share."""
    lines = ["| rows | share | of each run | quartiles of its rounds | median gap, ms | 99th percentile |", "|---|---|---|---|---|---|"]
    for key, name in NAMES.items():
        rows = [run["rows"][where][key] for run in runs]
        shares = [row["share_of_free"] for row in rows]
        spread = (
            f"{statistics.median(row['quartiles'][0] for row in rows):.3f} to {statistics.median(row['quartiles'][1] for row in rows):.3f}"
        )
        gaps = " | ".join(f"{statistics.median(row['gap_ms'][q] for row in rows):.1f}" for q in ("p50", "p99"))
        each = ", ".join(f"{share:.3f}" for share in shares)
        lines.append(f"| {name} | **{statistics.median(shares):.3f}** | {each} | {spread if rows[0]['rounds'] > 1 else '–'} | {gaps} |")
    return "\n".join(lines)


def figures(runs: Sequence[Mapping[str, Any]]) -> str:
    """What the README has between its marks."""
    loads = ", ".join(f"{run['load_average']:.1f}" for run in runs)
    dates = sorted({run["date"] for run in runs})
    ran = f"{len(runs)} runs, {' and '.join(dates)}, on {runs[0]['machine']}, ahead of other work (load averages {loads})."
    return "\n\n".join([*(f"{heading}\n\n{table(runs, where)}" for where, heading in HEADINGS.items()), ran])


def write_figures(runs: Sequence[Mapping[str, Any]]) -> None:
    page = next_to(__file__, "README.md")
    before, _, rest = page.read_text().partition(_BEGIN)
    page.write_text(f"{before}{_BEGIN}\n{figures(runs)}\n{_END}{rest.partition(_END)[2]}")


if __name__ == "__main__":
    write_figures(read(__file__))
