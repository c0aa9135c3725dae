"""The pre-flight and the batch advice: what each change would bring, and which limit stops the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from partinf.errors import InvalidInput
from partinf.hardware import parse_slice
from partinf.model_config import load_model_config
from partinf.planner import search
from partinf.planner.advice import batch_advice, preflight
from partinf.planner.files import plan_from_toml
from partinf.workload import DType, Workload

LLAMA = load_model_config("llama-3-70b")
DECODE = Workload(batch=32, context_len=8192, phase="decode")


def test_changes_that_would_make_it_fit() -> None:
    report = search(LLAMA, parse_slice("v5e:2x4"), DECODE)
    assert not report.best.fits
    changes = {change.what: change.memory for change in preflight(report)}
    assert set(changes) == {"weights in int8", "KV in int8", "weights and KV in int8", "batch 16", "context 4096", "slice v5e:4x4"}
    assert changes["weights and KV in int8"].fits
    assert not changes["KV in int8"].fits
    assert changes["slice v5e:4x4"].fits
    least = min(candidate.memory.total for candidate in report.candidates)
    assert all(memory.total < least for memory in changes.values())


def test_nothing_to_change_where_it_fits() -> None:
    assert preflight(search(LLAMA, parse_slice("v5e:4x8"), DECODE)) == []


def test_limits_of_the_batch() -> None:
    slice_ = parse_slice("v5e:4x8")
    memory = batch_advice(search(LLAMA, slice_, DECODE))
    assert memory.limit == "memory"
    assert memory.batch == memory.by_memory >= 32
    compute = batch_advice(search(LLAMA, slice_, replace(DECODE, context_len=128)))
    assert compute.limit == "compute"
    assert compute.batch == 240
    short = replace(DECODE, batch=64, context_len=128)
    bound = search(LLAMA, slice_, short).best.score
    latency = batch_advice(search(LLAMA, slice_, replace(short, max_latency=bound)))
    assert latency.limit == "latency"
    assert 64 <= latency.batch < 240


def test_int8_halves_the_critical_batch() -> None:
    slice_ = parse_slice("v5e:4x8")
    advice = batch_advice(search(LLAMA, slice_, replace(DECODE, context_len=128, weights=DType.INT8)))
    assert round(advice.critical) == 120


def test_a_plan_file_names_its_model() -> None:
    text = '[axes]\nx = "ffn"\n[decode]\nattention = { x = "heads" }\n'
    with pytest.raises(InvalidInput) as caught:
        plan_from_toml(text, "mine.toml")
    assert len(caught.value.offences) == 2
