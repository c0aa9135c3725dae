"""Holds the walk of a proof against a program that others wrote and timed: jax-llm-examples' Llama 3 70B in int8 on 16 chips of v5e.

    python -m experiments.timed_programs.measure CHECKOUT TEXTS     # writes results.json; two to four minutes for every missing text

CHECKOUT: a clone of jax-ml/jax-llm-examples. Its program is compiled as it stands, its README says what was timed. TEXTS: a folder that
keeps the compiled texts. Without a TPU; one compilation at a time. `--compiled` takes only the texts that are there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
# Its attention kernel, of which the compiler says nothing: seconds per sequence and layer at the 512 tokens and more of the timed runs. The
# kernel reads whole tiles of 512 positions of keys and values, so between 131 and 262 kB: 0.17 to 0.34 us of HBM.
KERNEL, ROW_SECONDS = "vmap__", 0.29e-6
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
        return KernelRun(ROW_SECONDS * instruction.shapes[0].dims[0])

    return Reader(Module(text), SLICE, network, kernels={KERNEL: kernel}, pace=pace).read()


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
    both = {(row["batch"], row["context"], row["copies"]): row for row in rows}
    pairs = [
        (row, both[batch, context, 2]) for (batch, context, copies), row in both.items() if copies == 1 and (batch, context, 2) in both
    ]
    right = sum((one["estimate"] < two["estimate"]) == (one["measured"] < two["measured"]) for one, two in pairs)
    return {
        "cells": len(rows),
        **_errors(row["ratio"] for row in rows),
        "held_out": held,
        "pairs": len(pairs),
        "pairs_ordered_right": right,
    }


def _errors(ratios: Iterable[float]) -> dict[str, float]:
    sizes = sorted(abs(ratio - 1) for ratio in ratios)
    ninth = sizes[min(len(sizes) - 1, math.ceil(0.9 * len(sizes)) - 1)]
    return {"median": round(statistics.median(sizes), 3), "p90": round(ninth, 3), "worst": round(sizes[-1], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--compiled", action="store_true", help="only what is compiled already")
    args = parser.parse_args()
    args.texts.mkdir(parents=True, exist_ok=True)
    rows = []
    print("copies  batch  context  measured ms  estimate ms  ratio  bytes alone  collectives  kernel")
    for cell in cells((args.checkout / "llama3" / "README.md").read_text()):
        path = args.texts / cell.file
        if not path.is_file():
            if args.compiled:
                continue
            where = map(str, (args.checkout, cell.copies, cell.batch, cell.context, path))
            subprocess.run([sys.executable, "-m", "experiments.timed_programs.compile", *where], check=True)
        row = row_of(cell, walked(gzip.decompress(path.read_bytes()).decode()))
        rows.append(row)
        print(
            f"{cell.copies:6d} {cell.batch:6d} {cell.context:8d} {row['measured']:12.2f} {row['estimate']:12.2f} {row['ratio']:6.2f}"
            f" {row['bytes_alone']:12.2f} {row['collectives']:12.2f} {row['kernel']:7.2f}",
            flush=True,
        )
    found = {"summary": summary(rows), "rows": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()
