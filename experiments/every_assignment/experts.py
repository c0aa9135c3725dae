"""Every role assignment of a mixture of experts: one partitioned sublayer against the reference, and the planner's account of a step
against the traced program's; and whole steps of ragged prompts for a sample.

    python -m experiments.every_assignment.experts          # two hours of one core; writes experts.json, goes on from there when stopped

These are the checks of the slow tests in `tests/execution/test_experts.py` and `test_expert_accounts.py`, in one process with the order of
three axes' assignments drawn, so that what is done when it is stopped is a sample. Fails where a check fails.
"""

from __future__ import annotations

import tests.conftest  # noqa: F401  the environment, before jax is imported

# isort: split
import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax

from experiments.results import machine, next_to
from tests.execution.assignments import MESHES
from tests.execution.harness import TOLERANCE, largest_error, make_plan
from tests.execution.mixtures import Mixed, all_mixed, largest_errors, model_of
from tests.execution.test_expert_accounts import MIXED, check_mixed

SEED = 22
STEPS = 60  # whole steps, drawn among all assignments
_KEPT_EVERY = 20
FILE = "experts.json"


def equal(mixed: Mixed) -> float:
    """The largest difference of any output from the reference, however tokens are routed."""
    return max(largest_errors(mixed).values())


def whole_step(mixed: Mixed) -> float:
    """The same of the logits of sequences of ragged lengths, through prefill, chunks, mixed steps and decode."""
    return largest_error(make_plan(mixed.mesh, mixed.layout(), model_of(mixed.mixture)))


def account(mixed: Mixed) -> float:
    check_mixed(mixed, MIXED)
    return 0.0


def drawn(every: Sequence[Mixed], count: int | None = None) -> list[Mixed]:
    """Mesh by mesh in the order of `MESHES`, 2x4 last, each mesh shuffled; or so many of all of them."""
    shuffled = random.Random(SEED).sample(list(every), len(every))
    order = [*(mesh for mesh in MESHES if mesh != "2x4"), "2x4"]
    return shuffled[:count] if count else sorted(shuffled, key=lambda mixed: order.index(mixed.mesh))


PARTS: dict[str, tuple[Callable[[Mixed], float], Callable[[], list[Mixed]]]] = {
    "whole steps": (whole_step, lambda: drawn(all_mixed(), STEPS)),
    "sublayers": (equal, lambda: drawn(all_mixed())),
    "accounts": (account, lambda: drawn(all_mixed(three_axes=9))),
}


def sweep(part: str, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Check what is left of a part, and count it by mesh in `found`."""
    check, listed = PARTS[part]
    found.setdefault("failed", [])
    meshes = found.setdefault("meshes", {})
    todo = listed()
    for mesh, count in Counter(mixed.mesh for mixed in todo).items():
        meshes.setdefault(mesh, {"of": count, "passed": 0, "largest": 0.0})
    start, before = time.process_time(), found.setdefault("cpu_seconds", 0)
    for number, mixed in enumerate(todo[sum(mesh["passed"] for mesh in meshes.values()) + len(found["failed"]) :], 1):
        counts = meshes[mixed.mesh]
        try:
            error = check(mixed)
        except AssertionError as unequal:
            error = float("inf")
            print(mixed, unequal, flush=True)
        if error < TOLERANCE["f32"]:
            counts["passed"] += 1
            counts["largest"] = max(counts["largest"], float(f"{error:.2g}"))
        else:
            found["failed"].append(f"{mixed}: {error:.2g}")
        if number % _KEPT_EVERY == 0:
            found["cpu_seconds"] = round(before + time.process_time() - start)
            keep()
            jax.clear_caches()
    found["cpu_seconds"] = round(before + time.process_time() - start)
    keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="one of the parts alone")
    parser.add_argument(
        "--into", type=Path, default=next_to(__file__, FILE), help=f"the file of results (default: {FILE} next to this script)"
    )
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.into.read_text()) if args.into.exists() else {}

    def keep() -> None:
        args.into.write_text(json.dumps(found, indent=1) + "\n")

    found |= {"date": str(date.today()), "machine": f"{machine()}, jax {jax.__version__}"}
    for part in [args.part] if args.part else PARTS:
        sweep(part, found.setdefault(part, {}), keep)
        for mesh, counts in found[part]["meshes"].items():
            print(f"{part:12} {mesh:6} {counts['passed']:5} of {counts['of']:5} passed, largest difference {counts['largest']}", flush=True)
    failed = [name for part in PARTS for name in found.get(part, {}).get("failed", [])]
    if failed:
        raise SystemExit(f"{len(failed)} failed: {', '.join(failed[:5])}")


if __name__ == "__main__":
    main()
