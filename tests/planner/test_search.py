"""The search is exact: merging equal axes and joining phases lose nothing against trying everything."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from partinf.cost.pricing import Pricing
from partinf.cost.program import JAX_LLM_EXAMPLES, LOOPED, TILED
from partinf.cost.step import step_ledger
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout import AttentionRole, Layout, Phase, Role, head_axes
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.planner import plan, search
from partinf.planner.evaluate import FEW_ROWS, Evaluator, heads_for
from partinf.planner.options import BestSoFar
from partinf.planner.question import Question
from partinf.planner.search import Search, order
from partinf.plans import Plan, layout_offences
from partinf.workload import DType, Workload

SMALL = ModelConfig("small", 4, 1024, 4096, 16, 4, 64, 4096)
STORED = (Role.EMBED, Role.FFN, Role.REPLICA, Role.STAGE)
ATTENDED = (AttentionRole.HEADS, AttentionRole.BATCH, AttentionRole.SEQUENCE, AttentionRole.NONE)


def every_layout(axes: tuple[str, ...]) -> list[Layout]:
    """Each storage, gather and attention role of each axis, both phases alike; no axis equal to another."""
    layouts = []
    for storage in itertools.product(STORED, repeat=len(axes)):
        stored = [axis for axis, role in zip(axes, storage, strict=True) if role in (Role.EMBED, Role.FFN)]
        attended = [(AttentionRole.NONE,) if role is Role.STAGE else ATTENDED for role in storage]
        for count in range(len(stored) + 1):
            for gather in itertools.combinations(stored, count):
                for attention in itertools.product(*attended):
                    phase = Phase(gather, tuple(zip(axes, attention, strict=True)))
                    layouts.append(Layout(tuple(zip(axes, storage, strict=True)), phase, phase))
    return layouts


def seconds_of(evaluator: Evaluator, layout: Layout, label: str) -> float | None:
    padded = heads_for(evaluator.model, layout, evaluator.sizes)
    if padded is None or layout_offences(evaluator.model, evaluator.pricing.slice, layout, padded):
        return None
    split = evaluator.split(layout, label, padded)
    residuals = [split, split.with_whole_residual()] if split.local_tokens <= FEW_ROWS else [split]
    return min(step_ledger(one).seconds for one in residuals) * evaluator.stages(layout)


@pytest.mark.parametrize(
    ("name", "phase", "kv_heads"),
    [
        pytest.param("v4:4x4x8", "decode", 4, marks=pytest.mark.slow),
        pytest.param("v4:2x2x2", "prefill", 1, marks=pytest.mark.slow),
        ("v5e:4x4", "decode", 64),
        ("v5e:4x8", "prefill", 4),
        ("cpu:2x2", "prefill", 64),
    ],
)
def test_equal_axes_once_loses_nothing(name: str, phase: str, kv_heads: int) -> None:
    model = ModelConfig("small", 4, 4096, 16384, 64, kv_heads, 64, 4096)
    slice_, workload = parse_slice(name), Workload(batch=16, input_len=128, phase=phase)
    report = search(model, slice_, workload, calibration="none")
    evaluator = Evaluator(model, report.pricing, workload)
    brute = {round(s, 12) for layout in every_layout(tuple(slice_.axis_sizes)) if (s := seconds_of(evaluator, layout, phase)) is not None}
    found = {round(candidate.score, 12) for candidate in report.candidates}
    assert {score for score in brute if score <= 1.5 * min(brute)} <= found <= brute
    if not any("times as slow" in refused.reason for refused in report.refused):
        assert found == brute


def test_whole_workload_equals_trying_every_pair() -> None:
    slice_, workload = parse_slice("cpu:4x2"), Workload(batch=8, input_len=64, output_len=16, weights=DType.BF16)
    report = search(SMALL, slice_, workload)
    pricing = report.pricing
    evaluator = Evaluator(SMALL, pricing, workload)
    best, known = float("inf"), dict[object, float | None]()

    def seconds(layout: Layout, label: str, *depends: object, again: bool) -> float | None:
        """Of a step, which depends on the storage and on these parts of the layout alone, as every 53rd pair shows."""
        key = (label, layout.storage, *depends)
        if key not in known:
            known[key] = seconds_of(evaluator, layout, label)
        elif again:
            assert seconds_of(evaluator, layout, label) == known[key]
        return known[key]

    pairs = itertools.product(every_layout(("x", "y")), repeat=2)
    for number, (prefill, decode) in enumerate(pair for pair in pairs if pair[0].storage == pair[1].storage):
        layout, again = Layout(prefill.storage, prefill.prefill, decode.decode), number % 53 == 0
        first = seconds(layout, "prefill", layout.prefill, layout.decode.attention, again=again)
        second = seconds(layout, "decode", layout.decode, head_axes(layout), again=again)
        if first is not None and second is not None:
            best = min(best, first + workload.output_len * second)
    assert report.best.score == pytest.approx(best)


def test_between_slices_stages_beat_tensors_and_copies_where_these_do_not_fit() -> None:
    workload = Workload(batch=32, input_len=512, output_len=64)
    slice_ = parse_slice("a100-40:8*2")
    report = search(load_model_config("gpt3-175b"), slice_, workload)
    assert dict(report.best.layout.storage)["dcn"] is Role.STAGE
    note = plan(report.model, slice_, workload).note
    assert "Axis dcn splits the layers into stages; splitting d_ff and heads over it is " in note
    assert "collectives +" in note
    assert "copying the weights over it does not fit (" in note
    staged, tensors = (next(c for c in report.candidates if dict(c.layout.storage)["dcn"] is role) for role in (Role.STAGE, Role.FFN))
    assert tensors.memory.kv == staged.memory.kv
    assert staged.memory.weights > tensors.memory.weights  # each stage has the embedding table


def test_layers_of_stages_stay_in_a_loop() -> None:
    report = search(load_model_config("llama-3-8b"), parse_slice("v5e:2x2*2"), Workload(batch=16, context_len=512, phase="decode"))
    assert report.layers == "one by one"
    staged = next(one for one in report.candidates if dict(one.layout.storage)["dcn"] is Role.STAGE)
    assert replace(report, candidates=(staged,)).layers == "in a loop"


def test_order_and_ties() -> None:
    workload = Workload(batch=64, context_len=2048, phase="decode", weights=DType.INT8)
    report = search(load_model_config("palm-540b"), parse_slice("v4:4x4x4"), workload)
    assert [c.fits for c in report.candidates] == sorted((c.fits for c in report.candidates), reverse=True)
    fitting = [c for c in report.candidates if c.fits]
    assert [c.score for c in fitting] == sorted(c.score for c in fitting)
    assert all(c.tie_with_best == (c.score <= 1.05 * report.best.score) for c in fitting)
    wanted = next(c for c in report.candidates if c.main.ffn == "ws-2d" and c.main.attention == "batch")
    assert wanted.tie_with_best
    assert len(report.candidates) == 1540


def test_large_prefill_gathers_weights_and_decode_keeps_them() -> None:
    workload = Workload(batch=512, input_len=2048, output_len=64)
    chosen = plan(load_model_config("palm-540b"), parse_slice("v4:4x4x4"), workload)
    assert set(chosen.layout.prefill.gather) == {"x", "y", "z"}
    assert not chosen.layout.decode.gather
    assert 64 < chosen.prefill_from_tokens < 512 * 2048
    assert [label for label, _ in chosen.predicted] == ["prefill", "decode"]
    assert chosen.note


def test_switch_is_where_steps_of_prompts_are_level() -> None:
    """Their attention is in it: its way to and from the linear layers depends on the FFN's roles."""
    workload = Workload(batch=512, input_len=2048, output_len=64)
    slice_ = parse_slice("v4:4x4x4")
    chosen = plan(load_model_config("palm-540b"), slice_, workload)
    from partinf.cost.calibration import calibration_for
    from partinf.cost.overlap import hide_gathers
    from partinf.cost.split import StepShape
    from partinf.cost.step import attention_part, linear_part

    evaluator = Evaluator(chosen.model, Pricing(slice_, calibration_for(slice_.chip), program=TILED), workload)
    multiple = chosen.prefill_slot_multiple()

    def seconds(label: str, tokens: int) -> float:
        slots = -(-tokens // 2048 // multiple) * multiple or multiple
        shape = StepShape(prefill_tokens=tokens, prefill_slots=slots)
        split = evaluator.split(chosen.layout, label, chosen.padded_heads, shape)
        return hide_gathers(linear_part(split) + attention_part(split)).seconds

    switch = chosen.prefill_from_tokens
    assert seconds("prefill", switch) < seconds("decode", switch)
    assert seconds("prefill", switch - 64) >= seconds("decode", switch - 64)


def test_plans_are_layouts_that_run() -> None:
    """A report lists layouts that pad heads in groups; the plan for an engine is one that it runs."""
    model = ModelConfig("twelve", 4, 1024, 4096, 12, 4, 64, 4096)
    workload = Workload(batch=8, context_len=128, phase="decode")
    report = search(model, parse_slice("cpu:2x2x2"), workload)
    assert any(candidate.padded_heads == 16 for candidate in report.candidates)
    chosen = plan(model, parse_slice("cpu:2x2x2"), workload)
    assert chosen.runnable is None
    assert isinstance(chosen, Plan)


def test_what_does_not_fit_is_reported() -> None:
    with pytest.raises(InvalidInput, match=r"does not fit v4:2x2x2: weights .* usable 33\.0 GB"):
        plan(load_model_config("palm-540b"), parse_slice("v4:2x2x2"), Workload(batch=1, context_len=128, phase="decode"))


def test_latency_bound_orders_before_time() -> None:
    workload = Workload(batch=64, context_len=2048, phase="decode", weights=DType.INT8, max_latency=0.029)
    report = search(load_model_config("palm-540b"), parse_slice("v4:4x4x4"), workload)
    met = [candidate.meets_bound for candidate in report.candidates if candidate.fits]
    assert any(met)
    assert met == sorted(met, reverse=True)


def test_what_is_left_out_is_slower() -> None:
    """With so many assignments that slow ones are passed over, the first ones are those of full enumeration."""
    model = ModelConfig("small", 4, 1024, 4096, 16, 8, 64, 4096)
    slice_ = parse_slice("v4:4x2x2")
    for workload in (Workload(batch=16, context_len=512, phase="decode"), Workload(batch=16, input_len=256, output_len=64)):
        searches = [Search(Question(model, workload, calibration="none"), slice_, BestSoFar(cut)) for cut in (None, 1.5)]
        lists = [order(s.candidates()) for s in searches]
        near = [c.score for c in lists[0] if c.fits and c.score <= 1.5 * lists[0][0].score]
        assert [c.score for c in lists[1]][: len(near)] == near
        assert len(lists[1]) < len(lists[0])


def test_fetching_ahead_is_searched_as_it_is_priced() -> None:
    """In a program that reads weights early the bound passes over nothing that is faster, and a candidate's entries make its time."""
    model = ModelConfig("small", 4, 1024, 4096, 16, 8, 64, 4096)
    workload = Workload(batch=16, context_len=512, phase="decode")
    lists = [
        order(
            Search(
                Question(model, workload, program=JAX_LLM_EXAMPLES), parse_slice("v5e:4x4", "x:4,y0:2,y1:2"), BestSoFar(cut)
            ).candidates()
        )
        for cut in (None, 1.5)
    ]
    near = [c.score for c in lists[0] if c.fits and c.score <= 1.5 * lists[0][0].score]
    assert [c.score for c in lists[1]][: len(near)] == near
    assert len(lists[1]) < len(lists[0])
    for candidate in lists[0][:20]:
        ledger = candidate.main.ledger
        assert ledger.seconds == pytest.approx(candidate.main.step_seconds)
        assert any(entry.overlapped for entry in ledger.entries)


def test_a_long_context_is_split_where_requests_are_few() -> None:
    """Eight key-value heads over 16 chips: heads and context for one long request, heads and requests where there are four."""
    best = {}
    for batch in (1, 4):
        workload = Workload(batch=batch, context_len=131072, phase="decode", weights=DType.INT8)
        report = search(load_model_config("llama-3-70b"), parse_slice("v5e:4x4"), workload)
        best[batch] = report.best.layout.decode
        if batch == 1:
            unmultiple = next(c for c in report.candidates if not c.layout.decode.attention_axes(AttentionRole.SEQUENCE))
            assert report.best.memory.kv * 4 == unmultiple.memory.kv
            assert report.best.score < 0.8 * unmultiple.score
    assert [role.value for _, role in best[1].attention] == ["heads", "sequence"]
    assert sorted(role.value for _, role in best[4].attention) == ["batch", "heads"]  # on which axis which, is a mirror image


def test_where_nothing_hides_gathers_they_are_not_credited() -> None:
    """The program that runs is priced: weights are not gathered for a prefill that copies serve better."""
    workload = Workload(4, input_len=2048, phase="prefill", weights=DType.INT8)
    slice_ = parse_slice("h200:4x2")
    report = search(load_model_config("qwen-3-8b"), slice_, workload)
    assert report.program is TILED
    assert not report.best.main.phase.gather
    assert search(load_model_config("qwen-3-8b"), slice_, workload, program=LOOPED).best.main.phase.gather
    assert search(load_model_config("qwen-3-8b"), parse_slice("v5e:4x2"), workload).program is TILED
