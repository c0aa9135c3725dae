"""Seeded cases, a model, a small slice and one step of a workload each: thirty that are counted, twelve that are compiled."""

from __future__ import annotations

import random
from dataclasses import dataclass

from partinf.model.load import load_model_config
from partinf.workload import DType, Workload

SEED = 20261122
MODELS = ("llama-3-8b", "qwen-3-8b", "palm-8b", "opt-13b", "gpt3-13b", "qwen-3-32b")
SLICES = ("v4:2x2x1", "v4:2x2x4", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v6e:2x4", "h200:2x2", "h200:4x2", "a100-80:4x2")
# Of the compiled cases: what is drawn of on each kind of TPU, two decode steps and a prompt.
COMPILED_MODELS = ("llama-3-8b", "qwen-3-8b", "palm-8b", "opt-13b", "qwen-3-32b")
COMPILED_SLICES = {
    "v5e": ("v5e:2x4", "v5e:4x4"),
    "v6e": ("v6e:2x2", "v6e:2x4"),
    "v5p": ("v5p:2x2x1",),
    "tpu7x": ("tpu7x:2x2x1",),
}


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


def compiled_cases() -> list[Case]:
    """Twelve cases on four kinds of TPU, the same at every call."""
    draw, found = random.Random(SEED), []
    for slices in COMPILED_SLICES.values():
        for phase in ("decode", "decode", "prefill"):
            model, weights = draw.choice(COMPILED_MODELS), draw.choice((DType.BF16, DType.INT8))
            longest = load_model_config(model).max_len or 4096
            batch, length = (
                (draw.choice((8, 32, 128)), draw.choice((512, 2048, 8192))) if phase == "decode" else draw.choice(((1, 2048), (4, 512)))
            )
            length = min(length, longest)
            lengths = {"context_len": length} if phase == "decode" else {"input_len": length}
            found.append(Case(model, draw.choice(slices), Workload(batch, phase=phase, weights=weights, **lengths)))
    return found
