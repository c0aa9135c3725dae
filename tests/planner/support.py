"""Small builders that the planner's tests share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from partinf.cost.ledger import Entry, Op
from partinf.cost.pricing import Pricing
from partinf.cost.program import LOOPED, Program
from partinf.cost.split import Shares, StepShape, StepSplit
from partinf.hardware.slices import Slice, parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.workload import DType


def layout_of(storage: Mapping[str, str], attention: str | Mapping[str, str], gather: Iterable[str] = ()) -> Layout:
    """A layout whose two phases are alike."""
    roles = dict.fromkeys(storage, attention) if isinstance(attention, str) else attention
    return make_layout(storage, roles, roles, tuple(gather), tuple(gather))


def split_of(
    model: ModelConfig,
    slice_: Slice | str,
    layout: Layout,
    shape: StepShape,
    program: Program = LOOPED,
    weights: DType = DType.BF16,
    kv: DType = DType.BF16,
) -> StepSplit:
    """The roles of a layout's decode phase worked out for a step, priced as a pure roofline."""
    where = parse_slice(slice_) if isinstance(slice_, str) else slice_
    return StepSplit(model, layout, layout.decode, shape, Pricing(where, program=program), weights, kv, Shares())


def moved_elements(entries: Iterable[Entry], sizes: Mapping[str, int], itemsize: int = 2) -> float:
    """Elements that pass through one device: payload · (K-1)/K of gathers and scatters, per occurrence."""
    total = 0.0
    for entry in entries:
        if entry.op in (Op.ALL_GATHER, Op.REDUCE_SCATTER):
            parts = 1
            for axis in entry.axes:
                parts *= sizes[axis]
            total += entry.bytes / itemsize * (parts - 1) / parts
    return total
