"""The table of the README, from results.json.

python -m experiments.palm_540b_on_64_v4.table
"""

from __future__ import annotations

import json
from typing import Any

from experiments.palm_540b_on_64_v4.measure import CASES, RESULTS

_HEAD = "| program | GiB per chip | estimate ms | paper ms | | compute | collectives | copies | all-reduces | cost model, same program |"


def line(name: str, found: dict[str, Any]) -> str:
    held = found["memory"]
    gib = f"{held['needed'] / 2**30:.2f}"
    paper = found["measured_seconds"]
    said = f"{1e3 * paper:.3g}" if paper else ""
    if not found["fits"]:
        return f"| {name} | {gib} | refused ({held['usable'] / 2**30:.2f} usable) | {said} | | | | | | |"
    seconds, parts = found["step_seconds_estimate"], found["estimate"]

    def added(kind: str) -> str:
        return f"{1e3 * sum(d['seconds'] for d in found['differences'] if d['kind'] == kind):.1f}"

    off = f"{seconds / paper - 1:+.0%}" if paper else ""
    times = (f"{1e3 * parts[key]:.3g}" for key in ("compute", "collectives"))
    cells = (*times, added("extra copy"), added("reduce-scatter turned all-reduce"), f"{1e3 * found['planned_seconds']:.3g}")
    return f"| {name} | {gib} | {1e3 * seconds:.3g} | {said} | {off} | {' | '.join(cells)} |"


if __name__ == "__main__":
    results = json.loads(RESULTS.read_text())
    print(_HEAD, "|---" * 10 + "|", sep="\n")
    for case in CASES:
        if case.name in results:
            print(line(case.name, results[case.name]))
