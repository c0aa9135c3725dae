"""The pre-flight and the batch advice: what each change would bring, and which limit stops the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.files import plan_from_toml
from partinf.workload import DType, Workload

LLAMA = load_model_config("llama-3-70b")
DECODE = Workload(batch=32, context_len=8192, phase="decode")


def test_changes_that_would_make_it_fit() -> None:
    report = search(LLAMA, parse_slice("v5e:2x4"), DECODE)
    assert not report.best.fits
    changes = {change.what: change.memory for change in report.changes}
    assert set(changes) == {"weights in int8", "KV in int8", "weights and KV in int8", "batch 16", "context 4096", "slice v5e:4x4"}
    assert changes["weights and KV in int8"].fits
    assert not changes["KV in int8"].fits
    assert changes["slice v5e:4x4"].fits
    least = min(candidate.memory.total for candidate in report.candidates)
    assert all(memory.total < least for memory in changes.values())


def test_nothing_to_change_where_it_fits() -> None:
    assert search(LLAMA, parse_slice("v5e:4x8"), DECODE).changes == ()


def test_limits_of_the_batch() -> None:
    slice_ = parse_slice("v5e:4x8")
    memory = search(LLAMA, slice_, DECODE).batch_advice
    assert memory.limit == "memory"
    assert memory.batch == memory.by_memory >= 32
    compute = search(LLAMA, slice_, replace(DECODE, context_len=128)).batch_advice
    assert compute.limit == "compute"
    assert compute.batch == 240
    short = replace(DECODE, batch=64, context_len=128)
    bound = search(LLAMA, slice_, short).best.score
    latency = search(LLAMA, slice_, replace(short, max_latency=bound)).batch_advice
    assert latency.limit == "latency"
    assert 64 <= latency.batch < 240


def test_int8_halves_the_critical_batch() -> None:
    slice_ = parse_slice("v5e:4x8")
    advice = search(LLAMA, slice_, replace(DECODE, context_len=128, weights=DType.INT8)).batch_advice
    assert round(advice.critical) == 120


def test_a_plan_file_names_its_model() -> None:
    text = '[axes]\nx = "ffn"\n[decode]\nattention = { x = "heads" }\n'
    with pytest.raises(InvalidInput) as caught:
        plan_from_toml(text, "mine.toml")
    assert len(caught.value.offences) == 2


def test_arrivals_fill_no_larger_batch() -> None:
    """By Little's law: rate times the time that a request decodes, in which prefills take their share."""
    slice_ = parse_slice("v5e:4x8")
    served = Workload(batch=64, input_len=512, output_len=256, prefill_batch=1)
    advice = search(LLAMA, slice_, replace(served, arrival_rate=2.0)).batch_advice
    assert advice.limit == "arrivals"
    assert 1 < advice.batch == advice.by_arrivals < advice.by_memory
    twice = search(LLAMA, slice_, replace(served, arrival_rate=4.0)).batch_advice
    assert twice.batch >= 2 * advice.batch  # steps are longer, prefills take more of the time
    flooded = search(LLAMA, slice_, replace(served, arrival_rate=500.0)).batch_advice
    assert flooded.by_arrivals is None
    assert flooded.most_requests is not None
    assert flooded.most_requests < 500
    assert "fewer than arrive" in str(flooded)


def test_lanes_come_in_multiples() -> None:
    advice = search(load_model_config("palm-540b"), parse_slice("v4:4x4x4"), Workload(512, context_len=2048, phase="decode")).batch_advice
    assert advice.multiple == 64
    assert advice.lanes % 64 == 0
    assert 0 <= advice.lanes - advice.batch < 64


def test_heads_that_do_not_split_evenly() -> None:
    palm = load_model_config("palm-540b")
    advice_text = search(palm, parse_slice("v4:4x4x4"), Workload(1, context_len=128, phase="decode")).head_splits
    assert "1, 2, 3, 4, 6, 8, 12, 16, 24, 48 parts" in advice_text
    assert "padded to 64: 17.8 B parameters more" in advice_text  # as the paper says
    assert search(palm, parse_slice("v4:4x4x1"), Workload(1, context_len=128, phase="decode")).head_splits == ""


def test_there_is_no_advice_where_nothing_decodes_or_nothing_fits() -> None:
    assert search(LLAMA, parse_slice("v5e:4x4"), Workload(8, 512, phase="prefill")).batch_advice is None
    assert search(LLAMA, parse_slice("v5e:2x4"), DECODE).batch_advice is None
