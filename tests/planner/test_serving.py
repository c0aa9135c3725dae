"""Prompts prefilled apart from the batch that decodes, and the switch of FFN roles by tokens per step."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from partinf.cli import main
from partinf.foundation.limits import NEVER
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.report import PlanReport
from partinf.planner.switch import prefill_from, switch_table
from partinf.planner.trials import Trial
from partinf.workload import DType, Objective, Workload

SERVING = Workload(64, 1984, 64, weights=DType.INT8, prefill_batch=1)
GATHERING = Workload(512, 2048, 64)


def searched(workload: Workload) -> PlanReport:
    return search(load_model_config("palm-540b"), parse_slice("v4:4x4x4"), workload)


def test_prefill_at_one_decode_at_many() -> None:
    """The paper's serving setting: each phase is that of its own batch, over one storage and one cache."""
    best = searched(SERVING).best
    prefill, decode = best.phases
    assert (prefill.tokens, decode.tokens) == (1984, 64)
    assert (prefill.ffn, prefill.attention, decode.ffn) == ("ws-2d", "heads", "ws-2d")
    assert best.score == pytest.approx(prefill.step_seconds + 64 * decode.step_seconds)
    alone = searched(replace(SERVING, batch=1, phase="prefill")).best
    assert prefill.step_seconds >= alone.score
    lanes = 64 // 64  # all axes split requests
    assert best.memory.kv == lanes * 118 * 2 * 2048 * 256 * 2


def test_a_request_waits_for_one_prefill_and_a_chip_runs_all() -> None:
    by_cost = searched(replace(SERVING, objective=Objective.COST))
    prefill, decode = by_cost.best.phases
    whole = 64 * prefill.step_seconds + 64 * decode.step_seconds
    assert by_cost.best.score == pytest.approx(whole)
    assert Trial(by_cost).chip_seconds == pytest.approx(64 * whole)
    assert Trial(by_cost).seconds == pytest.approx(prefill.step_seconds + 64 * decode.step_seconds)


def test_one_prefill_of_everything_is_the_default() -> None:
    assert searched(replace(SERVING, batch=8, prefill_batch=8)).best == searched(replace(SERVING, batch=8, prefill_batch=None)).best


def test_switch_of_the_ffn_roles() -> None:
    report = searched(GATHERING)
    layout, padded = report.engine_layout(report.best), report.best.padded_heads
    switch = prefill_from(report.engine_evaluator, layout, padded)
    rows = switch_table(report.engine_evaluator, layout, padded, switch)
    assert [row.tokens for row in rows] == sorted({row.tokens for row in rows})
    for row in rows:
        assert row.runs == ("prefill" if row.prefill_seconds < row.decode_seconds else "decode")
    assert {row.runs for row in rows} == {"prefill", "decode"}
    assert switch_table(report.engine_evaluator, layout, padded, NEVER) == []


def test_gathers_that_do_not_go_ahead_pay_later() -> None:
    """Where nothing hides them they are paid in full, so that it takes more tokens to win them back."""
    report = search(load_model_config("llama-3-8b"), parse_slice("v5e:2x2"), Workload(8, 1024, 64, weights=DType.INT8))
    layout = report.engine_layout(report.best)
    assert layout.prefill.gather
    assert layout.prefill.ahead
    alone = replace(layout, prefill=replace(layout.prefill, ahead=False))
    switches = [prefill_from(report.engine_evaluator, one, report.best.padded_heads) for one in (layout, alone)]
    assert 256 < switches[0] < 2 * switches[0] < switches[1] < NEVER


def test_the_switch_and_the_prompts_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "palm-540b", "--slice", "v4:4x4x4", "--batch", "512", "--input", "1984", "--output", "64", "--format", "json"]
    assert main(["plan", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    few, many = (row["ffn"] for row in report["ffn_by_tokens"])
    assert few == "ws-2d"
    assert many in ("wg-xy", "wg-xyz")  # level to a part in a thousand: what XY exchanges runs behind its products
    assert report["ffn_by_tokens"][1]["from_tokens"] > 512
    assert report["workload"]["prefill_batch"] == 512


@pytest.mark.parametrize(("flag", "words"), [("0", "prefill batch = 0"), ("9", "more prompts than"), ("one", "a whole number")])
def test_bad_prefill_batch(capsys: pytest.CaptureFixture[str], flag: str, words: str) -> None:
    flags = ["--model", "palm-8b", "--slice", "v4:2x2x2", "--batch", "8", "--input", "64", "--prefill-batch", flag]
    assert main(["plan", *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
