"""Bytes that pass through one chip in one layer's FFN against tokens: weight-stationary and weight-gathered, PaLM 540B on 4×4×4.

The volumes are summed from the planner's ledger, collective by collective: payload · (K-1)/K. Once for the two-matrix MLP of the paper's
formulas and once for the whole SwiGLU block of the model, attention roles as each layout is named with.

python -m experiments.volume_against_tokens.measure     writes results.json next to this file
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from experiments.results import write
from partinf.cost.ffn import ffn_entries
from partinf.cost.items import What
from partinf.cost.ledger import Entry, Op
from partinf.cost.pricing import Pricing
from partinf.cost.split import Shares, StepShape, StepSplit
from partinf.cost.step import step_ledger
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.workload import DType

SLICE = parse_slice("v4:4x4x4")
STORED = {"x": "embed", "y": "ffn", "z": "ffn"}
GATHERED = {"ws-2d": "", "wg-x": "x", "wg-xy": "xy", "wg-xyz": "xyz"}
TOKENS = tuple(2**power for power in range(9, 23))
PROMPT = 2048


def layout(gather: str) -> Layout:
    attention = dict.fromkeys("xyz", "batch")
    return make_layout(STORED, attention, attention, gather, gather)


def moved_bytes(entries: Iterable[Entry]) -> float:
    """Bytes through one chip: (K-1)/K of the output of a gather or the input of a scatter, twice that of an all-reduce."""
    total = 0.0
    for entry in entries:
        if entry.op is not None and entry.item.what is not What.NORM:
            ways = math.prod(SLICE.axis_sizes[axis] for axis in entry.axes)
            total += entry.count * entry.bytes * (ways - 1) / ways * (2 if entry.op is Op.ALL_REDUCE else 1)
    return total


def split(model: ModelConfig, gather: str, tokens: int) -> StepSplit:
    roles = layout(gather)
    shape = StepShape(prefill_tokens=tokens, prefill_slots=max(SLICE.num_chips, tokens // PROMPT))
    return StepSplit(model, roles, roles.prefill, shape, Pricing(SLICE), DType.BF16, DType.BF16, Shares())


def crossings(volumes: dict[str, list[float]]) -> list[dict[str, object]]:
    """Where one layout begins to move less than the one before; volumes are linear in the tokens."""
    step = TOKENS[1] - TOKENS[0]
    lines = {
        name: ((values[1] - values[0]) / step, values[0] - (values[1] - values[0]) / step * TOKENS[0]) for name, values in volumes.items()
    }
    found = []
    for before, after in itertools.pairwise(GATHERED):
        (slope, start), (other_slope, other_start) = lines[before], lines[after]
        found.append({"from": before, "to": after, "tokens": round((other_start - start) / (slope - other_slope))})
    return found


def main() -> None:
    palm = load_model_config("palm-540b").with_padded_heads(64)
    mlp = ModelConfig("two matrices", 1, palm.embed_dim, palm.ffn_dim, 64, 1, 256, 4096, gated=False)
    two = {name: [moved_bytes(ffn_entries(split(mlp, gather, t))) for t in TOKENS] for name, gather in GATHERED.items()}
    whole = {
        name: [moved_bytes(step_ledger(split(palm, gather, t)).entries) / palm.num_layers for t in TOKENS]
        for name, gather in GATHERED.items()
    }
    best = {str(t): min(two, key=lambda name, i=i: two[name][i]) for i, t in enumerate(TOKENS)}
    results = {
        "model": palm.name,
        "slice": SLICE.name,
        "tokens": TOKENS,
        "bytes_per_chip_and_layer": {"two-matrix MLP": two, "PaLM block": whole},
        "least_moved": best,
        "crossings": crossings(two),
    }
    write(__file__, results)


if __name__ == "__main__":
    main()
