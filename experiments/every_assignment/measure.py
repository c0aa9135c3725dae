"""Every role assignment: the partitioned step against the reference, and the planner's account of it against the traced program's.

    python -m experiments.every_assignment.measure [NAME…] [--processes N] [--count]        # writes results.json

These are the slow tests `test_every_assignment…` of tests/execution, part of `make test-all`; here they run alone and their results are
counted by mesh and by how attention runs. A run that was ended is resumed: what passed lies in `.cache/every_assignment`. Fails where a
test fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

import jax

from experiments.every_assignment import kept
from experiments.results import machine, read, write

ROOT = Path(__file__).parents[2]
# What is run: the file and the test; whether how attention runs is counted apart, which the accounts know nothing of.
TESTS = {
    "equal": ("tests/execution/test_equivalence.py", "test_every_assignment_equals_the_reference", True),
    "accounts": ("tests/execution/test_two_accounts.py", "test_every_assignment", False),
    "families": ("tests/execution/test_blocks.py", "test_every_assignment_of_families", True),
}


def file_of(name: str) -> Path:
    return ROOT / ".cache" / "every_assignment" / f"{name}.jsonl"


def run(name: str, processes: int) -> None:
    """The tests of one name that have not passed yet."""
    path, test, _ = TESTS[name]
    file = file_of(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", f"{path}::{test}", "-q", "-m", "slow", "-p", "experiments.every_assignment.kept"]
    command += ["-n", str(processes), "--dist", "worksteal"] if processes > 1 else []
    subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "PARTINF_KEPT": str(file), "JAX_ENABLE_COMPILATION_CACHE": "0"})


def kind(test: str, attends: bool) -> str:
    """The mesh of `test_…[FAMILY MESH roles kvK dD ring]`, its family if it names one, and how attention runs."""
    words = test[test.index("[") + 1 : -1].split()
    count = next(number for number, word in enumerate(words) if word[0].isdigit())
    return " ".join(words[: count + 1]) + (f", {'kernels' if 'd16' in words else 'tiles'}" if attends else "")


def counted(results: dict[str, tuple[bool, float]], attends: bool, total: int) -> dict[str, object]:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"passed": 0, "failed": 0})
    for test, (passed, _) in results.items():
        counts[kind(test, attends)]["passed" if passed else "failed"] += 1
    seconds = round(sum(seconds for _, seconds in results.values()))
    return {
        "date": str(date.today()),
        "machine": f"{machine()}, jax {jax.__version__}",
        "seconds of tests": seconds,
        **dict(sorted(counts.items())),
        "not run yet": total - len(results),
        "which failed": [test for test, (passed, _) in results.items() if not passed],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*TESTS, []], help="all by default")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--count", action="store_true", help="run nothing, and write down what was run before")
    args = parser.parse_args()
    found, failed = read(__file__, missing={}), []
    for name in args.names or TESTS:
        if not args.count:
            run(name, args.processes)
        results = kept.read(file_of(name))
        if not results:
            raise SystemExit(f"{TESTS[name][0]} has no such tests, or none was run")
        found[name] = counted(results, TESTS[name][2], int(kept.total_file(file_of(name)).read_text()))
        failed += found[name]["which failed"]
        write(__file__, found)
        print(name, found[name], sep="\n")
    if failed:
        raise SystemExit(f"{len(failed)} failed")


if __name__ == "__main__":
    main()
