"""Holds the walk of a proof against a program that others wrote and timed: jax-llm-examples' Llama 3 70B in int8 on 16 chips of v5e.

    python -m experiments.timed_programs.measure CHECKOUT TEXTS --python PYTHON     # writes results.json and README's tables
    python -m experiments.timed_programs.measure NEWER TEXTS                        # today's program by today's compiler: newer.json

CHECKOUT: a clone of jax-ml/jax-llm-examples at 345dab9, the commit that published what was timed, and PYTHON an interpreter with the jax of
its README, 0.6.0; half a minute for every missing text. NEWER: a clone at 8b4b246, compiled by this interpreter's jax. Both are compiled as
they stand. TEXTS: a folder that keeps the compiled texts. Without a TPU; one compilation at a time. `--compiled` takes only the texts that
are there.
"""

from __future__ import annotations

import argparse
import gzip
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.results import place, read, write
from partinf.cost.calibration import calibration_for
from partinf.cost.pricing import Pricing
from partinf.hardware.slices import parse_slice
from partinf.proof.hlo import Instruction, Module
from partinf.proof.pace import pace_of, stated_byte_rate
from partinf.proof.schedule import Reader, Schedule
from partinf.proof.walk import KernelRun

RESULTS = Path(__file__).with_name("results.json")
# The first factor of x tells the copies apart; devices are numbered row-major, in the program as here.
SLICE = parse_slice("v5e:4x4", "x0:2,x1:2,y:4")
# Its attention kernel, of which the compiler says nothing, reads whole tiles of 512 positions, of which decode after prompts of 512 tokens
# fills two: keys and values of 128 bytes each, and their scales in bfloat16.
KERNELS, ROW_BYTES = ("shmap_body", "vmap__"), 2 * 512 * 2 * (128 + 2)
FILES = {True: "results.json", False: "newer.json"}  # of the program and compiler that were timed, and of newer ones
_COPIES = re.compile(r"For data parallelism = (\d+) and tensor parallelism")
_ROW = re.compile(r"\|\s*3\.1-70B\s*\|\s*TPU v5e-16\s*\|\s*(\d+)\s*\|\s*(\d+)\s*\|\s*[\d.]+\s*\|\s*([\d.]+)\s*\|")


@dataclass(frozen=True)
class Cell:
    """One timed step. `measured`: seconds. `context`: positions that the cache has room for."""

    copies: int
    batch: int
    context: int
    measured: float

    @property
    def file(self) -> str:
        return f"dp{self.copies}_b{self.batch}_c{self.context}.txt.gz"


def cells(readme: str) -> list[Cell]:
    """What the README timed; tokens per second are those of one sequence."""
    found, copies = [], 1
    for line in readme.splitlines():
        heading, row = _COPIES.search(line), _ROW.match(line)
        copies = int(heading[1]) if heading else copies
        if row:
            found.append(Cell(copies, int(row[1]), int(row[2]), 1 / float(row[3])))
    return sorted(found, key=lambda cell: (cell.context, cell.batch, cell.copies))


def walked(text: str) -> Schedule:
    """The program as a proof reads it, its kernel at the measured rate."""
    pace = pace_of(SLICE)
    network = Pricing(SLICE, calibration_for(SLICE.chip)).network

    def kernel(instruction: Instruction, _: float) -> KernelRun:
        num_bytes = ROW_BYTES * instruction.shapes[0].dims[0]
        return KernelRun(num_bytes / pace.byte_rate, num_bytes)

    return Reader(Module(text), SLICE, network, kernels=dict.fromkeys(KERNELS, kernel), pace=pace).read()


