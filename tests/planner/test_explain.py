"""The lines of `explain`: every entry of the ledger once, and local sizes that are those of the payloads."""

from __future__ import annotations

import math

import pytest

from partinf.cost.ledger import Op
from partinf.cost.program import LOOPED, PLAIN
from partinf.cost.split import StepShape
from partinf.cost.step import step_ledger
from partinf.model.config import ModelConfig
from partinf.planner.show.explain import explain
from tests.planner.support import layout_of, split_of

MODEL = ModelConfig("small", 3, 1024, 4096, 16, 4, 64, 4096)
LAYOUTS = {
    "ws-2d over batch": layout_of({"x": "embed", "y": "ffn", "z": "ffn"}, "batch"),
    "ws-2d, heads and batch": layout_of({"x": "embed", "y": "ffn", "z": "ffn"}, {"x": "batch", "y": "heads", "z": "none"}),
    "wg-xy": layout_of({"x": "embed", "y": "ffn", "z": "ffn"}, "batch", "xy"),
    "copies": layout_of({"x": "replica", "y": "ffn", "z": "embed"}, "heads"),
}
DECODE, PREFILL = StepShape(decode_rows=16, decode_context=64), StepShape(prefill_tokens=512, prefill_slots=8)


@pytest.mark.parametrize("program", [PLAIN, LOOPED], ids=lambda program: program.name)
@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_entry_once_with_its_size(name: str, shape: StepShape, program: object) -> None:
    split = split_of(MODEL, "cpu:2x2x2", LAYOUTS[name], shape, program)  # type: ignore[arg-type]
    ledger = step_ledger(split)
    lines = [line for section in explain(split, ledger) for line in section.lines]
    assert sorted(line.entry for line in lines) == sorted(ledger.entries)
    for line in lines:
        if line.entry.op is Op.ALL_GATHER and line.local:
            # Keys and values, gate and up are one payload but written as one tensor of the pair.
            pairs = 2 if line.entry.item.tensor in ("K", "wkv", "w_in") else 1
            elements = math.prod(int(size) for size in line.local.split("×"))
            assert line.entry.bytes == pairs * elements * split.act_bytes, line
