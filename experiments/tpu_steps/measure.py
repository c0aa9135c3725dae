"""What steps of four models take on TPUs by the proof's estimate, today's program against the one before; no TPU.

    python -m experiments.tpu_steps.measure                  # compiles every case and writes the column `after` of results.json
    python -m experiments.tpu_steps.measure --only NAME      # one case

`before` was made in a checkout of da28871, whose layouts know no `whole`; the column is kept as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.results import read, write
from partinf.buckets import serving_steps
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Bucket, Plan
from partinf.proof import Limits, StepProof, prove
from partinf.workload import DType, Workload

_SECONDS = 900.0


@dataclass(frozen=True)
class Case:
    """One step: decode of `batch` sequences of `length` tokens each, or a prompt of so many; `attention`: decode's roles."""

    model: str
    slice: str
    storage: Mapping[str, str]
    attention: Mapping[str, str]
    phase: str
    batch: int
    length: int
    weights: str = "bf16"
    kv: str = "bf16"

    def step(self) -> tuple[Plan, Bucket]:
        heads = {axis: "heads" if role == "ffn" else "none" for axis, role in self.storage.items()}
        decode = self.attention if self.phase == "decode" else heads
        layout = make_layout(self.storage, decode, heads, decode_whole=self.phase == "decode")
        types = {"weights": DType(self.weights), "kv": DType(self.kv)}
        plan = Plan(load_model_config(self.model), parse_slice(self.slice), layout, **types)
        length = {"context_len" if self.phase == "decode" else "input_len": self.length}
        plan, (bucket,) = serving_steps(plan, Workload(batch=self.batch, phase=self.phase, **types, **length))
        return plan, bucket


_TENSOR, _INT8 = {"x": "ffn", "y": "ffn"}, {"weights": "int8", "kv": "int8"}
_V5P = {"x": "ffn", "y": "ffn", "z": "ffn"}
CASES = {
    **{
        f"Llama 3 70B int8, v5e:4x4, batch {batch}": Case(
            "llama-3-70b", "v5e:4x4", _TENSOR, {"x": "heads", "y": y}, "decode", batch, 2048, **_INT8
        )
        for batch, y in ((8, "heads"), (32, "batch"), (128, "batch"))
    },
    "PaLM 540B int8, v4:4x4x4, batch 64": Case(
        "palm-540b", "v4:4x4x4", {"x": "embed", "y": "ffn", "z": "ffn"}, dict.fromkeys("xyz", "batch"), "decode", 64, 2048, weights="int8"
    ),
    "Qwen 3 8B, v6e:2x2, batch 8": Case("qwen-3-8b", "v6e:2x2", _TENSOR, {"x": "heads", "y": "heads"}, "decode", 8, 1536),
    **{
        f"Llama 3 8B, v5p:2x2x1, prompt of {length}": Case("llama-3-8b", "v5p:2x2x1", _V5P, {}, "prefill", 1, length)
        for length in (512, 8192, 32768)
    },
}


def row_of(plan: Plan, step: StepProof) -> dict[str, Any]:
    """A cell of results.json; times in ms."""
    estimate, layers = step.estimate, plan.model.num_layers
    assert estimate is not None
    return {
        "ms": round(1e3 * estimate.seconds, 2),
        "collectives_ms": round(1e3 * estimate.collectives, 2),
        "floor_ms": round(1e3 * estimate.floor, 2),
        "kernel_ms": round(1e3 * estimate.kernels, 2),
        "collectives_per_layer": round(sum(one.count for one in step.collectives) / layers, 1),
        "code_mb": round(step.memory.code / 1e6, 1),
        "temporaries_mb": round(step.memory.temporaries / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=CASES, help="one case")
    chosen = parser.parse_args().only
    found = read(__file__, missing={})
    for name, case in CASES.items():
        if chosen in (None, name):
            plan, bucket = case.step()
            (step,) = prove(plan, [bucket], Limits(seconds=_SECONDS)).steps
            found.setdefault(name, {})["after"] = row = row_of(plan, step)
            print(f"{name}: {row}", flush=True)
            write(__file__, found)


if __name__ == "__main__":
    main()
