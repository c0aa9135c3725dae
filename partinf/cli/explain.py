"""Print a layout as numbered lines of shapes and collectives, with bytes and time each."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from partinf.cli.arguments import add_layout, is_auto
from partinf.cli.flags import Flags
from partinf.cli.planning import PlanInput, add_model_arguments, named, read

if TYPE_CHECKING:
    from partinf.hardware.slices import Slice
    from partinf.layout import Layout
    from partinf.model.config import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_layout(parser)
    parser.epilog = "Example: partinf explain --model palm-540b --slice v4:4x4x4 --phase decode --batch 64 --context 2048 --layout ws-2d"


def run(args: argparse.Namespace) -> int:
    flags = Flags(args)
    if is_auto(args.slice):
        flags.refuse("slice", "explain takes one slice; `partinf plan` finds it")
    wanted = read(flags)
    slice_, layout, padded_heads = named_or_chosen(wanted, args.layout, args.mesh)
    from partinf.cost.step import step_ledger
    from partinf.foundation.terminal import wide_console
    from partinf.layout import PHASES, readable_name
    from partinf.planner.show.table import print_step

    console = wide_console()
    name = readable_name(layout, slice_.axis_sizes)
    console.print(f"{wanted.model.name} on {slice_.name} ({slice_.mesh}): {name}", highlight=False)
    if padded_heads:
        console.print(_padding(wanted.model, padded_heads), highlight=False)
    evaluator = wanted.question.evaluator(slice_)
    for label in (wanted.workload.phase,) if wanted.workload.phase else PHASES:
        split = evaluator.split(layout, label, padded_heads)
        print_step(console, label, split, step_ledger(split))
    return 0


def _padding(model: ModelConfig, heads: int) -> str:
    """What padding of heads adds, in a line."""
    from partinf.model.weights import num_params

    padded = model.with_padded_heads(heads)
    kv = f", key-value heads from {model.num_kv_heads} to {padded.num_kv_heads}" if padded.num_kv_heads != model.num_kv_heads else ""
    more = num_params(padded) - num_params(model)
    return (
        f"query heads are padded from {model.num_heads} to {heads}{kv}: {more / 1e6:.4g} M parameters more ({more / num_params(model):.1%})"
    )


def named_or_chosen(wanted: PlanInput, name: str, mesh: str | None) -> tuple[Slice, Layout, int]:
    """The slice, under a finer mesh where one was chosen, the layout and its padded heads.

    Args:
        name: of the layout, or auto. mesh: the one that was named; None where it may be chosen.

    Raises:
        InvalidInput: an unknown layout, one of more kinds of axes than the slice has axes, or one that cannot hold the model.
    """
    if name != "auto":
        return wanted.slice, *named(wanted, name)
    from partinf.planner.meshes import fastest
    from partinf.planner.report import answer

    report = (fastest if mesh is None else answer)(wanted.question, wanted.slice)
    return report.slice, report.best.layout, report.best.padded_heads
