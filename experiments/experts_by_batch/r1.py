"""The experts of one layer of DeepSeek R1 on 64 chips of v5e, priced, and compared with a profiler trace of that layer.

Of the layer only the experts, the shared ones and the collectives are described: latent attention is no attention of this library. The
traced program (int8, batch 8, context 2048, activations whole on every device, experts over four, their d_ff over sixteen) fetches
matrices for four experts at a time, and W_down for all experts while other things run.
"""

from __future__ import annotations

from typing import Any

from partinf.cost.calibration import calibration_for
from partinf.cost.items import AFTER, WX_IN, WX_OUT
from partinf.cost.ledger import Entry, Op
from partinf.cost.pricing import Pricing
from partinf.cost.split import Shares, StepShape, StepSplit
from partinf.cost.step import step_ledger
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.config import Activation, ModelConfig
from partinf.model.kinds import Experts, FeedForward, Router, Score
from partinf.workload import DType

# jax-ml/jax-llm-examples, deepseek_r1_jax at 8b4b246, images/ds_r1_decode_profile_bs8_ctx2048.png: a layer of 401.434 us is 923 points wide
# where the picture is 1568 points wide; each width was read to a point, 0.4 us.
_WIDTH = 401.434 / 923
TRACED = {
    "W_gate, decode_ragged_dot.141": 186 * _WIDTH,
    "W_up, decode_ragged_dot.142": 183 * _WIDTH,
    "W_down, copy-done.1413 and its product": (145 + 36) * _WIDTH,
    "all-reduce.206 over 64, after attention": 67 * _WIDTH,
    "all-reduce.207 over 64, after the experts": 59 * _WIDTH,
    "all-reduce over 16, after the shared expert": 40 * _WIDTH,
}
BATCH = 8
EXPERTS_AT_ONCE = 4  # of a block of the traced kernel
SLICE = parse_slice("v5e:8x8", "x0:4,x1:2,y:8")
MODEL = ModelConfig(
    "one layer of deepseek-r1",
    1,
    7168,
    0,
    128,
    128,
    128,
    129280,
    experts=Experts(
        256,
        8,
        FeedForward(2048, True, Activation.SILU, ()),
        Router(Score.SIGMOID, scale=2.5, correction=True, groups=8, chosen_groups=4),
        2048,
    ),
)
LAYOUT = make_layout(
    dict.fromkeys(("x0", "x1", "y"), "ffn"),
    dict.fromkeys(("x0", "x1", "y"), "heads"),
    decode_whole=True,
    experts={"x0": "expert", "x1": "ffn", "y": "ffn"},
)


def entries() -> tuple[Pricing, dict[object, Entry]]:
    pricing = Pricing(SLICE, calibration_for(SLICE.chip))
    split = StepSplit(
        MODEL, LAYOUT, LAYOUT.decode, StepShape(decode_rows=BATCH, decode_context=2048), pricing, DType.INT8, DType.INT8, Shares()
    )
    return pricing, {entry.item: entry for entry in step_ledger(split).entries}


def fetched(held: int) -> float:
    """Experts of a device whose block is fetched, since one of the block's is hit, under uniform routing."""
    of, others = MODEL.experts, 1.0
    assert of is not None
    for chosen in range(of.per_token):
        others *= (of.count - EXPERTS_AT_ONCE - chosen) / (of.count - chosen)
    return held * (1.0 - others**BATCH)


def rows() -> list[dict[str, Any]]:
    """Microseconds: traced, and predicted for all experts that a device holds, for those of blocks of which one is hit, and for those that
    are hit, as the kernel here reads them."""
    pricing, found = entries()
    held = 256 // 4
    table = []
    for (what, traced), item, part in zip(list(TRACED.items())[:3], (WX_IN, WX_IN, WX_OUT), (0.5, 0.5, 1.0), strict=True):
        entry = found[item.product]
        assert entry.routed is not None
        every = part * pricing.compute_seconds(0.0, entry.weight_bytes)
        own = part * entry.seconds
        table.append({"what": what, "traced": traced, "all": 1e6 * every, "blocks": 1e6 * every * fetched(held) / held, "hit": 1e6 * own})
    after = found[AFTER]
    for what, axes in ((list(TRACED)[3], after.axes), (list(TRACED)[4], after.axes), (list(TRACED)[5], ("x1", "y"))):
        seconds = pricing.network.seconds(Op.ALL_REDUCE, axes, after.bytes)
        table.append({"what": what, "traced": TRACED[what], "all": 1e6 * seconds, "bytes": after.bytes})
    return [{key: round(value, 1) if isinstance(value, float) else value for key, value in one.items()} for one in table]
