"""The tables of the README: from results.json, and next to them, from results_before.json, the same programs before the compiler's lessons.

python -m experiments.palm_540b_on_64_v4.table      # prints them and puts them into the README
"""

from __future__ import annotations

from typing import Any

from experiments.palm_540b_on_64_v4.measure import CASES, plan_of
from experiments.results import place, read
from partinf.proof.proving import planned_ledger

_HEAD = "| program | GiB per chip | estimate ms | paper ms | | compute | collectives | hidden | copies | all-reduces | cost model |"
_HIDDEN = "| program | hidden ms | of | collective | axes | bytes | times | from |"
_TWINS = ("rejected", "compiler-partitioned")  # what they hide is not listed
_LEAST = 0.1  # of a program's hidden time, to be listed
_CHANGES = "| program | GiB per chip | estimate ms | copies ms | collectives ms |"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 1 else f"{1e3 * seconds:.3g}"


def added(found: dict[str, Any], kind: str) -> float:
    """Seconds of the differences of one kind."""
    return sum(d["seconds"] for d in found["differences"] if d["kind"] == kind)


def line(name: str, found: dict[str, Any]) -> str:
    """What was found of one program."""
    held, paper = found["memory"], found["measured_seconds"]
    gib, published = f"{held['needed'] / 2**30:.2f}", milliseconds(paper) if paper else ""
    if not found["fits"]:
        return f"| {name} | {gib} | refused ({held['usable'] / 2**30:.2f} usable) | {published} | | | | | | | |"
    seconds, parts = found["step_seconds_estimate"], found["estimate"]
    off = f"{seconds / paper - 1:+.0%}" if paper else ""
    times = (parts["compute"], parts["collectives"], parts["overlapped"])
    times += (added(found, "extra copy"), added(found, "reduce-scatter turned all-reduce"))
    cells = " | ".join(map(milliseconds, (*times, found["planned_seconds"])))
    return f"| {name} | {gib} | {milliseconds(seconds)} | {published} | {off} | {cells} |"


def hidden(name: str, found: dict[str, Any]) -> list[str]:
    """Collectives and transfers that run alongside other work in one program, the dearest first."""
    every = [(c["seconds"] * c["count"], c) for c in found.get("collectives", ())]
    overlapped = sorted(((c["overlapped_fraction"] * whole, whole, c) for whole, c in every), key=lambda one: -one[0])
    least = _LEAST * sum(seconds for seconds, _, _ in overlapped)
    cells = "| {} | {} | {} | {} | {} | {:,} | {} | {} |"
    return [
        cells.format(name, *map(milliseconds, (seconds, whole)), c["op"], "".join(c["axes"]), c["bytes"], c["count"], c["source_op"])
        for seconds, whole, c in overlapped
        if seconds > least
    ]


def error(found: dict[str, dict[str, Any]]) -> str:
    """How far the estimates of the programs that a plan would run are from what the paper measured."""
    names = [case.name for case in CASES if case.measured and case.name[0].isdigit() and found.get(case.name, {}).get("fits")]
    off = [found[name]["step_seconds_estimate"] / found[name]["measured_seconds"] - 1 for name in names]
    mean, size = sum(off) / len(off), sum(map(abs, off)) / len(off)
    spread = f"{min(off):+.0%} to {max(off):+.0%}, mean {mean:+.0%}, mean size {size:.0%}"
    return f"The estimate's error over the {len(off)} steps that the paper timed: {spread}"


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


def main() -> None:
    results, earlier = (read(__file__, name) for name in ("results.json", "results_before.json"))
    mine = [case for case in CASES if case.name in results]
    names = [case.name for case in mine]
    planned = {case.name: planned_ledger(*plan_of(case)).seconds for case in mine}  # at today's prices
    programs = [_HEAD, "|---" * 11 + "|", *(line(name, results[name] | {"planned_seconds": planned[name]}) for name in names)]
    overlap = [_HIDDEN, "|---" * 8 + "|"]
    overlap += [row for name in names if not name.startswith(_TWINS) for row in hidden(name, results[name])]
    changes = [_CHANGES, "|---" * 5 + "|", *(change(name, earlier[name], results[name]) for name in names if name in earlier)]
    tables = {"programs": [*programs, "", f"{error(results)}."], "overlap": overlap, "changes": changes}
    for mark, lines in tables.items():
        print(*lines, sep="\n", end="\n\n")
        place(__file__, "\n".join(lines), mark)


if __name__ == "__main__":
    main()
