"""In the terminal: a report's candidates, the chosen roles and why, its memory, what its step spends time on; and steps line by line."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from partinf.cost.ledger import Entry, Ledger
from partinf.cost.split import StepSplit
from partinf.foundation.terminal import plain_table, wide_console
from partinf.foundation.units import column_figures, counted, figures, readable_bytes, readable_seconds, time_unit
from partinf.layout import PHASES, AttentionRole
from partinf.planner.report import PlanReport
from partinf.planner.results import Candidate, PhaseResult
from partinf.planner.show.commands import commands, num_hosts, served_memory, unservable
from partinf.planner.show.explain import explain
from partinf.planner.show.work import moved_bytes
from partinf.planner.trials import Trial, price_per_million_tokens

_BAR = 40
_WIDE = 110  # columns of a terminal that has room for every column of a table
_BRIEF = 16  # characters of a name of weights that leave a narrow terminal no room for roles in attention and bytes
_ENTRIES = 10


def show(report: PlanReport, top: int, saved: str | None = None) -> None:
    """Print the report.

    Args:
        top: candidates to list. saved: the file that the plan was written to, to be named.
    """
    console = wide_console()
    console.print(_heading(report), highlight=False)
    console.print(_candidates(report, top, console.width))
    best = report.best
    if best.fits:
        _show_choice(console, report, best)
    else:
        console.print(report.misfit, highlight=False)
        for change in report.changes:
            console.print(f"  {change}", highlight=False)
        _show_served(console, report, report.smallest)
        if heads := report.head_splits:
            console.print(f"{heads}.", highlight=False)
    if saved:
        console.print(f"Saved to {saved}.", highlight=False)


def show_trials(trials: Sequence[Trial], per_chip_hour: float | None) -> None:
    """Print the slices that were tried, and the price of the chosen one; nothing for one slice without a price."""
    console = wide_console()
    if len(trials) > 1:
        meshes = len({trial.report.slice.name for trial in trials}) == 1
        title = "Meshes, the fastest first" if meshes else "Slices, the cheapest first"
        table = plain_table("mesh" if meshes else "slice", ">chips", ">ms", ">chip-seconds", ">", title=title)
        for trial in trials:
            where, late = trial.report.slice, "" if trial.accepted else "late"
            table.add_row(
                where.mesh if meshes else where.name,
                str(where.num_chips),
                column_figures(1e3 * trial.seconds),
                column_figures(trial.chip_seconds),
                late,
            )
        console.print(table)
        console.print()
    if per_chip_hour is not None:
        price = price_per_million_tokens(trials[0], per_chip_hour)
        console.print(f"At {per_chip_hour:g} per chip-hour, a million tokens cost {figures(price)}.", highlight=False)


def _heading(report: PlanReport) -> str:
    workload, calibration = report.workload, report.calibration
    prompts = f" (prefill {workload.prompts_per_step})" if workload.prefill_batch else ""
    aim = f"one {workload.phase} step" if workload.phase else f"{workload.input_len} tokens in, {workload.output_len} out"
    prompt, cached = f", input {workload.input_len or workload.context_len}", f", context {workload.decode_context}"
    context = prompt if workload.phase == "prefill" else cached
    constants = "pure roofline" if calibration.name == "none" else f"constants of {calibration.name}"
    evidence = calibration.source if calibration.rates is not None else calibration.evidence
    error = "" if calibration.name == "none" else f", ±{calibration.error:.0%}: {evidence}"
    return (
        f"{report.model.name} on {report.slice.name} ({report.slice.mesh}): {aim}, batch {workload.batch}{prompts}{context}, "
        f"weights {workload.weights}, KV {workload.kv}\n{constants}{error}\nbandwidth model '{report.bandwidth_model}', program "
        f"'{report.program.name}', layers {report.layers}{report.routing}; {counted(len(report.candidates), 'role assignment')}"
    )


def _candidates(report: PlanReport, top: int, width: int) -> Table:
    """One row for each candidate. Where the terminal is narrow, columns that matter less are left out, so that no row breaks."""
    narrow, prefills = width < _WIDE, report.workload.phase is None
    unit, scale = time_unit(report.best.main.step_seconds)
    heads, shown = report.model.num_heads, report.candidates[:top]
    brief = narrow and any(len(stored(candidate)) > _BRIEF for candidate in shown)

    def cells(index: int, candidate: Candidate) -> Iterator[tuple[str, str]]:
        main, prefill = candidate.main, candidate.phase("prefill")
        yield "", str(index)
        yield "weights", stored(candidate)
        for result in candidate.phases:
            experts = _experts(candidate, result)
            roles = result.ffn if brief else f"{result.ffn} {result.attention}{experts}"
            yield (result.name, roles) if narrow else (f"{result.name}: FFN, attention", _roles(result) + experts)
        if not narrow:
            yield "heads", f"{heads}→{candidate.padded_heads}" if candidate.padded_heads else str(heads)
        if not brief:
            yield "GB" if narrow else "GB/device", f"{candidate.memory.total / 1e9:.1f}"
        if not narrow:
            yield "fits", "yes" if candidate.fits else "no"
        if prefills and prefill is not None:
            yield ">prefill s", column_figures(prefill.step_seconds)
        yield f">{unit}/step", column_figures(main.step_seconds / scale)
        if not narrow:
            yield ">MFU", f"{main.mfu:.1%}"
            yield ">chip·ms/token", column_figures(candidate.chip_ms_per_token)
        late = "does not fit" if narrow and not candidate.fits else "" if candidate.meets_bound else "late"
        yield ">", "tie" if candidate.tie_with_best and index > 1 else late

    rows = [list(cells(index, candidate)) for index, candidate in enumerate(shown, start=1)]
    table = plain_table(*(title for title, _ in rows[0]))
    for row in rows:
        table.add_row(*(cell for _, cell in row))
    return table


def stored(candidate: Candidate) -> str:
    """How the weights are stored, `E_x F_yz`, and over which axes there are copies or stages."""
    return candidate.name.rsplit(", ", len(PHASES))[0]


def _experts(candidate: Candidate, result: PhaseResult) -> str:
    """What the phase does about experts where it is not the plainest, `, exchanged`; the layout's name has it in full."""
    phase = candidate.name.rsplit(", ", len(PHASES))[1 + PHASES.index(result.name)]
    return "".join(f", {what.removeprefix('rows ')}" for what in phase.split("/")[2:])


