"""The search over meshes: the best of all factorisations without a budget; within one, what is left out is reported."""

from __future__ import annotations

import json

import pytest

from partinf.cli import main
from partinf.hardware.slices import parse_slice
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.planner.choose import plan
from partinf.planner.meshes import every_mesh, fastest
from partinf.planner.question import Question
from partinf.planner.report import PlanReport, answer
from partinf.planner.search import TIE
from partinf.workload import DType, Workload

DECODE = Workload(32, context_len=1024, phase="decode")
WHOLE = Workload(16, input_len=256, output_len=64)
EIGHT_HEADS = ModelConfig("small", 4, 1024, 4096, 16, 8, 64, 4096)
ASKED = ["plan", "--model", "llama-3-8b", "--phase", "decode", "--batch", "32", "--context", "1024"]
CASES = {
    "v5e:2x4": ("v5e:2x4", DECODE, ["x:2,y:4", "x:2,y0:2,y1:2"]),
    "h200:8": ("h200:8", WHOLE, ["x:8", "x0:2,x1:4", "x0:4,x1:2", "x0:2,x1:2,x2:2"]),
    "v5e:4x4": ("v5e:4x4", DECODE, ["x:4,y:4", "x0:2,x1:2,y:4", "x:4,y0:2,y1:2", "x0:2,x1:2,y0:2,y1:2"]),
}


def left_out(report: PlanReport) -> int:
    return sum(refused.count for refused in report.refused if "budget" in refused.reason)


@pytest.mark.parametrize(("name", "workload", "meshes"), CASES.values(), ids=CASES)
def test_without_a_budget_the_best_of_all_meshes_is_found(name: str, workload: Workload, meshes: list[str]) -> None:
    question, slice_ = Question(EIGHT_HEADS, workload), parse_slice(name)
    scores = {mesh: answer(question, slice_.with_mesh(mesh)).best.score for mesh in meshes}
    reports = every_mesh(question, slice_, None)
    assert reports[0].best.score == min(scores.values())
    assert all(report.best.score == scores[report.slice.mesh] for report in reports if report.best.score <= TIE * min(scores.values()))
    assert not left_out(reports[0])


def test_what_a_budget_leaves_out_is_reported_and_more_of_it_finds_no_less(capsys: pytest.CaptureFixture[str]) -> None:
    question, slice_ = Question(load_model_config("llama-3-8b"), DECODE), parse_slice("v5e:4x4")
    found = [every_mesh(question, slice_, budget)[0] for budget in (1, 300, None)]
    left, scores = [left_out(report) for report in found], [report.best.score for report in found]
    assert left[0] > 0
    assert left[2] == 0
    assert scores == sorted(scores, reverse=True)
    assert found[0].best.score == every_mesh(question, slice_, 1)[0].best.score  # counted in candidates, it ends in the same place
    assert main([*ASKED, "--slice", "v5e:16x16", "--format", "json"]) == 0
    refused = json.loads(capsys.readouterr().out)["refused"]
    assert any("beyond the budget of" in one["reason"] for one in refused)


def test_by_default_a_finer_mesh_is_chosen_where_it_is_faster_by_more_than_a_tie(capsys: pytest.CaptureFixture[str]) -> None:
    model, workload = load_model_config("llama-3-70b"), Workload(64, 1984, 64, weights=DType.INT8)
    question, slice_ = Question(model, workload), parse_slice("v5e:16x16")
    own, chosen = answer(question, slice_), fastest(question, slice_)
    assert chosen.best.score * TIE < own.best.score
    assert chosen.slice.mesh != slice_.mesh
    assert plan(model, slice_, workload, finer=True).slice == chosen.slice
    assert plan(model, slice_, workload).slice == slice_
    simple = Question(load_model_config("opt-13b"), Workload(32, context_len=1024, phase="decode")), parse_slice("v5e:4x4")
    every = every_mesh(*simple)[0]
    assert every.slice.mesh != simple[1].mesh  # faster, but no more than a tie
    assert fastest(*simple).slice == simple[1]
    assert fastest(*simple).best.score <= TIE * every.best.score
    flags = ["--model", "llama-3-70b", "--slice", "v5e:16x16", "--batch", "64", "--input", "1984", "--output", "64", "--weights", "int8"]
    assert main(["plan", *flags, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"] == chosen.slice.mesh
    assert main(["plan", *flags, "--mesh", "16x16", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"] == slice_.mesh
