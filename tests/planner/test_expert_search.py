"""The search over roles for experts: what it passes over could not have been better."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from partinf.cli import main
from partinf.cost.items import WX_IN, WX_OUT
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout import ExpertRole, Layout, experts_name
from partinf.layout.files import make_layout
from partinf.model.config import Activation, ModelConfig
from partinf.model.kinds import Experts, FeedForward
from partinf.planner.candidates import Stored, expert_roles
from partinf.planner.expert_storage import expert_offence
from partinf.planner.options import BestSoFar, Bounds, Options
from partinf.planner.question import Question
from partinf.planner.report import search
from partinf.planner.results import Candidate
from partinf.planner.search import Search, given, order
from partinf.planner.show.as_json import report_json
from partinf.planner.show.explain import explain
from partinf.planner.show.json_text import report_text
from partinf.workload import DType, Workload

EACH = FeedForward(768, True, Activation.SILU, ())
MODEL = ModelConfig("mixed", 8, 1024, 0, 8, 4, 128, 4096, experts=Experts(32, 4, EACH))
BESIDE = ModelConfig("shared", 8, 1024, 0, 8, 4, 128, 4096, experts=Experts(32, 4, EACH, shared=1024))
WORKLOADS: dict[str, dict[str, Any]] = {
    "a small batch": {"batch": 2, "context_len": 512, "phase": "decode"},
    "a large batch": {"batch": 512, "context_len": 128, "phase": "decode"},
    "prompts": {"batch": 16, "input_len": 512, "phase": "prefill"},
    "both phases": {"batch": 32, "input_len": 256, "output_len": 64},
}


def found(model: ModelConfig, slice_: str, cut: float | None, **workload: Any) -> tuple[Candidate, ...]:
    search = Search(Question(model, Workload(**workload)), parse_slice(slice_))
    search.space.cut = cut
    return order(search.candidates())


QUICK = ("mixed", "prompts"), ("mixed", "both phases"), ("shared", "both phases")
CASES = [
    pytest.param(model, workload, marks=[] if (model.name, workload) in QUICK else [pytest.mark.slow], id=f"{model.name}, {workload}")
    for model in (MODEL, BESIDE)
    for workload in WORKLOADS
]


@pytest.mark.parametrize(("model", "workload"), CASES)
def test_what_is_passed_over_is_no_better_than_all_assignments(model: ModelConfig, workload: str) -> None:
    where = "v6e:1x4" if workload == "both phases" else "v6e:2x2"
    every, near = (found(model, where, cut, **WORKLOADS[workload])[0] for cut in (None, 1.1))
    assert near.score == pytest.approx(every.score, rel=1e-12)
    assert near.fits


def test_a_candidate_has_the_figures_of_its_layout_and_can_be_one() -> None:
    question = Question(MODEL, Workload(batch=32, input_len=256, output_len=64))
    for candidate in found(MODEL, "v6e:2x2", 1.1, batch=32, input_len=256, output_len=64)[:20]:
        assert candidate.layout.offences() == []
        (again,) = given(question, parse_slice("v6e:2x2"), [(candidate.layout, candidate.padded_heads)])
        assert again.score == pytest.approx(candidate.score, rel=1e-9)
        assert again.memory == candidate.memory


@pytest.mark.parametrize("model", [MODEL, BESIDE, replace(MODEL, name="dense", experts=None, ffn_dim=4096)], ids=lambda model: model.name)
def test_no_step_takes_less_than_its_floor(model: ModelConfig) -> None:
    """What ends a search lies below every price, whatever is gathered and wherever rows go, and is worth something."""
    search, ratios = Search(Question(model, Workload(batch=2, context_len=512, phase="decode")), parse_slice("v5e:2x4"), BestSoFar(1.1)), []
    every = [Stored(one, roles) for one in search.storages for roles in (expert_roles(search.table, one) if model.experts else [()])]
    for storage in every[1 :: 41 if model.experts else 5]:
        if not model.experts or not expert_offence(model, storage.experts, search.table.sizes):
            bounds = Bounds(search.space, storage, "decode")
            floors = {gather: floor for floor, gather in bounds.floors()}
            ratios += [floors[one.option.gather] / one.priced.seconds for one in Options(search.space, storage, "decode", bounds)]
    assert 0.75 < max(ratios) <= 1 + 1e-9


def test_a_split_of_the_experts_and_one_of_their_d_ff_are_each_held_against_the_other() -> None:
    def note(model: ModelConfig, slice_: str, **workload: Any) -> str:
        return search(model, parse_slice(slice_), Workload(**workload)).plan.note

    few, many = "splitting the experts over all their axes", "splitting d_ff over all their axes"
    wide = replace(MODEL, experts=Experts(32, 4, replace(EACH, width=6144)))
    assert re.search(rf"; {few} is [\d.]+% slower", note(wide, "v6e:1x4", batch=1, context_len=512, phase="decode"))
    narrow = replace(MODEL, experts=Experts(128, 8, replace(EACH, width=512)))
    assert re.search(rf"; {many} is [\d.]+% slower", note(narrow, "v6e:1x4", batch=512, context_len=128, phase="decode"))
    odd = replace(wide, experts=replace(wide.experts, count=6, per_token=2))
    impossible = f"; {few} is impossible (experts X = 6 does not split into 4 parts)"
    assert impossible in note(odd, "v6e:1x4", batch=1, context_len=512, phase="decode")


def test_a_table_tells_layouts_apart_that_differ_in_how_rows_reach_experts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    words = ["--model", "qwen-3-30b-a3b", "--slice", "v5e:2x4", "--phase", "prefill", "--batch", "7", "--input", "777", "--top", "2"]
    assert main(["plan", *words]) == 0
    printed = capsys.readouterr().out
    gathered, exchanged = (next(line for line in printed.splitlines() if line.startswith(f"{row}  E F, copies over x")) for row in (1, 2))
    assert ", exchanged " in exchanged
    assert "exchanged" not in gathered
    assert re.search(r"experts read for [\d,]+ rows", printed)


def test_advice_says_from_which_batch_experts_are_busy() -> None:
    report = search(MODEL, parse_slice("v6e:1x4"), Workload(batch=4, context_len=512, phase="decode"))
    advice = report.batch_advice
    assert advice is not None
    of = advice.experts
    assert of is not None
    chance = 1 - (1 - 4 / 32) ** 4
    assert of.hit == pytest.approx(32 * chance)
    assert of.rows == pytest.approx(4 * 4 / (32 * chance))
    assert 1 - (1 - 4 / 32) ** of.all_hit >= 0.95 > 1 - (1 - 4 / 32) ** (of.all_hit - 1)
    assert of.busy == pytest.approx(of.critical * 32 / 4, abs=1)
    assert advice.critical == of.busy
    assert report_json(report)["batch_advice"]["experts"]["busy"] == of.busy
    assert "are busy" in str(of)
    dense = search(replace(MODEL, experts=None, ffn_dim=2048), parse_slice("v6e:1x4"), report.workload).batch_advice
    assert dense is not None
    assert dense.experts is None


def test_a_skew_is_part_of_the_question_and_of_its_answer() -> None:
    workload = Workload(batch=4, context_len=512, phase="decode")
    uniform, skewed = (search(MODEL, parse_slice("v6e:1x2"), workload, skew=skew) for skew in (0.0, 1.2))
    assert skewed.best.score < uniform.best.score  # few tokens of popular experts read fewer of them
    assert report_json(skewed)["routing_skew"] == 1.2
    for report in (uniform, skewed):  # as text, in which what candidates share is encoded once
        data = report_json(report, {1: {"fits": True}}) | {"price": "1"}
        assert report_text(report, {1: {"fits": True}}, {"price": "1"}) == json.dumps(data, separators=(",", ":"))
    assert uniform.question != skewed.question
    assert "skew=1.2" in repr(skewed.question)
    assert (skewed.routing, uniform.routing) == (", routers skewed by 1.2", "")
    dense = replace(MODEL, experts=None, ffn_dim=2048)
    for model, skew, words in (
        (dense, 1.2, "has no experts"),
        (MODEL, -1.0, "from 0"),
        (MODEL, float("nan"), "from 0"),
        (MODEL, 9.0, "to 3"),
    ):
        with pytest.raises(InvalidInput, match=words):
            search(model, parse_slice("v6e:1x2"), workload, skew=skew)


@pytest.mark.parametrize("command", ["plan", "explain", "simulate"])
def test_a_skew_is_refused_for_a_model_without_experts_and_out_of_range(capsys: pytest.CaptureFixture[str], command: str) -> None:
    words = [command, "--slice", "v6e:2x2", "--model"]
    assert main([*words, "llama-3-8b", "--routing-skew", "1.2"]) == 2
    assert "--routing-skew 1.2: model llama-3-8b has no experts" in capsys.readouterr().err
    assert main([*words, "qwen-3-30b-a3b", "--routing-skew", "4"]) == 2
    assert capsys.readouterr().err.count("--routing-skew 4: a number is needed, from 0 to 3") == 1


@pytest.mark.parametrize(
    ("where", "experts"), [("v6e:1x1", (8, 2)), ("v6e:2x2", (1, 1)), ("v6e:2x2", (4, 4)), ("v5e:2x4", (4, 2)), ("h100:7", (8, 2))]
)
def test_odd_numbers_of_experts_and_chips_have_a_plan(where: str, experts: tuple[int, int]) -> None:
    """One chip, one expert, every expert for every token, more chips than experts, chips that do not divide them."""
    model = replace(MODEL, experts=Experts(*experts, EACH))
    report = search(model, parse_slice(where), Workload(batch=8, context_len=128, phase="decode"))
    assert report.best.fits
    assert report.plan.layout.offences() == []
    assert "Expected per layer and device" in report.plan.note


def _everywhere(dense: str, experts: str, attention: str) -> Layout:
    return make_layout(*(dict.fromkeys("xy", role) for role in (dense, attention)), experts=dict.fromkeys("xy", experts))


def test_roles_for_experts_take_turns_with_the_batch() -> None:
    """One token reads its experts from all devices where d_ff is split, and from the devices that have them where experts are; what does
    not fit whole is split some way."""
    big = ModelConfig("big", 16, 2048, 0, 16, 8, 128, 4096, experts=Experts(128, 8, EACH))
    few = found(big, "v6e:2x2", 1.1, batch=1, context_len=512, phase="decode")[0]
    assert ExpertRole.EXPERT not in few.layout.expert_roles.values()
    question = Question(big, Workload(batch=1, context_len=512, phase="decode"))
    by_expert, by_width = given(question, parse_slice("v6e:2x2"), [(_everywhere("ffn", role, "heads"), 0) for role in ("expert", "ffn")])
    assert few.score <= by_width.score < by_expert.score


def test_experts_that_do_not_divide_are_refused_with_their_reason() -> None:
    odd = ModelConfig("odd", 2, 1024, 0, 8, 4, 128, 4096, experts=Experts(6, 2, EACH))
    search = Search(Question(odd, Workload(batch=8, context_len=128, phase="decode", weights=DType.BF16)), parse_slice("v6e:2x2"))
    assert search.candidates()
    assert "experts X = 6 does not split into 4 parts" in search.refused


def test_a_report_names_the_roles_for_experts_and_says_what_others_cost() -> None:
    narrow = replace(MODEL, experts=Experts(32, 4, replace(EACH, width=512)))
    report = search(narrow, parse_slice("v6e:1x4"), Workload(batch=32, input_len=256, output_len=64))
    best = report.best
    assert "experts X" in best.name
    assert experts_name(best.layout, {"x": 1, "y": 4}) in ("X_y", "F_y", "E_y", "X")
    data = report_json(report)["best"]
    assert data["experts"] == {axis: role.value for axis, role in best.layout.experts}
    assert set(data["phases"]["decode"]) >= {"gather_experts", "dispatch"}
    routed = [entry["routed"] for entry in data["phases"]["decode"]["ledger"] if "routed" in entry]
    assert routed[0]["hit"] <= routed[0]["most_hit"] <= 32
    note = report.plan.note
    assert "Expected per layer and device" in note
    assert "splitting d_ff over all their axes" in note
    split = report.evaluator.split(best.layout, "decode", best.padded_heads)
    lines = [line.what for section in explain(split, best.main.ledger) for line in section.lines]
    assert "× router" in lines


def test_skewed_routers_slow_a_split_of_the_experts_and_leave_that_of_d_ff() -> None:
    """Many prompts, whose rows hit all experts however they are routed: what counts is the fullest device."""
    layouts = [(_everywhere("ffn", role, "heads"), 0) for role in ("expert", "ffn")]
    question = Question(MODEL, Workload(batch=64, input_len=1024, phase="prefill"))
    uniform, skewed = (given(replace(question, skew=skew), parse_slice("v6e:2x2"), layouts) for skew in (0.0, 1.2))
    by_expert, by_width = ([_products(one) for one in pair] for pair in zip(uniform, skewed, strict=True))
    assert by_expert[1] > 1.3 * by_expert[0]
    assert by_width[1] == pytest.approx(by_width[0], rel=0.01)


def _products(candidate: Candidate) -> float:
    """Seconds of products with experts' matrices."""
    return sum(entry.exposed_seconds for entry in candidate.main.ledger.entries if entry.item in (WX_IN.product, WX_OUT.product))
