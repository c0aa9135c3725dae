"""Compiles the twelve steps for their slices, without a TPU: `python -m experiments.planner_and_proof.compile TEXTS [NAME …]`.

Half a minute to a few minutes each. TEXTS: a folder that keeps what the compiler printed; programs in it are not compiled again.
"""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import asdict
from pathlib import Path

from experiments.planner_and_proof.steps import STEPS, Step, planned
from partinf.proof.process import Compiled, Limits, compile_bucket


def file_of(step: Step, texts: Path) -> Path:
    return texts / f"{step.name.replace(' ', '_')}.json.gz"


def compiled_of(step: Step, texts: Path) -> Compiled:
    """What the compiler printed for a step."""
    return Compiled(**json.loads(gzip.decompress(file_of(step, texts).read_bytes())))


def main(texts: Path, names: list[str]) -> None:
    texts.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        path = file_of(step, texts)
        if path.is_file() or (names and step.name not in names):
            continue
        compiled = compile_bucket(*planned(step), Limits(seconds=600, memory_bytes=8 << 30))
        path.write_bytes(gzip.compress(json.dumps(asdict(compiled)).encode()))
        print(f"{step.name}: {compiled.seconds:.0f} s {compiled.refusal[:80]}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
