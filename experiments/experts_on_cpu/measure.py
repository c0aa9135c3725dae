"""Decode steps of a small mixture of experts on one CPU, compared with transformers with each of its ways to multiply experts.

    python -m experiments.experts_on_cpu.measure --torch-python PYTHON        # two minutes; writes results.json and README's table

Both sides hold the same weights in processes of their own. transformers is timed once with each way; its fastest one and partinf then run
in turns (`sides`), while the other is stopped (SIGSTOP), whatever its threads would do: a figure of these is the median of the rounds, the
ratio that of the rounds'.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from experiments.experts_on_cpu.sides import SHAPE, WAYS
from experiments.results import machine, next_to, write

ROWS, ROUNDS = (1, 8, 32), 5
SIZES = {"float32": 4, "bfloat16": 2}
_SIDES = str(Path(__file__).with_name("sides.py"))


class Side:
    """A process that answers lines."""

    def __init__(self, python: str, *words: str) -> None:
        self._process = subprocess.Popen(  # in a process group of its own, which signals stop as a whole
            [python, _SIDES, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        assert self._from.readline() == "ready\n"
        os.killpg(self._process.pid, signal.SIGSTOP)

    def ask(self, way: str, rows: int) -> float:
        os.killpg(self._process.pid, signal.SIGCONT)
        self._to.write(f"{way} {rows}\n")
        self._to.flush()
        found = float(self._from.readline())
        os.killpg(self._process.pid, signal.SIGSTOP)
        return found

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)
        self._to.close()
        self._process.wait()


def floor_bytes(hits: float, size: int) -> tuple[float, float]:
    """Bytes of the experts that were hit, in all layers, and of the other matrices that a step reads."""
    embed, layers = SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
    heads = 2 * SHAPE["num_attention_heads"] + 2 * SHAPE["num_key_value_heads"]
    others = layers * embed * (heads * SHAPE["head_dim"] + SHAPE["num_experts"]) + embed * SHAPE["vocab_size"]
    return hits * 3 * embed * SHAPE["moe_intermediate_size"] * size, others * size


def row(ours: Side, theirs: Side, dtype: str, rows: int, bandwidth: float) -> dict[str, Any]:
    """Every way of transformers once, then its fastest one in turns with ours."""
    once = {way: theirs.ask(way, rows) for way in WAYS}
    fastest = min(WAYS, key=lambda way: once[way])
    ours.ask("ours", rows)
    rounds = []
    for number in range(ROUNDS):
        order = ("ours", fastest) if number % 2 else (fastest, "ours")
        rounds.append({way: (ours if way == "ours" else theirs).ask(way, rows) for way in order})
    hits = theirs.ask("hits", rows)
    experts, others = floor_bytes(hits, SIZES[dtype])
    found: dict[str, Any] = {"type": dtype, "rows": rows}
    found |= once | {way: statistics.median(one[way] for one in rounds) for way in ("ours", fastest)}
    found |= {"fastest": fastest, "ratio": statistics.median(one["ours"] / one[fastest] for one in rounds)}
    found |= {"hit_per_layer": hits / SHAPE["num_hidden_layers"], "floor_experts": experts / bandwidth, "floor_others": others / bandwidth}
    return found | {"over_floor": found["ours"] / (found["floor_experts"] + found["floor_others"])}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| type | rows | partinf ms | "
        + " | ".join(WAYS)
        + " | of the fastest | experts hit per layer | floor ms: experts + others | of the floor |"
    ]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for one in rows:
        times = " | ".join(f"{1e3 * one[way]:.3g}" for way in ("ours", *WAYS))
        floor = f"{1e3 * one['floor_experts']:.3g} + {1e3 * one['floor_others']:.3g}"
        last = f"{one['hit_per_layer']:.1f} | {floor} | {one['over_floor']:.2f}"
        lines.append(f"| {one['type']} | {one['rows']} | {times} | {one['ratio']:.2f} | {last} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-python", required=True, metavar="PYTHON", help="an interpreter that has torch and transformers")
    parser.add_argument("--model", metavar="FOLDER", help="what `sides.py make FOLDER` wrote; else it is written first")
    parser.add_argument("--note", default="", help="a note on the machine, such as what else ran on it")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        folder = args.model or made
        if not args.model:
            subprocess.run([args.torch_python, _SIDES, "make", folder], check=True)
        for dtype in SIZES:
            ours, theirs = Side(sys.executable, "partinf", dtype, folder), Side(args.torch_python, "transformers", dtype, folder)
            bandwidth = theirs.ask("bandwidth", 0)
            for count in ROWS:
                rows.append(row(ours, theirs, dtype, count, bandwidth) | {"bandwidth": bandwidth})
                print(rows[-1], flush=True)
            ours.end()
            theirs.end()
    write(__file__, {"date": str(date.today()), "machine": machine(), "note": args.note, "shape": SHAPE, "rows": rows})
    print(table(rows))
    page = next_to(__file__, "README.md")
    before, _, after = page.read_text().partition("<!-- table -->")
    page.write_text(f"{before}<!-- table -->\n{table(rows)}\n<!-- end -->{after.partition('<!-- end -->')[2]}")


if __name__ == "__main__":
    main()
