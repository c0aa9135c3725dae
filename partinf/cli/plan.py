"""Choose how a model is split over a slice, and show what each way costs."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partinf.cli.arguments import is_auto
from partinf.cli.flags import FORMATS, Flags
from partinf.cli.plan_served import add_bounds, as_json, chosen, lines, read_bounds
from partinf.cli.planning import PlanInput, add_model_arguments, named, read

if TYPE_CHECKING:
    from partinf.planner.report import PlanReport
    from partinf.planner.results import Candidate
    from partinf.planner.trials import Trial
    from partinf.proof.candidates import Proofs


_MOST_SHOWN = 10_000
_PROOF_SECONDS = 600.0  # bound on one compilation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    layouts = "price this layout (of layouts/, or a file) instead of searching; give several to compare them"
    parser.add_argument("--layout", action="append", metavar="NAME|FILE", help=layouts)
    parser.add_argument("--objective", default="latency", metavar="AIM", help="latency, throughput or cost (default: latency)")
    parser.add_argument("--max-latency-ms", metavar="MS", help="bound on the step (one phase) or on the whole request")
    parser.add_argument(
        "--arrivals", metavar="RATE", help="arriving requests per second, for the advice on batch size and for --ttft and --tpot"
    )
    add_bounds(parser)
    parser.add_argument("--price-per-chip-hour", metavar="MONEY", help="also print the price of a million tokens")
    parser.add_argument(
        "--prove",
        nargs="?",
        const="3",
        metavar="N",
        help="compile the first N (default: 3) with the TPU compiler, and rank them by its estimate",
    )
    parser.add_argument("--save", metavar="FILE", help="write the best layout as a layout file")
    parser.add_argument("--plot", metavar="FILE", help="draw a picture of --plot-kind (.png, .svg or .pdf)")
    kinds = "ledger: the top candidates as stacked bars; front: latency against cost; volume: communication against tokens"
    parser.add_argument("--plot-kind", default="ledger", metavar="KIND", help=kinds)
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page: choice, memory, candidates, steps line by line")
    parser.add_argument("--top", default="12", metavar="N", help="candidates in the table (default: 12)")
    parser.add_argument("--format", default="table", metavar="FORMAT", help="table or json (every candidate)")
    found = "--slice auto:CHIP finds the cheapest slice that keeps --max-latency-ms, or --ttft and --tpot at --arrivals"
    parser.description = f"{parser.description} {found}; --mesh auto the best of many meshes."
    parser.epilog = (
        "Example: partinf plan --model palm-540b --slice v4:4x4x4 --phase decode --batch 64 --context 2048 --weights int8. "
        "Notation: E is d_model, F d_ff, B the batch, L the tokens of a sequence, H heads; E_x F_yz: mesh axis x splits d_model, y and z "
        "split d_ff. ws-1d, ws-2d: weights stay where they are; d_ff is split, or d_ff and d_model. wg-x, wg-xy, wg-xyz: weights are "
        "gathered over the axes of d_model, over these and some of d_ff, over all. batch:y heads:x: in attention y splits whole "
        "sequences and x splits heads; sequence splits the context. tie: the cost model cannot tell it from the best. ±12%: the error "
        "for steps that the constants were not fitted to. MFU: useful FLOPs over peak."
    )


def run(args: argparse.Namespace) -> int:
    flags = Flags(args)
    top, count, price = _read(flags)
    bounds, mesh = read_bounds(flags), args.mesh
    if mesh == "auto":
        args.mesh = None
    wanted = read(flags)
    compared = _given(wanted, args.layout) if args.layout else ()
    trials, served = chosen(wanted, bounds, lambda: _trials(wanted, mesh, compared))
    report, proofs = _proven(trials[0].report, count)
    if args.save:
        _save(report, wanted, Path(args.save), args.model)
    if args.plot:
        from partinf.planner.show.plot import draw

        draw(report, Path(args.plot), top, args.plot_kind)
    if args.html:
        from partinf.planner.show.page import page

        Path(args.html).write_text(page(report, top))
    if args.format == "json":
        from partinf.planner.show.as_json import trials_json
        from partinf.planner.show.json_text import report_text

        more = trials_json(trials, price) | _commands(report, args.save, args.model) | as_json(served)
        if len(compared) > 1:
            from partinf.planner.show.compare import comparison_json

            more |= {"comparison": comparison_json(args.layout, compared)}
        print(report_text(report, _proof_json(report, proofs), more))
    else:
        from partinf.cli.plan_proof import show as show_proofs
        from partinf.planner.show.table import show, show_commands, show_trials

        show_trials(trials, price)
        for line in lines(served):
            print(line)
        if proofs:
            show_proofs(trials[0].report, report, proofs)
        show(report, top, args.save)
        if len(compared) > 1:
            from partinf.foundation.terminal import wide_console
            from partinf.planner.show.compare import comparison_table

            wide_console().print(comparison_table(args.layout, compared))
        show_commands(report, args.save, args.model)
    return 0


def _given(wanted: PlanInput, names: list[str]) -> tuple[Candidate, ...]:
    """The layouts that were named, priced, in their order.

    Raises:
        InvalidInput: everything that is wrong with any of them.
    """
    from partinf.foundation.errors import collect, raise_offences
    from partinf.planner.search import given

    offences: list[str] = []
    found = [collect(offences, partial(named, wanted, name)) for name in names]
    raise_offences(offences)
    return given(wanted.question, wanted.slice, [one for one in found if one is not None])


def _proven(report: PlanReport, count: int | None) -> tuple[PlanReport, Proofs]:
    """The report, in the compiler's order with `--prove`."""
    if count is None:
        return report, {}
    from partinf.cli.progress import progress_bar
    from partinf.proof.candidates import prove_candidates

    with progress_bar(f"proving candidates for {report.slice.name}", count) as advance:
        return prove_candidates(report, count, _PROOF_SECONDS, advance)