def _roles(result: PhaseResult) -> str:
    by_role: dict[str, list[str]] = {}
    for axis, role in result.phase.attention:
        if role is not AttentionRole.NONE:
            by_role.setdefault(role.value, []).append(axis)
    attention = " ".join(f"{role}:{''.join(axes)}" for role, axes in sorted(by_role.items()))
    return f"{result.ffn}, {attention}" if attention else result.ffn


def _show_choice(console: Console, report: PlanReport, best: Candidate) -> None:
    plan = report.plan
    console.print(f"\n[bold]Chosen:[/bold] {best.name}", highlight=False)
    console.print(plan.note, highlight=False)
    if plan.runnable:
        console.print(f"This plan cannot be run yet: {plan.runnable}.", highlight=False)
    if report.workload.phase is None:
        _show_switch(console, report)
    if first := _first_token(report, best):
        console.print(first, highlight=False)
    console.print(_memory_bar(best), highlight=False)
    _show_served(console, report, best)
    if advice := report.batch_advice:
        console.print(f"Largest batch worth decoding: {advice}.", highlight=False)
        if advice.experts:
            console.print(str(advice.experts), highlight=False)
    if best.padded_heads:
        console.print(f"{report.head_splits}.", highlight=False)
    for result in best.phases:
        console.print(_ledger(result, console.width < _WIDE))


def _show_served(console: Console, report: PlanReport, candidate: Candidate) -> None:
    """The memory of a server, which need not hold all sequences at full length."""
    if (memory := served_memory(report, candidate)) is not None:
        console.print(f"A server has room for {memory}.", highlight=False)


def _show_switch(console: Console, report: PlanReport) -> None:
    rows = report.switch_table
    text = f"in steps of {report.plan.prefill_from_tokens:,} tokens or more" if rows else "at no number of tokens"
    console.print(f"The FFN switches to prefill's roles {text}.", highlight=False)
    if not rows:
        return
    names = {result.name: result.ffn for result in report.best.phases}
    headings = (">tokens", *(f">{label}: {ffn}" for label, ffn in names.items()), "runs")
    table = plain_table(*headings, title="Prompt steps by FFN roles, ms")
    for row in rows:
        times = (column_figures(1e3 * seconds) for seconds in (row.prefill_seconds, row.decode_seconds))
        table.add_row(f"{row.tokens:,}", *times, names[row.runs])
    console.print(table)


