"""What was measured on TPU v4: the eight columns of Pope et al. (2023), tables 2 and 3 (`experiments/published`), and other figures of
their text as checks.

Slice shapes are assumed (the paper names chip counts); 540B runs with 48 heads padded to 64, as the paper says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from experiments.published.sets import sets
from partinf.cost.calibration import Calibration
from partinf.cost.ledger import Ledger
from partinf.cost.pricing import Pricing
from partinf.cost.program import LOOPED
from partinf.cost.split import Shares, StepShape, StepSplit
from partinf.cost.step import step_ledger
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.config import Block
from partinf.model.load import load_model_config
from partinf.workload import DType

CONTEXT = 2048
DECODED = 64  # tokens, in the times of decode


@dataclass(frozen=True)
class Column:
    """One measured configuration; `seconds` is one step (a prefill of the whole batch, or one decode step)."""

    name: str
    model: str
    slice: str
    phase: str
    batch: int
    gather: str
    attention: str
    weights: DType
    seconds: float
    mfu: float
    context: int = CONTEXT
    serial: bool = False


def _columns() -> Iterator[Column]:
    for one in sets():
        for row in one["rows"] if one["kind"] == "paper" else ():
            yield Column(row["column"], *(row[key] for key in _KEYS), DType(row["weights"]), row["seconds"], row["mfu"])


_KEYS = ("model", "slice", "phase", "batch", "gather", "attention")
COLUMNS = tuple(_columns())
# The paper's text: 28.5 ms per token with int8 weights and 36.9 ms with bf16, batch 64.
INT8_STEP, BF16_STEP = 28.5e-3, 36.9e-3


def paper_layout(column: Column, prefill_attention: str) -> Layout:
    """The layout that was run, `E_x F_yz`."""
    decode, prefill = (dict.fromkeys("xyz", role) for role in (column.attention, prefill_attention))
    return make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, decode, prefill, column.gather, column.gather)


def predict(column: Column, constants: Calibration) -> Ledger:
    """The ledger of a column under these constants, for the paper's layout of it."""
    model = load_model_config(column.model)
    shares = Shares()
    if model.num_heads == 48:
        shares, model = Shares(heads=48 / 64), model.with_padded_heads(64)
    if column.serial:
        model = replace(model, block=Block.SERIAL)
    slice_ = parse_slice(column.slice)
    layout = paper_layout(column, column.attention)
    if column.phase == "prefill":
        shape = StepShape(prefill_tokens=column.batch * column.context, prefill_slots=column.batch)
    else:
        shape = StepShape(decode_rows=column.batch, decode_context=column.context)
    pricing = Pricing(slice_, constants, program=LOOPED)
    return step_ledger(StepSplit(model, layout, layout.phase(column.phase), shape, pricing, column.weights, DType.BF16, shares))


def mfu(column: Column, seconds: float) -> float:
    """2·N·tokens over peak, with the paper's N."""
    params = 540e9 if "540" in column.model else 62e9
    tokens = column.batch * (column.context if column.phase == "prefill" else 1)
    return 2 * params * tokens / (parse_slice(column.slice).num_chips * 275e12 * seconds)
