"""Bounds that need no layout: what a model's bytes and FLOPs alone say about a slice (the scaling book's rules of thumb).

    step     B · KV bytes / bandwidth + max(2 · B · N / FLOP/s, weight bytes / bandwidth)        attention is always bound by bandwidth
    critical batch   where the two sides of that maximum meet

All take the maker's figures and the chips of the slice together, no collective counted.
"""

from __future__ import annotations

from partinf.hardware.chips import Chip
from partinf.hardware.slices import Slice
from partinf.model.config import ModelConfig
from partinf.workload import DType


def critical_batch(chip: Chip, weights: DType = DType.BF16) -> float:
    """Tokens per step from which reading the weights is hidden behind their products, which are in bf16 whatever the storage."""
    return weights.num_bytes / DType.BF16.num_bytes * chip.peak_bf16 / chip.hbm_bandwidth


def kv_bytes_per_token(model: ModelConfig, kv: DType = DType.BF16) -> int:
    """Keys and values of one token in all layers, whole."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * kv.num_bytes


def read_seconds(slice_: Slice, num_bytes: float) -> float:
    """Time in which the slice reads this many bytes, spread evenly, from its HBM."""
    return num_bytes / (slice_.num_chips * slice_.chip.hbm_bandwidth)


def step_seconds(slice_: Slice, num_params: float, weights: DType, batch: int, kv_bytes_per_sequence: float) -> float:
    """One decode step."""
    compute = 2 * batch * num_params / (slice_.num_chips * slice_.chip.peak_bf16)
    return read_seconds(slice_, batch * kv_bytes_per_sequence) + max(compute, read_seconds(slice_, num_params * weights.num_bytes))


def prefill_seconds(slice_: Slice, num_params: float, tokens: int, mfu: float = 1.0) -> float:
    """Prefill of this many tokens at a given share of peak FLOP/s; attention's own FLOPs are not counted."""
    return 2 * num_params * tokens / (slice_.num_chips * slice_.chip.peak_bf16 * mfu)
