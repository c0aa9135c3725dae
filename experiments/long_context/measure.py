"""Where splitting the context pays: Llama 3 70B in int8 on 16 TPU v5e, one decode step, with and without sequence axes, by the planner.

python -m experiments.long_context.measure     writes results.json next to this file
"""

from __future__ import annotations

from typing import Any

from experiments.results import write
from partinf.hardware.slices import parse_slice
from partinf.layout import AttentionRole
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.results import Candidate
from partinf.planner.show.work import roles_of
from partinf.workload import DType, Workload

MODELS = ("llama-3-70b", "palm-62b")
SLICE = "v5e:4x4"
BATCHES, CONTEXTS = (1, 2, 4, 8), (8192, 32768, 131072)


def figures(candidate: Candidate) -> dict[str, Any]:
    """The figures stored for a candidate."""
    return {
        "storage": candidate.name.split(",")[0],
        "roles": roles_of(candidate.main),
        "step_ms": round(candidate.main.step_seconds * 1e3, 2),
        "kv_gb_per_device": round(candidate.memory.kv / 1e9, 2),
        "fits": candidate.fits,
    }


def main() -> None:
    cases = []
    for name in MODELS:
        for batch in BATCHES:
            for context in CONTEXTS:
                workload = Workload(batch, context_len=context, phase="decode", weights=DType.INT8)
                found = search(load_model_config(name), parse_slice(SLICE), workload).candidates
                without = next(c for c in found if not c.layout.decode.attention_axes(AttentionRole.SEQUENCE))
                cases.append(
                    {"model": name, "batch": batch, "context": context, "best": figures(found[0]), "without_sequence": figures(without)}
                )
    results = {"slice": SLICE, "weights": "int8", "kv": "bf16", "cases": cases}
    write(__file__, results)


if __name__ == "__main__":
    main()
