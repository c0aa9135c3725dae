"""A pytest plugin that keeps results in a file as they come, and leaves out tests that passed before: so a long run can be resumed.

The file is named by the environment variable `PARTINF_KEPT`. With several processes each collects before the first test runs, and the one
that they report to writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def read(path: Path) -> dict[str, tuple[bool, float]]:
    """Whether each test passed, and its seconds; the last run counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {one["test"]: (one["passed"], one["seconds"]) for one in map(json.loads, lines)}


def total_file(path: Path) -> Path:
    """Where it stands how many tests there are."""
    return path.with_suffix(".total")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ and items:
        total_file(Path(os.environ["PARTINF_KEPT"])).write_text(str(len(items)))
    done = {test for test, (passed, _) in read(Path(os.environ["PARTINF_KEPT"])).items() if passed}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    line = {"test": report.nodeid, "passed": report.passed, "seconds": round(report.duration, 2)}
    with Path(os.environ["PARTINF_KEPT"]).open("a") as file:
        file.write(json.dumps(line) + "\n")
