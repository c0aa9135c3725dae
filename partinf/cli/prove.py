"""Let the compiler say (for TPUs without a TPU) whether a plan fits, which collectives it runs and how long a step may take."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from partinf.cli.arguments import add_layout, add_pool, read_pool
from partinf.cli.flags import FORMATS, Flags
from partinf.cli.planning import add_model_arguments
from partinf.foundation.limits import MAX_SECONDS
from partinf.foundation.units import readable_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from partinf.plans import Bucket, Plan
    from partinf.proof import Proof, StepProof
    from partinf.workload import Workload

_SHOWN = 14  # rows of a table; JSON has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", metavar="FILE", help="a plan that `partinf plan --save` wrote; instead of --model and --slice")
    add_model_arguments(parser, required=False)
    add_layout(parser)
    text = "prove the largest step that serve would run for --batch sequences of the longest context, with as many pages as fit in memory"
    parser.add_argument("--as-served", action="store_true", help=text)
    add_pool(parser)
    parser.add_argument("--by-compiler", action="store_true", help="prove the program whose collectives the compiler chooses instead")
    parser.add_argument("--timeout", default="600", metavar="SECONDS", help="time limit of one compilation (default: 600)")
    parser.add_argument("--format", default="table", metavar="FORMAT", help="table or json")
    example = "--model palm-540b --slice v4:4x4x4 --layout ws-2d --phase decode --batch 64 --context 2048 --weights int8"
    parser.epilog = f"Example: partinf prove {example}"


def run(args: argparse.Namespace) -> int:
    from partinf.foundation.errors import raise_offences
    from partinf.proof import unavailable

    flags = Flags(args)
    seconds = _read(flags)
    pool = read_pool(flags)
    if not args.as_served and any(pool):
        flags.offences.append("--kv-pages and --memory-share belong to a serving engine; add --as-served")
    plan, workload = _saved(flags) if args.plan else _searched(flags)
    reason = unavailable(plan.slice.chip.platform)
    raise_offences([reason] if reason else [])
    from partinf.buckets import largest_step, serving_steps
    from partinf.cli.progress import progress_bar
    from partinf.proof import Limits, proof_json, prove

    if args.as_served:
        plan = _served(args, plan, workload, pool)
        buckets: tuple[Bucket, ...] = (largest_step(plan),)
    else:
        plan, buckets = serving_steps(plan, workload)
    with progress_bar(f"compiling for {plan.slice.name}", len(buckets)) as advance:
        proof = prove(plan, buckets, Limits(seconds=seconds), advance, args.by_compiler)
    if args.format == "json":
        import json

        print(json.dumps(proof_json(proof), separators=(",", ":")))
    else:
        show(proof)
    return 0


def _served(args: argparse.Namespace, plan: Plan, workload: Workload, pool: tuple[int, float]) -> Plan:
    """The plan that `serve` makes for as many sequences and as long a context as the workload has."""
    from partinf.api import plan as choose
    from partinf.buckets import served_capacity, with_capacity

    needed = max(workload.max_context, 1)
    served = served_capacity(workload.batch, min(needed, plan.model.longest_context or needed))
    capacity = replace(served, kv_pages=pool[0], memory_share=pool[1])
    chosen = args.plan or args.layout != "auto"
    return with_capacity(plan, capacity) if chosen else choose(plan.model, plan.slice, workload, capacity=capacity)


def _read(flags: Flags) -> float:
    """The bound on one compilation in seconds; what is wrong with the flags of this command joins their offences."""
    args = flags.args
    flags.word("format", FORMATS)
    if args.plan and (args.model or args.slice):
        flags.offences.append("--plan names its model and slice; leave out --model and --slice")
    if not args.plan and not (args.model and args.slice):
        flags.offences.append("either --plan FILE, or --model and --slice, must be given")
    seconds = float(flags.whole("timeout", low=1, high=int(MAX_SECONDS)))
    if not args.plan and not (args.model and args.slice):
        flags.check()
    return seconds


def _saved(flags: Flags) -> tuple[Plan, Workload]:
    """A saved plan and the workload that it was chosen for."""
    from partinf.foundation import documents
    from partinf.planner.files import saved_plan

    file = flags.args.plan
    found = flags.collect(lambda: saved_plan(documents.read_text(Path(file), f"plan {file}", documents.TOML_BYTES), file))
    return flags.need(found)


def _searched(flags: Flags) -> tuple[Plan, Workload]:
    """The plan of a named layout, or the one that the planner chooses."""
    from partinf.cli.explain import named_or_chosen
    from partinf.cli.planning import read
    from partinf.plans import Plan

    wanted = read(flags)
    slice_, layout, padded = named_or_chosen(wanted, flags.args.layout, flags.args.mesh)
    chosen = wanted.workload
    return Plan(wanted.model, slice_, layout, chosen.weights, chosen.kv, padded_heads=padded), chosen


def show(proof: Proof) -> None:
    """Print a proof as tables."""
    from partinf.foundation.terminal import wide_console

    console = wide_console()
    verdict = "fits" if proof.fits else "does not fit"
    console.print(f"{proof.model} on {proof.slice}: {verdict} ({proof.compiler})", highlight=False)
    if proof.planned is not None:
        console.print(f"by the plan: {proof.planned}", highlight=False)
    for step in proof.steps:
        _show_step(console, step)


def _show_step(console: Console, step: StepProof) -> None:
    held = step.memory
    console.print(f"\n[bold]{step.bucket}[/bold]", highlight=False)
    if not step.fits:
        console.print(f"does not fit: {held.needed / 1e9:.2f} GB needed, {held.usable / 1e9:.2f} GB usable per device", highlight=False)
        console.print(f"compiler: {step.refusal}", highlight=False, markup=False)
        if step.advice:
            console.print(f"would fit: {step.advice}", highlight=False, markup=False)
        return
    parts = f"arguments {held.arguments / 1e9:.2f}, temporaries {held.temporaries / 1e9:.2f}, code {held.code / 1e9:.3f}"
    slack = f"{(held.usable - held.needed) / 1e9:.2f} free"
    console.print(f"{held.needed / 1e9:.2f} of {held.usable / 1e9:.2f} GB per device, {slack}: {parts}", highlight=False)
    if step.estimate:
        e = step.estimate
        parts = f"compute and memory {e.compute * 1e3:.3g} ms, collectives {e.collectives * 1e3:.3g} ms"
        floor = (
            f"{e.overlapped * 1e3:.3g} ms more overlapped; lower bound {e.floor * 1e3:.3g} ms, planned {step.planned_seconds * 1e3:.3g} ms"
        )
        console.print(f"step {readable_seconds(e.seconds)} ± {e.error:.0%}: {parts}; {floor}", highlight=False)
        if e.note:
            console.print(e.note, highlight=False, markup=False)
    console.print(f"compiled in {step.compile_seconds:.1f} s", highlight=False)
    _show_collectives(console, step)
    _show_differences(console, step)
    _show_work(console, step)


def _show_collectives(console: Console, step: StepProof) -> None:
    from partinf.foundation.terminal import plain_table

    table = plain_table("collective", "axes", ">!bytes", ">!count", ">!µs each", ">!overlapped", "from")
    for one in step.collectives[:_SHOWN]:
        hidden = f"{one.overlapped_fraction:.0%}"
        cells = (one.op, "".join(one.axes), f"{one.bytes:,}", f"{one.count}", f"{one.seconds * 1e6:.1f}", hidden, one.source_op)
        table.add_row(*cells)
    console.print(table, markup=False)


def _show_differences(console: Console, step: StepProof) -> None:
    from partinf.foundation.terminal import plain_table

    if not step.differences:
        console.print("the compiled program matches the plan", highlight=False)
        return
    table = plain_table("compiled against planned", "what", ">count", ">ms", "from")
    for d in step.differences[:_SHOWN]:
        table.add_row(d.kind, d.what, f"{d.count}", f"{d.seconds * 1e3:+.3f}", d.source_op)
    console.print(table, markup=False)


def _show_work(console: Console, step: StepProof) -> None:
    from partinf.foundation.terminal import plain_table

    table = plain_table("most expensive instructions, without collectives", ">count", ">ms", "from")
    for one in step.work[:_SHOWN]:
        table.add_row(one.what, f"{one.count}", f"{one.seconds * one.count * 1e3:.3f}", one.source_op)
    console.print(table, markup=False)
