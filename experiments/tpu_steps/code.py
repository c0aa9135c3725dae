"""How much code a layer adds to a program whose layers are compiled one by one, without a TPU.

    python -m experiments.tpu_steps.code [NAME …]     # half a minute to four per step; writes code.json, of what is missing or named

Every step is compiled with two and with six layers: the difference is that of four. `tests/planner/test_pool.py` holds
`partinf.hardware.platform.Platform.program_bytes` to these figures.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from experiments.results import read, write
from partinf.buckets import serving_steps
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Bucket, Plan
from partinf.proof.process import Limits, compile_bucket
from partinf.workload import DType, Workload

_FEW, _MORE = 2, 6  # layers
FILE = "code.json"


@dataclass(frozen=True)
class Case:
    """One step: decode of `batch` sequences of `length` tokens, or so many prompts; `attention`: the last axis's role in decode."""

    model: str
    slice: str
    phase: str
    batch: int
    length: int
    storage: str = "ffn"
    attention: str = "heads"
    type: DType = DType.BF16

    def step(self, layers: int) -> tuple[Plan, Bucket]:
        where = parse_slice(self.slice)
        axes = tuple(where.axis_sizes)
        prompts = dict.fromkeys(axes, "heads" if self.storage == "ffn" else self.attention)
        decode = prompts | {axes[-1]: self.attention}
        whole = self.phase == "decode" and self.storage == "ffn"
        layout = make_layout(dict.fromkeys(axes, self.storage), decode, prompts, decode_whole=whole)
        plan = Plan(replace(load_model_config(self.model), num_layers=layers), where, layout, self.type, self.type)
        length = {"context_len" if self.phase == "decode" else "input_len": self.length}
        plan, (bucket,) = serving_steps(plan, Workload(self.batch, phase=self.phase, weights=self.type, kv=self.type, **length))
        return plan, bucket


CASES = {
    "v5e, 70B int8, decode 32": Case("llama-3-70b", "v5e:4x4", "decode", 32, 2048, attention="batch", type=DType.INT8),
    "v5e, 70B int8, prompt of 512": Case("llama-3-70b", "v5e:4x4", "prefill", 1, 512, type=DType.INT8),
    "v5e, 8B, decode 32": Case("llama-3-8b", "v5e:2x4", "decode", 32, 2048),
    "v5e, 8B, prompt of 512": Case("llama-3-8b", "v5e:2x4", "prefill", 1, 512),
    "v6e, 8B, decode 32": Case("qwen-3-8b", "v6e:2x2", "decode", 32, 1024),
    "v6e, 8B, decode 8": Case("qwen-3-8b", "v6e:2x2", "decode", 8, 1024),
    "v6e, 8B, prompt of 512": Case("qwen-3-8b", "v6e:2x2", "prefill", 1, 512),
    "v6e, 8B, 4 prompts of 512": Case("qwen-3-8b", "v6e:2x2", "prefill", 4, 512),
    "v5p, 8B, decode 64": Case("llama-3-8b", "v5p:2x2x1", "decode", 64, 2048),
    "v5p, 8B, prompt of 512": Case("llama-3-8b", "v5p:2x2x1", "prefill", 1, 512),
    "v5p, 8B, prompt of 8192": Case("llama-3-8b", "v5p:2x2x1", "prefill", 1, 8192),
    "v4, 70B, decode 64": Case("llama-3-70b", "v4:2x2x4", "decode", 64, 2048, attention="batch"),
    "v4, 8B, prompt of 512": Case("llama-3-8b", "v4:2x2x1", "prefill", 1, 512),
    "tpu7x, 8B, decode 128": Case("qwen-3-8b", "tpu7x:2x2x1", "decode", 128, 1024, "replica", "batch"),
    "tpu7x, 8B, 8 prompts of 512": Case("qwen-3-8b", "tpu7x:2x2x1", "prefill", 8, 512, "replica", "batch"),
}


def row_of(case: Case, few: int, more: int) -> dict[str, Any]:
    """A row of code.json: bytes of both programs, of a layer, and of the rest."""
    layer = (more - few) // (_MORE - _FEW)
    plan, bucket = case.step(_FEW)
    sizes = {"decode_rows": bucket.decode_rows, "prompt_tokens": bucket.prefill_tokens // plan.prefill_slot_multiple()}
    return sizes | {"layers": {str(_FEW): few, str(_MORE): more}, "layer": layer, "rest": few - _FEW * layer}


def main(names: list[str]) -> None:
    found = read(__file__, FILE, missing={})
    for name, case in CASES.items():
        if name not in names and (names or name in found):
            continue
        few, more = (compile_bucket(*case.step(layers), Limits()).memory["generated_code"] for layers in (_FEW, _MORE))
        found[name] = row_of(case, few, more)
        print(f"{name}: {found[name]['layer'] / 1e6:.2f} MB per layer", flush=True)
        write(__file__, found, FILE)


if __name__ == "__main__":
    main(sys.argv[1:])
