"""The twelve steps that planner and proof are asked for: decode and prompts of 512, 8k and 32k tokens on four kinds of TPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from partinf.buckets import serving_steps
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.choose import plan_of
from partinf.plans import Bucket, Plan
from partinf.workload import DType, Workload


@dataclass(frozen=True)
class Step:
    """One step: of `batch` sequences that decode at `length` tokens, or of so many prompts of that length.

    Attributes:
        served: the layout is that of a whole workload of such prompts, decode included; else the one that is best for the step alone.
    """

    name: str
    model: str
    slice: str
    phase: str
    batch: int
    length: int
    weights: DType = DType.BF16
    kv: DType = DType.BF16
    served: bool = False

    @property
    def workload(self) -> Workload:
        """What the layout is chosen for."""
        if self.phase == "decode":
            return Workload(self.batch, context_len=self.length, phase="decode", weights=self.weights, kv=self.kv)
        if not self.served:
            return Workload(self.batch, self.length, phase="prefill", weights=self.weights, kv=self.kv)
        return Workload(_SERVED, self.length, _OUTPUT, weights=self.weights, kv=self.kv, prefill_batch=self.batch)


_SERVED, _OUTPUT = 8, 256  # sequences of a whole workload, and tokens that each generates
_INT8 = {"weights": DType.INT8, "kv": DType.INT8}
STEPS = (
    Step("v5e decode", "llama-3-8b", "v5e:2x4", "decode", 32, 2048, **_INT8),
    Step("v5e 512", "llama-3-8b", "v5e:2x4", "prefill", 4, 512, **_INT8, served=True),
    Step("v5e 8k", "llama-3-8b", "v5e:2x4", "prefill", 1, 8192, **_INT8, served=True),
    Step("v6e decode", "qwen-3-8b", "v6e:2x2", "decode", 32, 1024),
    Step("v6e 512", "qwen-3-8b", "v6e:2x2", "prefill", 4, 512, served=True),
    Step("v6e 32k", "qwen-3-8b", "v6e:2x2", "prefill", 1, 32768),
    Step("v5p decode", "llama-3-8b", "v5p:2x2x1", "decode", 64, 2048),
    Step("v5p 8k", "llama-3-8b", "v5p:2x2x1", "prefill", 1, 8192, served=True),
    Step("v5p 32k", "llama-3-8b", "v5p:2x2x1", "prefill", 1, 32768),
    Step("tpu7x decode", "qwen-3-8b", "tpu7x:2x2x1", "decode", 128, 1024),
    Step("tpu7x 512", "qwen-3-8b", "tpu7x:2x2x1", "prefill", 8, 512),
    Step("tpu7x 8k", "qwen-3-8b", "tpu7x:2x2x1", "prefill", 1, 8192, served=True),
)


def planned(step: Step) -> tuple[Plan, Bucket]:
    """The layout that the planner chooses for a step, and the step as it is compiled."""
    report = search(load_model_config(step.model), parse_slice(step.slice), step.workload)
    plans = (plan_of(report, candidate) for candidate in report.candidates if candidate.fits)
    plan, buckets = serving_steps(next(plan for plan in plans if plan.runnable is None), step.workload)
    bucket = next(bucket for bucket in buckets if bool(bucket.prefill_tokens) == (step.phase == "prefill"))
    return replace(plan, predicted=()), bucket
