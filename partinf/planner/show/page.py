"""One self-contained HTML page for a report: the chosen layout and why, its figures and memory, the best candidates as bars, its steps
line by line.

No script, no font and no picture is loaded; the page can be mailed or kept next to the layout file. Wide tables scroll by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from partinf.foundation.units import counted, figures, readable_bytes, readable_seconds
from partinf.planner.report import PlanReport
from partinf.planner.results import Candidate, PhaseResult
from partinf.planner.show.explain import Line, explain
from partinf.planner.show.work import COLOURS, by_work, moved_bytes, roles_of

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; } p.question { color: #666; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th { font-weight: 600; color: #666; border-bottom: 1px solid #bbb; }
td, th { padding: .2rem 1rem .2rem 0; text-align: left; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.head td { font-weight: 600; padding-top: .9rem; border-bottom: 1px solid #ddd; }
tr.best td { background: #eef4fa; }
sub { font-size: .75em; line-height: 0; }
.bar { display: flex; height: 12px; background: #f1f1f1; margin-top: .3rem; min-width: 9rem; }
.wide { width: 100%; max-width: 30rem; }
.key span { display: inline-block; margin-right: 1.2rem; }
.key i { display: inline-block; width: 10px; height: 10px; margin-right: .35rem; }
"""
_MEMORY = {"weights": "#3b6ea5", "KV": "#e0a030", "activations": "#9a9a9a"}


