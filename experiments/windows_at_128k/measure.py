"""What windows change in the choice of a layout at 128 thousand tokens: Gemma 3 as it is, and with full attention in every layer.

python -m experiments.windows_at_128k.measure     writes results.json next to this file
"""

from __future__ import annotations

from dataclasses import replace

from experiments.long_context.measure import figures
from experiments.results import write
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.question import Question
from partinf.planner.search import given
from partinf.workload import DType, Workload

MODELS, SLICE, BATCHES, CONTEXT = ("gemma-3-27b", "gemma-3-12b", "gemma-3-4b"), "v5e:4x4", (1, 4, 16, 64), 131072
SIZES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


def _smallest(model: ModelConfig, workload: Workload) -> str | None:
    """The smallest slice of v5e that holds the batch."""
    for size in SIZES:
        try:
            if search(model, parse_slice(f"v5e:{size}"), workload).candidates[0].fits:
                return f"v5e:{size}"
        except InvalidInput:  # its axes do not divide the model
            continue
    return None


def main() -> None:
    slice_, cases = parse_slice(SLICE), []
    for name in MODELS:
        windowed = load_model_config(name)
        full = replace(windowed, kinds=(), pattern=(), prefix=())
        for batch in BATCHES:
            workload = Workload(batch, context_len=CONTEXT, phase="decode", weights=DType.INT8)
            best, without = (search(model, slice_, workload).candidates[0] for model in (windowed, full))
            (moved,) = given(Question(windowed, workload), slice_, [(without.layout, without.padded_heads)])
            named = {"windows": best, "full_attention": without, "windows_under_its_layout": moved}
            smallest = {"windows": _smallest(windowed, workload), "full_attention": _smallest(full, workload)}
            chosen = {which: figures(candidate) for which, candidate in named.items()}
            cases.append({"model": name, "batch": batch, "smallest": smallest} | chosen)
    write(__file__, {"slice": SLICE, "context": CONTEXT, "weights": "int8", "kv": "bf16", "cases": cases})


if __name__ == "__main__":
    main()
