"""Products by oneDNN against every form of ours, on one core and in core time, which other work does little to. Writes onednn.json.

    python -m experiments.llama_125m_on_cpu.onednn --include FOLDER --library FOLDER

FOLDER: where dnnl.hpp lies, and libdnnl.so, as the packages `onednn-devel-cpu-gomp` and `onednn-cpu-gomp` unpack to
`*.data/data/include` and `*.data/data/lib`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

from experiments.results import write

ROWS = (1, 4, 16, 64, 256)


def library(include: str, folder: str) -> dict[tuple[str, int], tuple[float, float]]:
    """Seconds with weights as they are stored, and packed, by type and rows."""
    with tempfile.TemporaryDirectory() as made:
        program = str(Path(made) / "products")
        source = str(Path(__file__).with_name("onednn.cc"))
        search = [f"-I{include}", f"-L{folder}", f"-Wl,-rpath,{folder}"]
        subprocess.run(["g++", "-std=c++17", "-O2", source, "-o", program, *search, "-ldnnl"], check=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        printed = subprocess.run([program, *map(str, ROWS)], env=environment, check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in printed.splitlines()]
    return {(kind, int(rows)): (float(plain), float(packed)) for kind, rows, plain, packed in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--include", required=True)
    parser.add_argument("--library", required=True)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from partinf.transformer.kernels.turns import measured
    from partinf.transformer.machine import host

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    theirs = library(args.include, args.library)
    ours = measured(ROWS, 600.0)
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    print("| type | rows | oneDNN | packed | XLA | our best | | ours / oneDNN |\n|---|---|---|---|---|---|---|---|")
    for (kind, rows), (plain, packed) in theirs.items():
        took = {str(each.form): dict(each.measured)[rows] for each in ours.times if each.kind == kind and rows in dict(each.measured)}
        best = min((form for form in took if form not in ("xla", "widened")), key=took.__getitem__)
        found[kind][str(rows)] = {"plain": plain, "packed": packed, "forms": took}
        figures = [f"{1e6 * each:.0f}" for each in (plain, packed, took["xla"], took[best])]
        print(f"| {kind} | {rows} | {' | '.join(figures)} | {best} | {took[best] / plain:.2f} |")
    write(__file__, {"date": str(date.today()), "cpu": host(), "unsettled": ours.unsettled, "seconds": found}, "onednn.json")


if __name__ == "__main__":
    main()
