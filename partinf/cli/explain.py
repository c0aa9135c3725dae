"""Print a layout as numbered lines of shapes and collectives, with bytes and time each."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from partinf.cli.planning import Asked, add_model_arguments, read

if TYPE_CHECKING:
    from partinf.cost.ledger import Ledger
    from partinf.cost.split import StepSplit
    from partinf.layout import Layout
    from partinf.planner.explain import Line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--layout", default="auto", metavar="NAME|FILE|auto", help="a layout of layouts/, a saved plan, or auto: the planner's choice")
    parser.epilog = "Example: partinf explain --model palm-540b --slice v4:4x4x4 --phase decode --batch 64 --context 2048 --layout ws-2d"


def run(args: argparse.Namespace) -> int:
    asked = read(args)
    layout, padded_heads = _layout(asked, args.layout)
    from rich.console import Console

    from partinf.cost.calibration import calibration_for
    from partinf.cost.pricing import Pricing
    from partinf.cost.step import step_ledger
    from partinf.layout import readable_name
    from partinf.planner.evaluate import Evaluator

    console = Console()
    console.print(f"{asked.model.name} on {asked.slice.name} ({asked.slice.mesh}): {readable_name(layout, asked.slice.axis_sizes)}", highlight=False)
    pricing = Pricing(asked.slice, calibration_for(asked.slice.chip, asked.calibration), asked.bandwidth_model, asked.program)
    evaluator = Evaluator(asked.model, pricing, asked.workload)
    for label in (asked.workload.phase,) if asked.workload.phase else ("prefill", "decode"):
        split = evaluator.split(layout, label, padded_heads)
        _print_step(console, label, split, step_ledger(split))
    return 0


def _layout(asked: Asked, name: str) -> tuple[Layout, int]:
    """The layout and its padded heads.

    Raises:
        InvalidInput: an unknown layout, one for other axes, or one that cannot hold the model.
    """
    from partinf.cli.arguments import named_layout
    from partinf.errors import raise_offences
    from partinf.plan import layout_offences
    from partinf.planner.evaluate import heads_for
    from partinf.planner.search import search

    layout = named_layout(name)
    if layout is None:
        report = search(asked.model, asked.slice, asked.workload, calibration=asked.calibration, bandwidth_model=asked.bandwidth_model)
        return report.best.layout, report.best.padded_heads
    offences = layout_offences(asked.model, asked.slice, layout)
    padded = 0
    if offences and not set(layout.axes) ^ set(asked.slice.axis_sizes):
        padded = heads_for(asked.model, layout, asked.slice.axis_sizes) or 0
        offences = layout_offences(asked.model, asked.slice, layout, padded)
    raise_offences(offences)
    return layout, padded


def _print_step(console: object, label: str, split: StepSplit, ledger: Ledger) -> None:
    from rich.console import Console
    from rich.table import Table

    from partinf.planner.explain import explain

    assert isinstance(console, Console)
    number = 0
    console.print(f"\n[bold]{label} step[/bold], {ledger.seconds * 1e3:.4g} ms; times and bytes per occurrence, on one device", highlight=False)
    for section in explain(split, ledger):
        table = Table(box=None, pad_edge=False, show_header=number == 0, header_style="bold")
        for title, justify in (("", "right"), ("", "left"), ("then", "left"), ("here", "left"), ("bytes", "right"), ("µs", "right")):
            table.add_column(title, justify=justify)  # type: ignore[arg-type]
        for line in section.lines:
            number += 1
            table.add_row(str(number), _what(line), line.shape, line.local, _bytes(line), _time(line))
        start = f", from {section.start}" if section.start else ""
        count = section.lines[0].entry.count
        console.print(f"\n{section.title}{start}" + (f" (×{count})" if count > 1 else ""), highlight=False, markup=False)
        console.print(table, markup=False)


def _what(line: Line) -> str:
    entry = line.entry
    return f"{entry.op}({''.join(entry.axes)}) {entry.name}" if entry.op else entry.name


def _bytes(line: Line) -> str:
    entry = line.entry
    size = entry.bytes or entry.weight_bytes + entry.kv_bytes + entry.activation_bytes
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def _time(line: Line) -> str:
    entry = line.entry
    hidden = f" ({entry.overlapped * 1e6:.1f} hidden)" if entry.overlapped else ""
    return f"{(entry.seconds - entry.overlapped) * 1e6:.1f}{hidden}"
