"""Choose how a model is split over a slice, and show what each way costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from partinf.cli.planning import Asked, add_model_arguments, read

if TYPE_CHECKING:
    from partinf.planner.report import PlanReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--objective", default="latency", metavar="AIM", help="latency, throughput or cost (default: latency)")
    parser.add_argument("--max-latency-ms", metavar="MS", help="bound on the step (one phase) or on the whole request")
    parser.add_argument("--save", metavar="FILE", help="write the best layout as a layout file")
    parser.add_argument("--top", default="12", metavar="N", help="candidates in the table (default: 12)")
    parser.add_argument("--format", default="table", metavar="FORMAT", help="table or json (every candidate)")
    parser.epilog = "Example: partinf plan --model palm-540b --slice v4:4x4x4 --phase decode --batch 64 --context 2048 --weights int8"


def run(args: argparse.Namespace) -> int:
    asked = read(args, args.objective, args.max_latency_ms, _offences(args))
    from partinf.planner.search import search

    report = search(
        asked.model,
        asked.slice,
        asked.workload,
        calibration=asked.calibration,
        bandwidth_model=asked.bandwidth_model,
        program=asked.program,
    )
    if args.save:
        _save(report, asked, Path(args.save))
    if args.format == "json":
        import json

        from partinf.planner.as_json import report_json

        print(json.dumps(report_json(report), separators=(",", ":")))
    else:
        from partinf.cli.plan_table import show

        show(report, int(args.top), args.save)
    return 0


def _offences(args: argparse.Namespace) -> list[str]:
    offences = []
    if args.format not in ("table", "json"):
        offences.append(f"--format {args.format}: valid: table, json")
    if not args.top.isdigit() or int(args.top) < 1:
        offences.append(f"--top {args.top}: a whole number of at least 1 is needed")
    if args.save and not Path(args.save).absolute().parent.is_dir():
        offences.append(f"--save {args.save}: there is no directory {Path(args.save).absolute().parent}")
    return offences


def _save(report: PlanReport, asked: Asked, path: Path) -> None:
    """Write the best candidate; what does not fit is not saved.

    Raises:
        InvalidInput: nothing fits.
    """
    from partinf.errors import InvalidInput
    from partinf.planner.choose import misfit, plan_of
    from partinf.planner.files import plan_to_toml

    if not report.best.fits:
        raise InvalidInput(misfit(report))
    path.write_text(plan_to_toml(plan_of(report, report.best), asked.workload))
