"""The twelve steps that planner and proof are compared on: decode and prompts of 512, 8k and 32k tokens on four kinds of TPU.

Their layouts stand here, as `partinf plan` chose them on 2026-11-30 for the step alone or for a whole workload of such prompts, so that a
changed price changes no program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from partinf.buckets import capacity_for, serving_steps, with_capacity
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Bucket, Plan
from partinf.workload import DType, Workload

_SERVED, _OUTPUT = 8, 256  # sequences of a whole workload, and tokens that each generates


@dataclass(frozen=True)
class Step:
    """One step: of `batch` sequences that decode at `length` tokens, or of so many prompts of that length.

    Attributes:
        storage, attention: the role of every axis. decode: that of attention in decode, where it is another. gathered: the weights are
            gathered for prompts, ahead. served: the cache is that of a whole workload.
    """

    name: str
    model: str
    slice: str
    phase: str
    batch: int
    length: int
    storage: str
    attention: str
    weights: DType = DType.BF16
    kv: DType = DType.BF16
    decode: str = ""
    gathered: bool = False
    served: bool = False

    @property
    def workload(self) -> Workload:
        """What the cache is sized for."""
        if self.phase == "decode":
            return Workload(self.batch, context_len=self.length, phase="decode", weights=self.weights, kv=self.kv)
        if not self.served:
            return Workload(self.batch, self.length, phase="prefill", weights=self.weights, kv=self.kv)
        return Workload(_SERVED, self.length, _OUTPUT, weights=self.weights, kv=self.kv, prefill_batch=self.batch)


_INT8 = {"weights": DType.INT8, "kv": DType.INT8}
STEPS = (
    Step("v5e decode", "llama-3-8b", "v5e:2x4", "decode", 32, 2048, "ffn", "heads", **_INT8),
    Step("v5e 512", "llama-3-8b", "v5e:2x4", "prefill", 4, 512, "ffn", "heads", **_INT8, served=True),
    Step("v5e 8k", "llama-3-8b", "v5e:2x4", "prefill", 1, 8192, "ffn", "heads", **_INT8, gathered=True, served=True),
    Step("v6e decode", "qwen-3-8b", "v6e:2x2", "decode", 32, 1024, "ffn", "heads"),
    Step("v6e 512", "qwen-3-8b", "v6e:2x2", "prefill", 4, 512, "ffn", "heads", served=True),
    Step("v6e 32k", "qwen-3-8b", "v6e:2x2", "prefill", 1, 32768, "replica", "heads"),
    Step("v5p decode", "llama-3-8b", "v5p:2x2x1", "decode", 64, 2048, "ffn", "heads"),
    Step("v5p 8k", "llama-3-8b", "v5p:2x2x1", "prefill", 1, 8192, "ffn", "heads", served=True),
    Step("v5p 32k", "llama-3-8b", "v5p:2x2x1", "prefill", 1, 32768, "replica", "heads"),
    Step("tpu7x decode", "qwen-3-8b", "tpu7x:2x2x1", "decode", 128, 1024, "replica", "batch"),
    Step("tpu7x 512", "qwen-3-8b", "tpu7x:2x2x1", "prefill", 8, 512, "replica", "batch"),
    Step("tpu7x 8k", "qwen-3-8b", "tpu7x:2x2x1", "prefill", 1, 8192, "replica", "heads", decode="batch", served=True),
)


def planned(step: Step) -> tuple[Plan, Bucket]:
    """The plan and the step as it is compiled."""
    slice_ = parse_slice(step.slice)
    used = [name for name, size in slice_.axis_sizes.items() if size > 1]

    def roles(role: str, without: str) -> dict[str, str]:
        return {name: role if name in used else without for name in slice_.axis_sizes}

    attention = [roles(role, "none") for role in (step.decode or step.attention, step.attention)]
    gather = {"prefill_gather": used, "prefill_ahead": True} if step.gathered else {}
    layout = make_layout(roles(step.storage, "replica"), *attention, **gather)
    plan = Plan(load_model_config(step.model), slice_, layout, step.weights, step.kv)
    plan, buckets = serving_steps(plan, step.workload)
    if step.served:  # by its engine's programs it is decided whether layers are compiled one by one
        plan = replace(plan, buckets=with_capacity(plan, capacity_for(plan, step.workload)).buckets)
    return plan, next(bucket for bucket in buckets if bool(bucket.prefill_tokens) == (step.phase == "prefill"))