def _proof_json(report: PlanReport, proofs: Proofs) -> dict[int, dict[str, Any]]:
    """Proofs by the candidate's place."""
    if not proofs:
        return {}
    from partinf.proof import proof_json
    from partinf.proof.candidates import key

    return {index: proof_json(proofs[key(c)]) for index, c in enumerate(report.candidates) if key(c) in proofs}


def _commands(report: PlanReport, saved: str | None, model: str) -> dict[str, Any]:
    """The commands that come after the plan; nothing where nothing fits."""
    from partinf.planner.show.commands import commands

    if not report.best.fits:
        return {}
    return {"commands": commands(saved or "plan.toml", report.plan, report.workload, model)}


def _trials(wanted: PlanInput, mesh: str | None, compared: tuple[Candidate, ...]) -> list[Trial]:
    """The slice of the question; with `auto` all slices or meshes that were tried, the cheapest or fastest first.

    Args:
        mesh: as it was named. compared: candidates that take the place of a search.
    """
    from partinf.planner.meshes import every_mesh, fastest
    from partinf.planner.report import PlanReport, answer
    from partinf.planner.search import order
    from partinf.planner.trials import Trial, cheapest

    question, slice_ = wanted.question, wanted.slice
    if wanted.auto:
        return cheapest(question, slice_.chip)
    if compared:
        return [Trial(PlanReport(question, slice_, order(compared)))]
    if mesh == "auto":
        return [Trial(report) for report in every_mesh(question, slice_)]
    return [Trial(fastest(question, slice_) if mesh is None else answer(question, slice_))]


def _read(flags: Flags) -> tuple[int, int | None, float | None]:
    """Candidates to show, how many to prove, and the price of a chip; what is wrong with the flags of this command joins their offences."""
    args = flags.args
    flags.word("format", FORMATS)
    top, count = flags.whole("top", low=1, high=_MOST_SHOWN), flags.optional_whole("prove", low=1, high=_MOST_SHOWN)
    price = flags.optional_number("price_per_chip_hour", high=1e9, above=True)
    if args.prove is not None:
        from partinf.proof import unavailable

        reason = unavailable()
        flags.offences += [f"--prove: {reason}"] if reason else []
    for name in ("save", "html"):
        flags.target(name)
    if args.plot:
        from partinf.planner.show.plot import KINDS, plot_offences

        flags.word("plot_kind", KINDS)
        flags.offences += plot_offences(Path(args.plot))
        flags.target("plot")
    if args.layout and (is_auto(args.slice) or args.mesh == "auto"):
        flags.offences.append("--layout: a layout is priced on one slice and mesh, and auto tries many; name them")
    if args.layout and (twice := sorted({name for name in args.layout if args.layout.count(name) > 1})):
        flags.offences.append(f"--layout {' '.join(twice)}: given more than once; layouts are compared with others")
    if is_auto(args.slice) and args.mesh == "auto":
        flags.offences.append(f"--mesh auto: a mesh belongs to one slice, and --slice {args.slice} tries many")
    return top, count, price


def _save(report: PlanReport, wanted: PlanInput, path: Path, model: str) -> None:
    """Write the best candidate; what does not fit is not saved.

    Raises:
        InvalidInput: nothing fits.
    """
    from partinf.foundation.errors import InvalidInput
    from partinf.planner.files import plan_to_toml

    if not report.best.fits:
        raise InvalidInput(report.misfit)
    path.write_text(plan_to_toml(report.plan, wanted.workload, model=model))
