"""Small models whose steps show what single products do not: attention, what passes between products, and the fixed costs of a step.

Every step's price is linear in the times that are sought (seconds per byte, per FLOP, per operation, per step), so a few steps in which
they weigh differently give them all: a least-squares fit of relative errors in which no time is negative. No probe splits anything: every
device holds the whole small model and has rows of its own.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.optimize import nnls

from partinf.buckets import split_of
from partinf.cost.calibration import Calibration
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED
from partinf.cost.step import step_ledger
from partinf.hardware.rates import Rates, TypeRates
from partinf.hardware.slices import Slice
from partinf.layout.files import make_layout
from partinf.measure.steps import Steps, for_buckets
from partinf.measure.timing import Call, Timing
from partinf.model.config import ModelConfig
from partinf.plans import Bucket, Plan
from partinf.workload import DType

_PAGE = 16


@dataclass(frozen=True)
class Size:
    """How large probes are: so that a step takes milliseconds, and each device sees what it would hold of a split model.

    Attributes:
        wide: factor on d_model and d_ff, rows and positions. devices: devices that share the machine.
    """

    wide: int = 1
    devices: int = 1

    def model(self, name: str, layers: int, embed: int, ffn: int, heads: int, group: int, vocab: int) -> ModelConfig:
        """`group` query heads share a key-value head."""
        embed, ffn = embed * self.wide, max(256, ffn * self.wide // self.devices)
        kv_heads, vocab = max(1, heads // group // self.devices), max(256, vocab // self.devices)
        return ModelConfig(
            f"probe-{name}", layers, embed, ffn, group * kv_heads, kv_heads, 64, vocab, tied_embeddings=True, max_len=1 << 16
        )

    def decode(self, rows: int, context: int) -> Bucket:
        return Bucket(rows if rows == 1 else rows * self.wide, context * self.wide // _PAGE)

    def prefill(self, tokens: int) -> Bucket:
        return Bucket(prefill_tokens=tokens * self.wide, prefill_slots=1)


def probes(size: Size) -> list[tuple[ModelConfig, tuple[Bucket, ...]]]:
    """Models and their steps on one device, with what each is there for."""
    decode, prefill = size.decode, size.prefill
    few = (decode(1, 16), prefill(16))
    return [
        (size.model("one-layer", 1, 128, 256, 2, 1, 256), few),  # what a step takes
        (size.model("layers", 8, 128, 256, 2, 1, 256), few),  # and what an operation takes
        (  # attention over few and many positions together with weights that no cache holds, by few and many rows; prompts
            size.model("wide", 1, 1024, 6144, 16, 4, 256),
            (decode(1, 64), decode(8, 256), decode(8, 1024), decode(32, 256), prefill(64), prefill(256), prefill(512)),
        ),
        (size.model("many-heads", 2, 512, 1024, 8, 1, 256), (decode(8, 512), decode(32, 256), prefill(128))),  # a kv head for each head
        (size.model("vocabulary", 1, 128, 256, 2, 1, 32768), (*few, decode(32, 16))),  # choosing among many tokens
    ]


@dataclass(frozen=True)
class Probe:
    """One step that was timed."""

    name: str
    plan: Plan
    bucket: Bucket
    timing: Timing


def declared(slice_: Slice, dtype: DType) -> list[tuple[str, Plan, Bucket]]:
    """All probes with weights, activations and cache of one type, every device running each of them: their names, plans and buckets."""
    size = Size(devices=slice_.num_devices) if slice_.chip.platform.virtual else Size(wide=4)
    found = []
    for model, buckets in probes(size):
        here = tuple(_for_all(bucket, slice_.num_devices) for bucket in buckets)
        plan = for_buckets(_unsplit(model, slice_, dtype), here)
        found += [(f"{model.name}, {bucket}, {dtype}", plan, bucket) for bucket in here]
    return found


def prepare(slice_: Slice, dtype: DType) -> dict[str, Call]:
    """The calls of `declared`, compiled, several models at a time where there are cores for them."""
    steps = declared(slice_, dtype)
    plans = {plan.model.name: plan for _, plan, _ in steps}
    with ThreadPoolExecutor(min(len(plans), os.cpu_count() or 1)) as pool:
        compiled = dict(zip(plans, pool.map(Steps, plans.values()), strict=True))
    return {name: compiled[plan.model.name].call(bucket) for name, plan, bucket in steps}


def fit(timed: list[Probe], slice_: Slice, rates: Rates) -> tuple[TypeRates, list[float]]:
    """The rates of one type with which the probes' prices come closest to their times, and the relative errors that remain.

    Args:
        rates: of products, memory and collectives, which are taken as they are.
    """
    names = [field.name for field in fields(TypeRates)]
    nothing = TypeRates(**{name: 0.0 if name.endswith("_seconds") else math.inf for name in names})
    times = np.array([probe.timing.seconds for probe in timed])
    known = np.array([price(probe, slice_, rates, nothing) for probe in timed])
    columns = []
    for name in names:
        one = replace(nothing, **{name: 1.0})
        columns.append(np.array([price(probe, slice_, rates, one) for probe in timed]) - known)
    matrix = np.stack(columns, axis=1) / times[:, None]
    scale = matrix.max(axis=0)
    found, _ = nnls(matrix / scale, (times - known) / times)
    seconds = found / scale
    values = [value if name.endswith("_seconds") else 1 / value if value else math.inf for name, value in zip(names, seconds, strict=True)]
    errors = (matrix @ seconds + known / times - 1).tolist()
    return TypeRates(*map(float, values)), errors


def price(probe: Probe, slice_: Slice, rates: Rates, of_type: TypeRates) -> float:
    """What a probe would take with these rates."""
    name = probe.plan.weights.value
    constants = Calibration("fit", 1.0, 1.0, 1.0, 0.0, True, 0.0, "", replace(rates, types=((name, of_type),)))
    return step_ledger(split_of(probe.plan, probe.bucket, Pricing(slice_, constants, program=TILED))).seconds


def _unsplit(model: ModelConfig, slice_: Slice, dtype: DType) -> Plan:
    axes = tuple(slice_.axis_sizes)
    layout = make_layout(dict.fromkeys(axes, "replica"), dict.fromkeys(axes, "batch"))
    return Plan(model, slice_, layout, weights=dtype, kv=dtype)


def _for_all(bucket: Bucket, devices: int) -> Bucket:
    rows, tokens, slots = (devices * size for size in (bucket.decode_rows, bucket.prefill_tokens, bucket.prefill_slots))
    return replace(bucket, decode_rows=rows, prefill_tokens=tokens, prefill_slots=slots)