def page(report: PlanReport, top: int) -> str:
    """The page for a report, with its `top` candidates."""
    best = report.best
    title = f"{report.model.name} on {report.slice.name}"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="question">{escape(_question(report))}</p>', *_verdict(report)]
    parts += ["<h2>Memory of a device</h2>", _memory(best), f"<h2>The best of {counted(len(report.candidates), 'role assignment')}</h2>"]
    parts += [_candidates(report, top), _key(COLOURS)]
    for result in best.phases:
        parts += [f"<h2>One {escape(result.name)} step, line by line: {readable_seconds(result.step_seconds)}</h2>", _lines(report, result)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en">{head}<style>{_STYLE}</style>\n' + "\n".join(parts) + "\n</html>\n"


def _question(report: PlanReport) -> str:
    workload, calibration = report.workload, report.calibration
    aim = f"one {workload.phase} step" if workload.phase else f"{workload.input_len} tokens in, {workload.output_len} out"
    return (
        f"{aim}, batch {workload.batch}, context {workload.decode_context}, weights {workload.weights}, KV {workload.kv}, "
        f"for {workload.objective}; mesh {report.slice.mesh}; constants '{calibration.name}' (±{calibration.error:.0%}), bandwidth model "
        f"'{report.bandwidth_model}', program '{report.program.name}', layers {report.layers}{report.routing}."
    )


def _verdict(report: PlanReport) -> list[str]:
    """The choice, why, and its figures; or why nothing fits, and what to change."""
    best = report.best
    if not best.fits:
        changes = "".join(f"<li>{escape(str(change))}</li>" for change in report.changes)
        heads = f"<p>{escape(report.head_splits)}.</p>" if report.head_splits else ""
        return ["<h2>Nothing fits</h2>", f"<p>{escape(report.misfit)}</p>", f"<ul>{changes}</ul>", heads]
    rows = []
    for result in best.phases:
        rate = f"{result.tokens / result.step_seconds:,.0f}"
        cost = figures(1e3 * best.num_chips * result.step_seconds / result.tokens)
        rows.append((result.name, roles_of(result), readable_seconds(result.step_seconds), f"{result.mfu:.1%}", rate, cost))
    titles = ("step", "FFN, attention", "takes", "MFU", "tokens per second", "chip·ms per token")
    verdict = [f"<h2>{_notation(best.name)}</h2>", f"<p>{escape(report.plan.note)}</p>", _table(titles, rows, numbers=(2, 3, 4, 5))]
    if advice := report.batch_advice:
        verdict.append(f"<p>Largest batch worth decoding: {escape(str(advice))}.</p>")
        verdict += [f"<p>{escape(str(advice.experts))}</p>"] if advice.experts else []
    return verdict


def _memory(best: Candidate) -> str:
    memory = best.memory
    parts = {"weights": memory.weights / 1e9, "KV": memory.kv / 1e9, "activations": memory.activations / 1e9}
    words = ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
    bar = _bar(parts, _MEMORY, max(memory.usable, memory.total) / 1e9)
    return f'<div class="wide">{bar}</div><p>{words} of {memory.usable / 1e9:.1f} GB</p>{_key(_MEMORY)}'


def _candidates(report: PlanReport, top: int) -> str:
    """One row for each candidate, with the roles, the time and a bar of each of its phases."""
    shown, labels = report.candidates[:top], [result.name for result in report.best.phases]
    longest = {result.name: result.step_seconds for candidate in shown for result in candidate.phases}
    for candidate in shown:
        for result in candidate.phases:
            longest[result.name] = max(longest[result.name], result.step_seconds)
    titles, numbers, raw = ["", "weights"], [0], [1]
    for label in labels:
        raw += [len(titles) + 2]
        numbers += [len(titles) + 1]
        titles += [label, "", ""]
    rows = []
    for place, candidate in enumerate(shown, start=1):
        row = [str(place), _notation(candidate.name.rsplit(", ", 2)[0])]
        for result in candidate.phases:
            row += [roles_of(result), readable_seconds(result.step_seconds), _bar(by_work(result.ledger), COLOURS, longest[result.name])]
        rows.append([*row, _note(candidate) or ("tie" if candidate.tie_with_best and place > 1 else "")])
    return _table([*titles, ""], rows, numbers, raw, marked=0)


def _note(candidate: Candidate) -> str:
    return "does not fit" if not candidate.fits else "" if candidate.meets_bound else "late"


def _lines(report: PlanReport, result: PhaseResult) -> str:
    """Every entry of the ledger once, numbered, under the part of the step that it belongs to."""
    best = report.best
    split = report.evaluator.split(best.layout, result.name, best.padded_heads)
    rows: list[Sequence[str]] = []
    number = 0
    for section in explain(split, result.ledger):
        times = f" (×{split.model.num_layers})" if section.per_layer else ""
        start = f", from {_notation(section.start)}" if section.start else ""
        total = sum(line.entry.exposed_seconds for line in section.lines)
        rows.append((f"{escape(section.title)}{times}{start}: {readable_seconds(total)} in all",))
        for line in section.lines:
            number += 1
            rows.append(
                (
                    str(number),
                    _notation(line.what),
                    _notation(line.shape),
                    line.local,
                    readable_bytes(moved_bytes(line.entry)),
                    _time(line),
                )
            )
    return _table(("", "", "result", "per device", "bytes", "time"), rows, numbers=(0, 4, 5), raw=(1, 2))


def _time(line: Line) -> str:
    entry = line.entry
    hidden = f" ({readable_seconds(entry.overlapped)} hidden)" if entry.overlapped else ""
    return readable_seconds(entry.seconds - entry.overlapped) + hidden


def _notation(text: str) -> str:
    """`B_x L E_yz` with its axes as subscripts."""
    return re.sub(r"\b([A-Z])_([A-Za-z0-9]+)", r"\1<sub>\2</sub>", escape(text))


def _bar(parts: Mapping[str, float], colours: Mapping[str, str], whole: float) -> str:
    pieces = "".join(
        f'<i style="width:{100 * value / whole:.2f}%;background:{colours[name]}" title="{escape(name)}"></i>'
        for name, value in parts.items()
    )
    return f'<div class="bar">{pieces}</div>'


def _key(colours: Mapping[str, str]) -> str:
    return '<p class="key">' + "".join(f'<span><i style="background:{c}"></i>{escape(name)}</span>' for name, c in colours.items()) + "</p>"


def _table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), raw: Sequence[int] = (), marked: int | None = None
) -> str:
    """A row of one cell, which is HTML, is a heading over those that follow.

    Args:
        numbers: columns to align right. raw: those that are HTML already. marked: the row that is set off.
    """

    def cells(tag: str, values: Sequence[str]) -> str:
        shown = (value if tag == "td" and i in raw else escape(value) for i, value in enumerate(values))
        return "".join(f'<{tag} class="n">{v}</{tag}>' if i in numbers else f"<{tag}>{v}</{tag}>" for i, v in enumerate(shown))

    def row(index: int, values: Sequence[str]) -> str:
        if len(values) == 1:
            return f'<tr class="head"><td colspan="{len(titles)}">{values[0]}</td></tr>'
        return f"<tr{' class=best' if index == marked else ''}>{cells('td', values)}</tr>"

    body = "\n".join(row(index, values) for index, values in enumerate(rows))
    return f'<div class="scroll"><table><tr>{cells("th", titles)}</tr>\n{body}</table></div>'
