"""Layouts side by side: what each spends on every entry of its steps, and how that differs from the first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from partinf.foundation.terminal import plain_table
from partinf.planner.results import Candidate

_SHOWN = 12  # rows of a phase in the table; JSON has all


@dataclass(frozen=True)
class Row:
    """One entry of a phase's step under every layout.

    Attributes:
        entry: its name; which collective it is, over which axes, may differ from layout to layout and stands in the ledgers.
        seconds: exposed, of all occurrences in the step; 0 under a layout that has no such entry.
    """

    phase: str
    part: str
    entry: str
    seconds: tuple[float, ...]

    @property
    def most(self) -> float:
        """The greatest difference to the first layout."""
        return max(abs(each - self.seconds[0]) for each in self.seconds)


def rows(candidates: Sequence[Candidate]) -> list[Row]:
    """Entries of all phases, those that differ most first within each phase; together they are the steps."""
    found = []
    for result in candidates[0].phases:
        sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(candidates))
        for index, candidate in enumerate(candidates):
            other = candidate.phase(result.name)
            for entry in other.ledger.entries if other is not None else ():
                sums[entry.part.value, entry.name][index] += entry.exposed_seconds
        each = [Row(result.name, part, entry, tuple(seconds)) for (part, entry), seconds in sums.items()]
        found += sorted(each, key=lambda row: -row.most)
    return found


def comparison_table(names: Sequence[str], candidates: Sequence[Candidate]) -> Table:
    """Milliseconds of every entry under every layout, and what the others spend more than the first; steps and memory below."""
    figures = (*names, *(f"{name} − {names[0]}" for name in names[1:]))
    table = plain_table("phase", "part", "entry", *(f">{title}" for title in figures), title="Side by side, ms per step")
    every = rows(candidates)
    for result in candidates[0].phases:
        mine = [row for row in every if row.phase == result.name]
        for row in mine[:_SHOWN]:
            table.add_row(row.phase, row.part, row.entry, *_cells([1e3 * seconds for seconds in row.seconds], ".3f"))
        if rest := mine[_SHOWN:]:
            sums = [1e3 * sum(seconds) for seconds in zip(*(row.seconds for row in rest), strict=True)]
            table.add_row(result.name, "", f"{len(rest)} more", *_cells(sums, ".3f"))
        steps = [1e3 * found.step_seconds for candidate in candidates if (found := candidate.phase(result.name)) is not None]
        table.add_row(result.name, "", "[bold]step[/]", *_cells(steps, ".3f"), end_section=True)
    table.add_row("", "", "GB per device", *_cells([c.memory.total / 1e9 for c in candidates], ".2f"))
    table.add_row("", "", "fits", *("yes" if c.fits else "no" for c in candidates))
    return table


def comparison_json(names: Sequence[str], candidates: Sequence[Candidate]) -> dict[str, Any]:
    """The same as plain data; seconds."""
    return {
        "layouts": [
            {"name": name, "layout": c.name, "fits": c.fits, "score": c.score, "hbm_bytes_per_device": c.memory.total}
            | {"step_seconds": {result.name: result.step_seconds for result in c.phases}}
            for name, c in zip(names, candidates, strict=True)
        ],
        "entries": [
            {"phase": row.phase, "part": row.part, "entry": row.entry, "seconds": list(row.seconds)}
            | {"difference": [each - row.seconds[0] for each in row.seconds[1:]]}
            for row in rows(candidates)
        ],
    }


def _cells(values: Sequence[float], form: str) -> list[str]:
    return [*(f"{value:{form}}" for value in values), *(f"{value - values[0]:+{form}}" for value in values[1:])]