def row_of(cell: Cell, schedule: Schedule) -> dict[str, Any]:
    """A cell of results.json; times in ms."""
    exposed = sum(one.exposed_seconds for one in schedule.collectives)
    return {
        "copies": cell.copies,
        "batch": cell.batch,
        "context": cell.context,
        "measured": round(1e3 * cell.measured, 3),
        "estimate": round(1e3 * schedule.seconds, 3),
        "ratio": round(schedule.seconds / cell.measured, 3),
        "bytes_alone": round(1e3 * schedule.hbm_bytes / stated_byte_rate(SLICE.chip), 3),
        "collectives": round(1e3 * exposed, 3),
        "kernel": round(1e3 * sum(kernel.seconds for kernel in schedule.kernels.values()), 3),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of all cells; of each half once the other's mean ratio is taken out of it; and which layout is predicted to be faster."""
    halves = {
        "tensor-parallel from 2 copies": (lambda row: row["copies"] == 2, lambda row: row["copies"] == 1),
        "2 copies from tensor-parallel": (lambda row: row["copies"] == 1, lambda row: row["copies"] == 2),
        "batch from 64 from up to 32": (lambda row: row["batch"] <= 32, lambda row: row["batch"] > 32),
        "batch up to 32 from 64": (lambda row: row["batch"] > 32, lambda row: row["batch"] <= 32),
    }
    held = {}
    for name, (known, held_out) in halves.items():
        ratios = [math.log(row["ratio"]) for row in rows if known(row)]
        if ratios:
            factor = math.exp(statistics.fmean(ratios))
            held[name] = _errors(row["ratio"] / factor for row in rows if held_out(row))
    pairs = {(row["batch"], row["context"]): right for row, right in _pairs(rows)}
    return {
        "cells": len(rows),
        **_errors(row["ratio"] for row in rows),
        "held_out": held,
        "pairs": len(pairs),
        "pairs_ordered_right": sum(pairs.values()),
        "ordered_wrong": [{"batch": batch, "context": context} for (batch, context), right in pairs.items() if not right],
    }


def _pairs(rows: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], bool]]:
    """The tensor-parallel one of two cells that differ in their layout alone, and whether the faster one of them is predicted to be."""
    copied = {(row["batch"], row["context"]): row for row in rows if row["copies"] == 2}
    for one in rows:
        two = copied.get((one["batch"], one["context"])) if one["copies"] == 1 else None
        if two:
            yield one, (one["estimate"] < two["estimate"]) == (one["measured"] < two["measured"])


def cells_table(rows: list[dict[str, Any]], newer: list[dict[str, Any]]) -> str:
    """README's table of all cells."""
    today = {(row["copies"], row["batch"], row["context"]): row for row in newer}
    lines = ["| layout | batch | context | measured ms | estimate ms | ratio | newer program and compiler, ms |", f"|{'---|' * 7}"]
    for row in rows:
        layout = "TP16" if row["copies"] == 1 else "2 × TP8"
        other = today.get((row["copies"], row["batch"], row["context"]))
        newer_ms = f"{other['estimate']:.2f}" if other else "–"
        figures = f"{row['measured']:.2f} | {row['estimate']:.2f} | {row['ratio']:.2f}"
        lines.append(f"| {layout} | {row['batch']} | {row['context']} | {figures} | {newer_ms} |")
    return "\n".join(lines)


def summary_table(found: dict[str, Any]) -> str:
    """README's table of errors, and of those of each half with the other's mean ratio taken out."""
    lines = ["| predicted | median | P90 | worst |", "|---|---|---|---|"]
    for name, one in {"all cells": found, **found["held_out"]}.items():
        lines.append(f"| {name} | {' | '.join(f'{one[key]:.1%}' for key in ('median', 'p90', 'worst'))} |")
    return "\n".join(lines)


def _errors(ratios: Iterable[float]) -> dict[str, float]:
    sizes = sorted(abs(ratio - 1) for ratio in ratios)
    ninth = sizes[min(len(sizes) - 1, math.ceil(0.9 * len(sizes)) - 1)]
    return {"median": round(statistics.median(sizes), 3), "p90": round(ninth, 3), "worst": round(sizes[-1], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--python", default="", help="an interpreter with jax 0.6.0, libtpu 0.0.13, absl-py, etils and flatbuffers")
    parser.add_argument("--compiled", action="store_true", help="only what is compiled already")
    args = parser.parse_args()
    program, page = Path(__file__).with_name("compile.py"), args.checkout / "llama3" / "README.md"
    if not page.is_file():
        parser.error(f"{args.checkout} is no clone of jax-ml/jax-llm-examples: it has no llama3/README.md")
    args.texts.mkdir(parents=True, exist_ok=True)
    rows = []
    print("copies  batch  context  measured ms  estimate ms  ratio  bytes alone  collectives  kernel")
    for cell in cells(page.read_text()):
        path = args.texts / cell.file
        if not path.is_file():
            if args.compiled:
                continue
            where = map(str, (program, args.checkout, cell.copies, cell.batch, cell.context, path))
            subprocess.run([args.python or sys.executable, *where], check=True)
        row = row_of(cell, walked(gzip.decompress(path.read_bytes()).decode()))
        rows.append(row)
        print(
            f"{cell.copies:6d} {cell.batch:6d} {cell.context:8d} {row['measured']:12.2f} {row['estimate']:12.2f} {row['ratio']:6.2f}"
            f" {row['bytes_alone']:12.2f} {row['collectives']:12.2f} {row['kernel']:7.2f}",
            flush=True,
        )
    if not rows:
        parser.error(f"{args.texts} has no compiled text; leave out --compiled")
    write(__file__, {"summary": summary(rows), "rows": rows}, FILES[bool(args.python)])
    found, newer = (read(__file__, FILES[timed], missing={"rows": []}) for timed in (True, False))
    place(__file__, cells_table(found["rows"], newer["rows"]), "cells")
    place(__file__, summary_table(found["summary"]), "errors")
    print(summary_table(summary(rows)))


if __name__ == "__main__":
    main()