def show_commands(report: PlanReport, saved: str | None, model: str) -> None:
    """Print what serves the plan and what simulates that; nothing where nothing fits.

    Args:
        saved: the file that the plan was written to, if it was. model: by which name or path it was planned.
    """
    if not report.best.fits:
        return
    console = wide_console()
    plan, file = report.plan, saved or "plan.toml"
    first, found = "" if saved else f", once --save {file} has written it", commands(file, plan, report.workload, model)
    everywhere = f" on each of {num_hosts(plan)} hosts" if num_hosts(plan) > 1 else ""
    titles = {"serve": f"To serve it{everywhere}{first}:", "simulate": "To simulate that server under load:"}
    if reason := unservable(plan):
        titles["simulate"] = f"To simulate serving it{first} (it cannot be served: {reason}):"
    if plan.slice.num_devices > 1 and report.workload.phase is None and report.workload.prompts_per_step > 1:
        console.print("A server prefills requests one by one: --prefill-batch 1 chooses the layout for that.", highlight=False)
    for name, words in found.items():
        for line in (titles[name], f"  {shlex.join(words)}"):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _first_token(report: PlanReport, best: Candidate) -> str:
    """Time to the first token of one prompt, and of the prefill of a whole batch; empty where nothing is prefilled."""
    alone, prefill = report.first_token_seconds(best), best.phase("prefill")
    if alone is None or prefill is None:
        return ""
    text = f"The first token of a single prompt takes {readable_seconds(alone)}"
    together = report.workload.prompts_per_step
    return text + (f"; prefilling {together} prompts together takes {readable_seconds(prefill.step_seconds)}." if together > 1 else ".")


def _memory_bar(best: Candidate) -> str:
    memory = best.memory
    parts = (("weights", memory.weights, "█"), ("KV", memory.kv, "▓"), ("activations", memory.activations, "▒"))
    bar = "".join(mark * round(_BAR * size / memory.usable) for _, size, mark in parts)
    words = ", ".join(f"{mark} {name} {size / 1e9:.2f}" for name, size, mark in parts)
    return f"Memory |{bar:<{_BAR}}| {words} of {memory.usable / 1e9:.1f} GB per device"


def _ledger(result: PhaseResult, narrow: bool) -> Table:
    """The most expensive entries, all occurrences together: the payload of a collective, HBM traffic of the rest. Without numbers and bytes
    where the terminal is narrow."""
    title = f"{result.name} step, {readable_seconds(result.step_seconds)}"
    unit, scale = time_unit(result.step_seconds)
    sizes = () if narrow else (">count", ">!bytes")
    table = plain_table("entry", "part", "collective", *sizes, f">{unit}", ">", title=title)
    for entry in result.ledger.dearest()[:_ENTRIES]:
        op = f"{entry.op}({''.join(entry.axes)})" if entry.op else ""
        seconds = entry.exposed_seconds
        share, moved = seconds / result.step_seconds, moved_bytes(entry) * entry.count
        amounts = () if narrow else (str(entry.count), readable_bytes(moved))
        cells = (*amounts, f"{seconds / scale:,.3f}", "<1%" if share < 0.005 else f"{share:.0%}")
        table.add_row(entry.name, entry.part.value, op, *cells)
    return table


def print_step(console: Console, label: str, split: StepSplit, ledger: Ledger) -> None:
    """Print the lines of one step, section by section, numbered through; only shapes and times where the terminal is narrow."""
    number, narrow = 0, console.width < _WIDE
    step = f"step of each of {split.ways(split.stages)} pipeline stages" if split.stages else "step"
    columns = "times" if narrow else "times and bytes"
    title = f"[bold]{label} {step}[/bold], {readable_seconds(ledger.seconds)}; {columns} per occurrence, on one device"
    console.print(f"\n{title}", highlight=False)
    for section in explain(split, ledger):
        sizes = () if narrow else ("per device", ">!bytes")
        table = plain_table(">", "", "result", *sizes, ">!µs", show_header=number == 0)
        for line in section.lines:
            number += 1
            amounts = () if narrow else (line.local, readable_bytes(moved_bytes(line.entry)))
            table.add_row(str(number), line.what, line.shape, *amounts, _occurrence(line.entry, narrow))
        start = f", from {section.start}" if section.start else ""
        times = f" (×{split.model.num_layers})" if section.per_layer else ""
        console.print(f"\n{section.title}{start}{times}", highlight=False, markup=False)
        console.print(table, markup=False)


def _occurrence(entry: Entry, narrow: bool) -> str:
    hidden = f" ({entry.overlapped * 1e6:.1f} hidden)" if entry.overlapped and not narrow else ""
    return f"{(entry.seconds - entry.overlapped) * 1e6:.1f}{hidden}"
