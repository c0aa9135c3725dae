"""Serve a saved plan on a TPU slice, or run another command there: the pod scripts of this checkout, driven by plan and description.

The work is done by `tpu_scripts/`, which is no part of the package: launching sends a commit of a checkout, so it needs one.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partinf.cli.arguments import add_pod
from partinf.cli.flags import Flags
from partinf.foundation.limits import MAX_SECONDS

if TYPE_CHECKING:
    from partinf.plans import Plan

# What a dry run of a plan alone shows in place of what only a description can say; where the weights lie comes to that.
_PLACEHOLDERS = {"project": "your-project", "zone": "your-zone1-a", "time_to_live": "1h"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", required=True, type=Path, metavar="FILE", help="a plan saved by partinf plan --save")
    parser.add_argument("--manifest", action="store_true", help="print a GKE JobSet instead")
    add_pod(parser, "--output")
    parser.add_argument("--prices", type=Path, metavar="FILE", help="prices in place of the hardware table's; see tpu_scripts/README.md")
    parser.epilog = "Example: partinf launch --plan plan.toml --description pod.toml --dry-run"


def run(args: argparse.Namespace) -> int:
    from partinf.foundation.errors import InvalidInput

    flags = Flags(args)
    args.poll_seconds = flags.number("poll_seconds", high=MAX_SECONDS)
    flags.check()
    folder = Path(__file__).resolve().parents[2] / "tpu_scripts"
    if not (folder / "pod.py").is_file():
        raise InvalidInput("launch: tpu_scripts/ is missing; launching sends a commit, so run it from a checkout of partinf")
    if args.description is None and not args.dry_run and not args.manifest:
        raise InvalidInput("--description is missing: a plan does not say which project pays, where and for how long; or pass --dry-run")
    sys.path.insert(0, str(folder))
    pod: Any = importlib.import_module("pod")
    planned = pod.read_plan(args.plan)
    if args.description is not None:
        content, where, base = pod.read_text(args.description, "description"), str(args.description), args.description.resolve().parent
    else:
        placeholders = _placeholders(planned)
        lines = [f'{key} = "{value}"' for key, value in {"name": _name(planned.plan), **placeholders}.items()]
        content, where, base = "\n".join([*lines, "[gke]", 'image = "your-image"', ""]), str(args.plan), folder.parent
        print(f"partinf: placeholders for {', '.join(placeholders)}: a --description gives them", file=sys.stderr)
    description = pod.read_description(content, where, base, planned)
    return int(pod.perform(pod.options_of(args, "manifest" if args.manifest else "launch"), description, planned))


def _placeholders(planned: Any) -> dict[str, str]:
    from partinf.planner.show.commands import ships_weights, unservable

    elsewhere = not ships_weights(planned.model) and unservable(planned.plan) is None
    return _PLACEHOLDERS | ({"model": f"path/to/{planned.plan.model.name}"} if elsewhere else {})


def _name(plan: Plan) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"run-{plan.model.name}".lower())[:30].strip("-")
