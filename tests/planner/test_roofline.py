"""The scaling book's worked problems, to the printed precision and without calibrated constants."""

from __future__ import annotations

import pytest

from partinf.cost.roofline import (
    critical_batch,
    kv_bytes_per_token,
    prefill_seconds,
    read_seconds,
    step_seconds,
)
from partinf.hardware.chips import chips
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner.slices import slices_of
from partinf.workload import DType

V5E = chips()["v5e"]
LLAMA = load_model_config("llama-3-70b")


def test_critical_batch() -> None:
    assert round(critical_batch(V5E)) == 240
    assert round(critical_batch(V5E, DType.INT8)) == 120


def test_reading_200b_on_32_chips() -> None:
    assert read_seconds(parse_slice("v4:4x4x2"), 200e9 * 2) == pytest.approx(10e-3, rel=0.05)


def test_cache_of_llama_3_70b_in_int8() -> None:
    assert kv_bytes_per_token(LLAMA, DType.INT8) == 160 * 1024
    assert kv_bytes_per_token(LLAMA, DType.INT8) * 32768 == pytest.approx(5.3e9, rel=0.02)


def test_serving_70b_on_v5e() -> None:
    cache = 8192 * 160e3
    needed = 70e9 + 32 * cache
    assert needed == pytest.approx(112e9, rel=0.005)
    small = next(slice_ for slice_ in slices_of(V5E) if slice_.num_chips * V5E.usable_hbm >= needed)
    assert small.shape == (2, 4)
    step = step_seconds(small, 70e9, DType.INT8, 32, cache)
    assert round(step * 1e3) == 17
    assert 32 / step / 8 == pytest.approx(235, abs=1)
    assert round(step_seconds(parse_slice("v5e:4x4"), 70e9, DType.INT8, 32, cache) * 1e3, 1) == 8.5


def test_prefill_of_8192_tokens() -> None:
    assert round(prefill_seconds(parse_slice("v5e:4x4"), 70e9, 8192, mfu=0.4), 2) == 0.91


def test_three_prefill_slices_to_one_for_decode() -> None:
    """A 4×4 prefill slice takes 0.91 s per prompt; a 4×4 decode slice at batch 43 finishes one every 0.2 to 0.3 s."""
    prefill = prefill_seconds(parse_slice("v5e:4x4"), 70e9, 8192, mfu=0.4)
    step = step_seconds(parse_slice("v5e:4x2"), 70e9, DType.INT8, 32, 8192 * 160e3)
    assert round(prefill / (512 * step / 32)) == 3
