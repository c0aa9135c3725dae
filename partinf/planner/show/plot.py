"""Pictures of a report: its ledgers as stacked bars, the front of latency against cost, and communication against tokens.

matplotlib is an extra (`plot`) and is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from partinf.foundation.extras import PLOT, missing
from partinf.planner.curves import TOKENS, front, volumes
from partinf.planner.report import PlanReport
from partinf.planner.results import Candidate
from partinf.planner.show.work import COLOURS, by_work, roles_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("ledger", "front", "volume")
SUFFIXES = (".png", ".svg", ".pdf")
_BAR_INCHES = 0.42


def plot_offences(path: Path) -> list[str]:
    """What keeps a picture from being drawn into this file: no matplotlib, or no kind of file that it writes."""
    reason = missing(PLOT, "--plot")
    offences = [reason] if reason else []
    if path.suffix not in SUFFIXES:
        offences.append(f"plot {path}: the name must end in one of {', '.join(SUFFIXES)}")
    return offences


def draw(report: PlanReport, path: Path, top: int, kind: str = "ledger") -> None:
    """Write a picture of one of `KINDS`.

    Args:
        top: candidates in a picture of ledgers.
    """
    {"ledger": _ledgers, "front": _front, "volume": _volumes}[kind](report, path, top)


def _front(report: PlanReport, path: Path, top: int) -> None:
    """Chip-milliseconds per token against the latency of a step; points on the front say batch and slice."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    points = front(report)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    panel.scatter([1e3 * p.seconds for p in points], [p.chip_ms_per_token for p in points], s=8, color="#9a9a9a")
    best = [p for p in points if p.on_front]
    panel.plot([1e3 * p.seconds for p in best], [p.chip_ms_per_token for p in best], ".-", color="#3b6ea5")
    for point in best:
        label = f"batch {point.batch} on {point.slice.split(':')[1]}, {point.ffn}"
        where = 1e3 * point.seconds, point.chip_ms_per_token
        panel.annotate(label, where, (4, 2), textcoords="offset points", fontsize=6)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(right=2e3 * max(p.seconds for p in points))  # room for the last label
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
    panel.tick_params(which="both", labelsize=7)
    panel.set_xlabel(f"milliseconds per {report.workload.phase or 'decode'} step (predicted)", fontsize=8)
    panel.set_ylabel("chip-milliseconds per token", fontsize=8)
    panel.grid(True, which="both", alpha=0.15)
    figure.suptitle(f"{report.model.name} on {report.slice.chip.name}: latency against cost", fontsize=10)
    figure.savefig(path, dpi=110)


def _volumes(report: PlanReport, path: Path, top: int) -> None:
    """Bytes through one device and layer against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    panel = figure.subplots()
    for name, values in volumes(report).items():
        panel.plot(TOKENS, [value / 1e6 for value in values], marker=".", label=name)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("tokens in a step", fontsize=8)
    panel.set_ylabel("MB through one device, per layer", fontsize=8)
    panel.grid(True, which="both", alpha=0.15)
    panel.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{report.model.name} on {report.slice.name}, {report.best.name.split(', ')[0]}: communication", fontsize=10)
    figure.savefig(path, dpi=110)


def _ledgers(report: PlanReport, path: Path, top: int) -> None:
    """The `top` candidates, one panel per phase, the best on top."""
    from matplotlib.figure import Figure

    candidates = report.candidates[:top]
    labels = [result.name for result in report.best.phases]
    figure = Figure(figsize=(1.2 + 5.6 * len(labels), 1.6 + _BAR_INCHES * len(candidates)), layout="constrained")
    panels = figure.subplots(1, len(labels), squeeze=False)[0]
    for panel, label in zip(panels, labels, strict=True):
        _panel(panel, candidates, label)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    workload = report.workload
    figure.suptitle(f"{report.model.name} on {report.slice.name}, batch {workload.batch}, weights {workload.weights}", fontsize=10)
    figure.savefig(path, dpi=110)


def _panel(panel: Axes, candidates: Sequence[Candidate], label: str) -> None:
    steps = [result for candidate in candidates if (result := candidate.phase(label)) is not None]
    parts = [by_work(step.ledger) for step in steps]
    unit, scale = ("s", 1.0) if max(step.step_seconds for step in steps) >= 1 else ("ms", 1e3)
    left = [0.0] * len(steps)
    for name, colour in COLOURS.items():
        widths = [scale * part[name] for part in parts]
        panel.barh(range(len(steps)), widths, left=left, color=colour, label=name, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, (candidate, end) in enumerate(zip(candidates, left, strict=True)):
        note = "" if candidate.fits else ", does not fit"
        panel.text(end, row, f" {end:.4g}{note}", va="center", fontsize=8)
    names = [f"{c.name.split(', ')[0]}\n{roles_of(step)}" for c, step in zip(candidates, steps, strict=True)]
    panel.set_yticks(range(len(steps)), names, fontsize=7)
    panel.tick_params(axis="x", labelsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.25 * max(left))
    panel.set_xlabel(f"{unit} per {label} step (predicted)", fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
