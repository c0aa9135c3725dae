"""One self-contained HTML page for a report: the chosen layout and why, its memory, the best candidates as bars, its steps line by line.

No script, no font and no picture is loaded; the page can be mailed or kept beside the layout file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from partinf.planner.choose import misfit, plan_of
from partinf.planner.evaluate import Evaluator
from partinf.planner.explain import explain
from partinf.planner.report import Candidate, PhaseResult, PlanReport
from partinf.planner.work import COLOURS, by_work, roles_of

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 1.5rem; }
td, th { padding: .15rem .7rem .15rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: flex; width: 26rem; height: 14px; background: #f1f1f1; }
.key { display: inline-block; width: 10px; height: 10px; margin: 0 .3rem 0 1rem; }
"""
_MEMORY = {"weights": "#3b6ea5", "KV": "#e0a030", "activations": "#9a9a9a"}


def page(report: PlanReport, top: int) -> str:
    """The page for a report, with its `top` candidates."""
    best = report.best
    title = f"{report.model.name} on {report.slice.name}"
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(_asked(report))}</p>"]
    if best.fits:
        parts += [f"<h2>{escape(best.name)}</h2>", f"<p>{escape(plan_of(report, best).note)}</p>"]
    else:
        parts += ["<h2>Nothing fits</h2>", f"<p>{escape(misfit(report))}</p>"]
    parts += ["<h2>Memory of a device</h2>", _memory(best)]
    for result in best.phases:
        parts += [f"<h2>{escape(result.name)}: the best candidates</h2>", _candidates(report.candidates[:top], result.name)]
    for result in best.phases:
        parts += [f"<h2>{escape(result.name)} step, line by line</h2>", _lines(report, result)]
    return f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>\n' + "\n".join(
        parts
    )


def _asked(report: PlanReport) -> str:
    workload, calibration = report.workload, report.calibration
    aim = f"one {workload.phase} step" if workload.phase else f"{workload.input_len} tokens in, {workload.output_len} out"
    return (
        f"{aim}, batch {workload.batch}, context {workload.decode_context}, weights {workload.weights}, KV {workload.kv}; mesh "
        f"{report.slice.mesh}; constants '{calibration.name}' (±{calibration.error:.0%}), bandwidth model '{report.bandwidth_model}', "
        f"program '{report.program.name}'; {len(report.candidates)} role assignments."
    )


def _bar(parts: dict[str, float], colours: dict[str, str], whole: float) -> str:
    pieces = "".join(
        f'<i style="width:{100 * value / whole:.2f}%;background:{colours[name]}" title="{escape(name)}"></i>'
        for name, value in parts.items()
    )
    return f'<div class="bar">{pieces}</div>'


def _key(colours: dict[str, str]) -> str:
    return "<p>" + "".join(f'<i class="key" style="background:{colour}"></i>{escape(name)}' for name, colour in colours.items()) + "</p>"


def _memory(best: Candidate) -> str:
    memory = best.memory
    parts = {"weights": memory.weights / 1e9, "KV": memory.kv / 1e9, "activations": memory.activations / 1e9}
    words = ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
    whole = max(memory.usable, memory.total) / 1e9
    return _bar(parts, _MEMORY, whole) + f"<p>{words} of {memory.usable / 1e9:.1f} GB</p>" + _key(_MEMORY)


def _candidates(candidates: Sequence[Candidate], label: str) -> str:
    results = [(candidate, result) for candidate in candidates if (result := candidate.phase(label)) is not None]
    longest = max(result.step_seconds for _, result in results)
    rows = []
    for candidate, result in results:
        bar = _bar(by_work(result.ledger), COLOURS, longest)
        fits = "" if candidate.fits else "does not fit"
        tie = "tie" if candidate.tie_with_best and candidate is not candidates[0] else ""
        stored = candidate.name.split(", ")[0]
        rows.append((stored, roles_of(result), f"{1e3 * result.step_seconds:.4g}", f"{result.mfu:.1%}", bar, fits or tie))
    return _table(("weights", "FFN, attention", "ms", "MFU", "", ""), rows, numbers=(2, 3), raw=(4,)) + _key(COLOURS)


def _lines(report: PlanReport, result: PhaseResult) -> str:
    best = report.best
    split = Evaluator(report.model, report.pricing, report.workload).split(best.layout, result.name, best.padded_heads)
    rows = []
    for section in explain(split, result.ledger):
        times = f" (×{split.model.num_layers})" if section.per_layer else ""
        rows.append((f"{section.title}{times}", "", section.start, "", ""))
        for line in section.lines:
            entry = line.entry
            what = f"{entry.op}({''.join(entry.axes)}) {entry.name}" if entry.op else entry.name
            size = entry.bytes or entry.weight_bytes + entry.kv_bytes + entry.activation_bytes
            rows.append(("", what, line.shape, f"{size / 1e6:.3g}", f"{1e6 * (entry.seconds - entry.overlapped):.1f}"))
    return _table(("", "", "then", "MB", "µs"), rows, numbers=(3, 4))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), raw: Sequence[int] = ()) -> str:
    """`numbers` are columns to align right, `raw` those that are HTML already."""

    def cells(tag: str, values: Sequence[str]) -> str:
        shown = (value if tag == "td" and i in raw else escape(value) for i, value in enumerate(values))
        return "".join(f'<{tag} class="n">{v}</{tag}>' if i in numbers else f"<{tag}>{v}</{tag}>" for i, v in enumerate(shown))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', titles)}</tr>\n{body}</table>"
