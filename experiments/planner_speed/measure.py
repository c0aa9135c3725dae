"""How long `partinf plan` takes, as a process and in-process, and write results.json and README's tables.

    python -m experiments.planner_speed.measure

Processes are started and waited for, so interpreter start and imports count. Each figure is the median of several runs. The bounds are
those that the planner was built to: `plan` on 64 chips under 1 s as a process and 0.5 s in-process, `--help` under 0.3 s, 4096 chips
under 5 s; with experts, whole workloads on 64 chips under 1 s and on 1,024 under 5 s.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from experiments.results import place, read, write
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.meshes import every_mesh, fastest
from partinf.planner.question import Question
from partinf.planner.report import PlanReport, answer
from partinf.workload import DType, Workload

PALM = ["plan", "--model", "palm-540b", "--slice", "v4:4x4x4"]
PLAN = [*PALM, "--phase", "decode", "--batch", "64", "--context", "2048", "--weights", "int8"]
WHOLE = [*PALM, "--batch", "512", "--input", "1984", "--output", "64"]
PROCESSES = {
    "plan --help": (["plan", "--help"], 0.3),
    "plan, one decode step, json": ([*PLAN, "--format", "json"], 1.0),
    "plan, one decode step, table": (PLAN, 1.0),
    "plan, whole workload, json": ([*WHOLE, "--format", "json"], None),
}
DECODE = Workload(64, context_len=2048, phase="decode", weights=DType.INT8)
FOUR = "x0:2,x1:2,y:4,z:4"
# Model, slice, mesh, workload, bound. Four unequal axes have some hundred thousand assignments.
SEARCHES: dict[str, tuple[str, str, str | None, Workload, float | None]] = {
    "PaLM 540B decode, v4:4x4x4": ("palm-540b", "v4:4x4x4", None, DECODE, 0.5),
    "PaLM 540B whole workload, v4:4x4x4": ("palm-540b", "v4:4x4x4", None, Workload(512, 1984, 64), 0.5),
    "LLaMA 3 70B whole workload, v4:4x4x4": ("llama-3-70b", "v4:4x4x4", None, Workload(64, 1984, 64), 0.5),
    "PaLM 540B whole workload, v4:16x16x16": ("palm-540b", "v4:16x16x16", None, Workload(4096, 1984, 64), 5.0),
    "LLaMA 3 70B decode, v4:4x4x4 as x0,x1,y,z": ("llama-3-70b", "v4:4x4x4", FOUR, Workload(64, context_len=2048, phase="decode"), None),
    "LLaMA 3 70B whole workload, x0,x1,y,z": ("llama-3-70b", "v4:4x4x4", FOUR, Workload(64, 1984, 64), None),
    "LLaMA 3 70B whole workload, tpu7x:2x2x4": ("llama-3-70b", "tpu7x:2x2x4", None, Workload(64, 1984, 64), None),
    "Qwen 3 30B-A3B whole workload, v5e:8x8": ("qwen-3-30b-a3b", "v5e:8x8", None, Workload(64, 1984, 64), 1.0),
    "Qwen 3 235B-A22B whole workload, v5e:8x8": ("qwen-3-235b-a22b", "v5e:8x8", None, Workload(64, 1984, 64), 1.0),
    "Qwen 3 30B-A3B whole workload, v4:4x4x4": ("qwen-3-30b-a3b", "v4:4x4x4", None, Workload(64, 1984, 64), 1.0),
    "gpt-oss 120b whole workload, v4:4x4x4": ("gpt-oss-120b", "v4:4x4x4", None, Workload(64, 1984, 64), 1.0),
    "GLM 4.5 whole workload, v4:4x4x4": ("glm-4.5", "v4:4x4x4", None, Workload(64, 1984, 64), 1.0),
    "Qwen 3 235B-A22B whole workload, v4:8x8x16": ("qwen-3-235b-a22b", "v4:8x8x16", None, Workload(1024, 1984, 64), 5.0),
    "GLM 4.5 whole workload, v5p:8x8x16": ("glm-4.5", "v5p:8x8x16", None, Workload(1024, 1984, 64), 5.0),
}
# Factorisations of the axes: model, slice, workload, bound of `--mesh auto`.
MESHES: dict[str, tuple[str, str, Workload, float | None]] = {
    "LLaMA 3 70B whole workload, v5e:16x16": ("llama-3-70b", "v5e:16x16", Workload(64, 1984, 64, weights=DType.INT8), 5.0),
    "LLaMA 3 8B decode, v5e:4x4": ("llama-3-8b", "v5e:4x4", Workload(32, context_len=1024, phase="decode"), None),
    "LLaMA 3 70B decode, v5e:4x4": ("llama-3-70b", "v5e:4x4", Workload(32, context_len=2048, phase="decode", weights=DType.INT8), None),
    "PaLM 540B decode, v4:4x4x4": ("palm-540b", "v4:4x4x4", DECODE, None),
    "LLaMA 3 70B whole workload, v4:4x4x4": ("llama-3-70b", "v4:4x4x4", Workload(64, 1984, 64), None),
    "LLaMA 3 8B whole workload, h200:8": ("llama-3-8b", "h200:8", Workload(32, 1024, 256), None),
    "Qwen 3 32B whole workload, v6e:8x8": ("qwen-3-32b", "v6e:8x8", Workload(256, 1024, 256), None),
}


def median(run: Callable[[], object], count: int) -> float:
    """Median of `count` runs after one that is not counted, in CPU seconds of this process and those it waits for. Both have one thread."""
    run()
    times = []
    for _ in range(count):
        start = _spent()
        run()
        times.append(_spent() - start)
    return statistics.median(times)


def _spent() -> float:
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def process(arguments: list[str], compiled: str) -> None:
    """A process as of an installed library: its modules are compiled already, by the first run, into this directory."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = compiled
    subprocess.run([sys.executable, "-m", "partinf", *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)


def timed(runs: int) -> list[dict[str, Any]]:
    """Processes and searches of one mesh."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as compiled:
        for name, (arguments, bound) in PROCESSES.items():
            rows.append({"what": name, "as": "process", "seconds": median(lambda a=arguments: process(a, compiled), runs), "bound": bound})
    for name, (model, slice_, mesh, workload, bound) in SEARCHES.items():
        found = (load_model_config(model), parse_slice(slice_, mesh), workload)
        rows.append({"what": name, "as": "search", "seconds": median(lambda f=found: search(*f), runs), "bound": bound})
    return rows


def searched(what: str, model: str, slice_: str, workload: Workload, bound: float | None) -> list[dict[str, Any]]:
    """The slice's own mesh, the default, `--mesh auto` and all meshes without a budget: CPU seconds, and regret against the best."""
    question, place = Question(load_model_config(model), workload), parse_slice(slice_)
    searches: dict[str, Callable[[], PlanReport]] = {
        "own mesh": lambda: answer(question, place),
        "default": lambda: fastest(question, place),
        "auto": lambda: every_mesh(question, place)[0],
        "no budget": lambda: every_mesh(question, place, None)[0],
    }
    rows, scores = [], []
    answer(question, place)  # not counted
    for name, run in searches.items():
        start = time.process_time()
        report = run()
        seconds, left = time.process_time() - start, sum(one.count for one in report.refused if "budget" in one.reason)
        scores.append(report.best.score)
        row = {"what": what, "search": name, "mesh": report.slice.mesh, "seconds": seconds, "score": report.best.score, "left_out": left}
        rows.append(row | {"bound": bound if name == "auto" else None})
    return [row | {"regret": row["score"] / min(scores) - 1} for row in rows]


def tables(rows: list[dict[str, Any]], meshes: list[dict[str, Any]]) -> tuple[str, str]:
    """README's tables."""
    one = ["| what | as | seconds | bound |", "|---|---|---|---|"]
    one += [f"| {row['what']} | {row['as']} | {row['seconds']:.2f} | {row['bound'] or '–'} |" for row in rows]
    two = ["| what | search | mesh | CPU s | regret |", "|---|---|---|---|---|"]
    two += [f"| {row['what']} | {row['search']} | {row['mesh']} | {row['seconds']:.2f} | {100 * row['regret']:.1f} % |" for row in meshes]
    return "\n".join(one), "\n".join(two)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs per figure (default: 5)")
    parser.add_argument("--meshes", action="store_true", help="only the searches over meshes; the other rows stay")
    args = parser.parse_args()
    runs, rows = args.runs, read(__file__)["rows"] if args.meshes else timed(args.runs)
    meshes = [found for name, case in MESHES.items() for found in searched(name, *case)]
    for row in rows:
        within = "" if row["bound"] is None else "within" if row["seconds"] <= row["bound"] else "OVER"
        print(f"{row['what']:50} {row['as']:8} {row['seconds']:7.3f} s  {within} {row['bound'] or ''}")
    for row in meshes:
        print(f"{row['what']:42} {row['search']:12} {row['mesh']:20} {row['seconds']:7.3f} s  regret {row['regret']:6.1%}")
    write(__file__, {"runs": runs, "rows": rows, "meshes": meshes})
    for mark, text in zip(("searches", "meshes"), tables(rows, meshes), strict=True):
        place(__file__, text, mark)
    return 0


if __name__ == "__main__":
    sys.exit(main())
