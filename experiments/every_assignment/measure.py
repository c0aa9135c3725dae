"""Every role assignment: the partitioned step against the reference, and the planner's account of it against the traced program's.

    python -m experiments.every_assignment.measure          # about 40 minutes on two cores; writes results.json

These are the slow tests `test_every_assignment…` of tests/execution, part of `make test-all`; here they run alone and their results are
counted by mesh and by how attention runs. Fails where a test fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import jax

from experiments.results import machine, write

ATTENDS = "equal to the reference"  # the accounts know one form of attention only
TESTS = {
    ATTENDS: "tests/execution/test_equivalence.py",
    "accounts equal": "tests/execution/test_two_accounts.py",
}


def run(path: str) -> tuple[list[tuple[str, bool]], float]:
    """The slow tests of a file about every assignment: identifiers and whether each passed; seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", path, "-q", "-m", "slow", "-k", "test_every_assignment", f"--junitxml={report}"]
        start = time.perf_counter()
        subprocess.run([*command, "-n", str(os.cpu_count()), "--dist", "worksteal"], cwd=Path(__file__).parents[2], check=False)
        seconds = time.perf_counter() - start
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return [(case.get("name", ""), all(child.tag not in ("failure", "error", "skipped") for child in case)) for case in cases], seconds


def kind(name: str) -> str:
    """The mesh of `test_…[MESH roles kvK dD ring]`, and how attention runs."""
    words = name[name.index("[") + 1 : -1].split()
    return f"{words[0]}, {'kernels' if 'd16' in words else 'tiles'}"


def main() -> None:
    found: dict[str, object] = {
        "date": str(date.today()),
        "machine": f"{machine()}, jax {jax.__version__}",
    }
    failed = []
    for what, path in TESTS.items():
        results, seconds = run(path)
        if not results:
            raise SystemExit(f"{path} has no such tests")
        counted: dict[str, dict[str, int]] = defaultdict(lambda: {"passed": 0, "failed": 0})
        for name, passed in results:
            where = kind(name) if what == ATTENDS else kind(name).partition(",")[0]
            counted[where]["passed" if passed else "failed"] += 1
        failed += [name for name, passed in results if not passed]
        found[what] = {"seconds": round(seconds), **dict(sorted(counted.items()))}
        for name, counts in sorted(counted.items()):
            print(f"{what:24} {name:16} {counts['passed']:5} passed {counts['failed']:3} failed", flush=True)
    found["failed"] = failed
    write(__file__, found)
    if failed:
        raise SystemExit(f"{len(failed)} failed")


if __name__ == "__main__":
    main()
