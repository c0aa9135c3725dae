"""Thirty seeded cases: a model, a small slice and one step of a workload each."""

from __future__ import annotations

import random
from dataclasses import dataclass

from partinf.model.load import load_model_config
from partinf.workload import DType, Workload

SEED = 20261122
MODELS = ("llama-3-8b", "qwen-3-8b", "palm-8b", "opt-13b", "gpt3-13b", "qwen-3-32b")
SLICES = ("v4:2x2x1", "v4:2x2x4", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v6e:2x4", "h200:2x2", "h200:4x2", "a100-80:4x2")


@dataclass(frozen=True)
class Case:
    """One step that is to be planned."""

    model: str
    slice: str
    workload: Workload

    def __str__(self) -> str:
        w = self.workload
        length = w.input_len if w.phase == "prefill" else w.context_len
        return f"{self.model} on {self.slice}, {w.phase} {w.batch} × {length}, {w.weights}"


def cases(count: int = 30) -> list[Case]:
    """The cases, the same at every call."""
    draw = random.Random(SEED)
    found = []
    for index in range(count):
        model, slice_ = draw.choice(MODELS), draw.choice(SLICES)
        longest = load_model_config(model).max_len or 4096
        weights = draw.choice((DType.BF16, DType.INT8))
        if index % 3:
            context = min(draw.choice((128, 512, 2048, 8192)), longest)
            workload = Workload(draw.choice((1, 8, 32, 128, 256)), context_len=context, phase="decode", weights=weights)
        else:
            length = min(draw.choice((128, 512, 2048)), longest)
            workload = Workload(draw.choice((1, 4, 16)), input_len=length, phase="prefill", weights=weights)
        found.append(Case(model, slice_, workload))
    return found
