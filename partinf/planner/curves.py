"""Two curves around a report, for pictures: latency against cost over batches and slices, and communication against tokens.

They are figures 1 and 3 of "Efficiently Scaling Transformer Inference" (Pope et al., 2023) for the model, chip and workload of a report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from partinf.cost.ledger import Entry, Op
from partinf.cost.split import StepShape
from partinf.cost.step import attention_part, linear_part
from partinf.foundation.errors import InvalidInput
from partinf.foundation.rounding import round_up
from partinf.layout import Layout, Role, ffn_name
from partinf.layout.files import make_layout
from partinf.planner.evaluate import Evaluator
from partinf.planner.report import PlanReport, answer
from partinf.planner.slices import slices_of

BATCHES = (1, 4, 16, 64, 256, 1024)
TOKENS = tuple(1 << power for power in range(8, 23, 2))
_TIMES_LARGER = 4


@dataclass(frozen=True)
class Point:
    """The fastest layout that fits one batch on one slice, and whether no other point beats it in both latency and cost."""

    slice: str
    batch: int
    ffn: str
    seconds: float
    chip_ms_per_token: float
    on_front: bool = False


def front(report: PlanReport) -> list[Point]:
    """Steps of the report's phase (decode for a whole workload) for batches × slices of up to four times its chips, fastest first."""
    phase = report.workload.phase or "decode"
    points = []
    for slice_ in slices_of(report.slice.chip, _TIMES_LARGER * report.slice.num_chips):
        for batch in BATCHES:
            context = None if phase == "prefill" else report.workload.decode_context
            workload = replace(
                report.workload, batch=batch, phase=phase, context_len=context, prefill_batch=None, max_latency=None, arrival_rate=None
            )
            try:
                found = answer(replace(report.question, workload=workload), slice_)
            except InvalidInput:  # its axes do not divide the model
                break
            best = found.best
            if best.fits:
                points.append(Point(slice_.name, batch, best.main.ffn, best.main.step_seconds, best.chip_ms_per_token))
    return mark_front(points)


def mark_front(points: Iterable[Point]) -> list[Point]:
    """The points by latency, those on the front marked."""
    cheapest, found = math.inf, []
    for point in sorted(points, key=lambda p: (p.seconds, p.chip_ms_per_token)):
        found.append(replace(point, on_front=point.chip_ms_per_token < cheapest))
        cheapest = min(cheapest, point.chip_ms_per_token)
    return found


def volumes(report: PlanReport) -> dict[str, list[float]]:
    """Bytes that pass through one device in one layer, by the number of tokens in `TOKENS`, for the best candidate's storage.

    Axes are gathered one by one, those of d_model first, with attention over the batch: the paper's 2D, X, XY and XYZ.
    """
    slice_, best = report.slice, report.best
    sizes = slice_.axis_sizes
    stored = {axis: role.value for axis, role in best.layout.storage}
    order = [a for role in (Role.EMBED, Role.FFN) for a in best.layout.storage_axes(role) if sizes[a] > 1]
    batch = dict.fromkeys(stored, "batch")
    prompt = report.workload.input_len or report.workload.decode_context or 1
    found = {}
    for count in range(len(order) + 1):
        layout = make_layout(stored, batch, batch, order[:count], order[:count])
        name = ffn_name(layout, layout.prefill, sizes) + (f" ({''.join(order[:count])})" if count else "")
        found[name] = [_moved(report.evaluator, layout, tokens, prompt, best.padded_heads, sizes) for tokens in TOKENS]
    return found


def _moved(evaluator: Evaluator, layout: Layout, tokens: int, prompt: int, padded: int, sizes: dict[str, int]) -> float:
    devices = math.prod(sizes.values())
    slots = round_up(max(tokens // prompt, 1), devices)
    shape = StepShape(prefill_tokens=max(tokens, devices), prefill_slots=slots)
    split = evaluator.split(layout, "prefill", padded, shape)
    entries = [entry for entry in linear_part(split) + attention_part(split) if entry.count == split.model.num_layers]
    return sum(_through(entry, sizes) for entry in entries)


def _through(entry: Entry, sizes: dict[str, int]) -> float:
    """(K-1)/K of the output of a gather or the input of the others, twice that of an all-reduce."""
    if entry.op is None:
        return 0.0
    ways = math.prod(sizes[axis] for axis in entry.axes)
    return entry.bytes * (ways - 1) / ways * (2 if entry.op is Op.ALL_REDUCE else 1)
