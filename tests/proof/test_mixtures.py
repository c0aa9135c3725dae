"""Mixtures of experts by the TPU compiler: their matrices and the cache stay where they lie, and an exchange sends what is planned."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from partinf.buckets import serving_steps
from partinf.cost import items
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.kinds import Activation, Experts, FeedForward, Router
from partinf.model.load import load_model_config
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.proof import prove
from partinf.proof.proving import planned_ledger
from partinf.workload import Workload
from tests.proof.test_slices import MODEL, needs_compiler


@needs_compiler
@pytest.mark.slow
def test_what_fills_no_whole_tiles_is_not_copied() -> None:
    """Two layers of gpt-oss 120b: 128 experts of 2880 by 360 on a device, which the compiler would lay out with the experts innermost, and
    heads of 64, of which it would lay out the pages innermost."""
    model, workload = replace(load_model_config("gpt-oss-120b"), num_layers=2), Workload(batch=64, context_len=4096, phase="decode")
    layout = make_layout({"x": "replica", "y": "ffn"}, {"x": "batch", "y": "heads"}, experts={"x": "ffn", "y": "ffn"})
    plan, buckets = serving_steps(Plan(model, parse_slice("v6e:2x4"), layout), workload)
    (step,) = prove(plan, buckets).steps
    assert {"kernel experts_in", "kernel experts_out", "kernel paged_decode", "kernel paged_write"} <= {
        part.partition(":")[0].strip() for part in step.estimate.note.split(";")
    }
    assert not {one.kind for one in step.differences} & {"extra copy", "padding"}
    assert step.estimate.seconds < 1.25 * step.planned_seconds


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("slice_name", ["v5e:2x2", "v6e:2x2"])
def test_an_exchange_of_rows_is_compiled_as_it_is_planned(slice_name: str) -> None:
    """Choices, and places for rows there and back, over both axes: by kind, axes and bytes what the ledger has. What comes back is at most
    what was sent, and is read so; the ledger has the buffer that it leaves, which holds all that may have arrived."""
    experts = Experts(16, 2, FeedForward(256, True, Activation.SILU, ()), Router())
    model = replace(MODEL, ffn_dim=0, experts=experts)
    layout = make_layout(
        {"x": "replica", "y": "replica"},
        {"x": "batch", "y": "batch"},
        experts={"x": "expert", "y": "expert"},
        decode_dispatch="exchange",
    )
    plan, bucket = Plan(model, parse_slice(slice_name), layout, cache=CacheConfig(16, 32, 64)), Bucket(64, 4)
    entries = {entry.item: entry for entry in planned_ledger(plan, bucket).entries}
    chosen, there, back = (entries[item] for item in (items.CHOSEN_EXPERTS, items.ROWS_SENT, items.OUTPUTS_SENT))
    planned: Counter[object] = Counter()
    for entry in (chosen, there, back._replace(bytes=min(back.bytes, there.bytes))):
        planned[str(entry.op), entry.axes, entry.bytes] += entry.count
    compiled: Counter[object] = Counter()
    for one in prove(plan, [bucket]).steps[0].collectives:
        if "dispatch.py" in one.source_op or "ragged" in one.source_op:
            compiled[one.op, one.axes, one.bytes] += one.count
    assert compiled == planned
    assert sum(planned.values()) == 3 * model.num_layers


@needs_compiler
@pytest.mark.slow
def test_rows_that_come_back_from_experts_are_not_turned() -> None:
    """Prompts of Qwen 3 30B with copies of the weights, a layer in either stage: the compiler would lay the residual out with the tokens
    innermost for the sake of its products, and turn what each of eight experts gave."""
    model, workload = replace(load_model_config("qwen-3-30b-a3b"), num_layers=2), Workload(batch=8, input_len=4096, phase="prefill")
    roles = {"x": "batch", "y": "none"}
    layout = make_layout({"x": "replica", "y": "stage"}, roles, roles)
    plan, buckets = serving_steps(Plan(model, parse_slice("v6e:2x2"), layout), workload)
    (step,) = prove(plan, buckets).steps
    assert not [one for one in step.differences if one.kind == "extra copy" and "grouped.py" in one.source_op]
