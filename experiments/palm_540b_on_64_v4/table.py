"""The tables of the README: from results.json, and beside results_before.json, the same programs before the compiler's lessons.

python -m experiments.palm_540b_on_64_v4.table
"""

from __future__ import annotations

import json
from typing import Any

from experiments.palm_540b_on_64_v4.measure import CASES, RESULTS

_HEAD = "| program | GiB per chip | estimate ms | paper ms | | compute | collectives | copies | all-reduces | cost model, same program |"
_CHANGES = "| program | GiB per chip | estimate ms | copies ms | collectives ms |"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 1 else f"{1e3 * seconds:.3g}"


def added(found: dict[str, Any], kind: str) -> float:
    """Seconds of the differences of one kind."""
    return sum(d["seconds"] for d in found["differences"] if d["kind"] == kind)


def line(name: str, found: dict[str, Any]) -> str:
    """What was found of one program."""
    held, paper = found["memory"], found["measured_seconds"]
    gib, said = f"{held['needed'] / 2**30:.2f}", milliseconds(paper) if paper else ""
    if not found["fits"]:
        return f"| {name} | {gib} | refused ({held['usable'] / 2**30:.2f} usable) | {said} | | | | | | |"
    seconds, parts = found["step_seconds_estimate"], found["estimate"]
    off = f"{seconds / paper - 1:+.0%}" if paper else ""
    times = (parts["compute"], parts["collectives"], added(found, "extra copy"), added(found, "reduce-scatter turned all-reduce"))
    cells = " | ".join(map(milliseconds, (*times, found["planned_seconds"])))
    return f"| {name} | {gib} | {milliseconds(seconds)} | {said} | {off} | {cells} |"


def change(name: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What was, and what is."""

    def cells(found: dict[str, Any]) -> tuple[str, ...]:
        gib = f"{found['memory']['needed'] / 2**30:.1f}"
        if not found["fits"]:
            return gib, "refused", "", ""
        times = (found["step_seconds_estimate"], added(found, "extra copy"), found["estimate"]["collectives"])
        return (gib, *map(milliseconds, times))

    pairs = (f"{was} → {here}" if was else here for was, here in zip(cells(before), cells(now), strict=True))
    return f"| {name} | " + " | ".join(pairs) + " |"


if __name__ == "__main__":
    results, earlier = (json.loads(file.read_text()) for file in (RESULTS, RESULTS.with_stem("results_before")))
    print(_HEAD, "|---" * 10 + "|", *(line(case.name, results[case.name]) for case in CASES if case.name in results), sep="\n", end="\n\n")
    print(_CHANGES, "|---" * 5 + "|", sep="\n")
    print(*(change(case.name, earlier[case.name], results[case.name]) for case in CASES if case.name in earlier), sep="\n")
