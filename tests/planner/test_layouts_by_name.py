"""Layouts that are named: on slices with other axes, side by side, and in the library; and what is wrong with their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import partinf
from partinf.cli import main
from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import load_layout, make_layout
from partinf.model.load import load_model_config
from partinf.planner.question import Question
from partinf.planner.report import answer
from partinf.planner.search import given
from partinf.plans import Plan, layout_for
from partinf.workload import Workload

ASKED = ["plan", "--model", "llama-3-8b", "--slice", "v5e-8", "--batch", "8", "--input", "256", "--output", "64"]


def on(name: str, slice_: str, mesh: str | None = None) -> Layout:
    return layout_for(parse_slice(slice_, mesh), load_layout(name))


def test_a_layout_of_three_axes_on_two() -> None:
    assert on("ws-2d", "v5e:4x4") == make_layout({"x": "embed", "y": "ffn"}, {"x": "batch", "y": "batch"}, {"x": "heads", "y": "heads"})
    assert on("long-context", "v5e:4x4").decode.attention == load_layout("llama-3-70b-long-context").decode.attention
    assert dict(on("stages", "v5e:4x4").storage) == {"x": "stage", "y": "ffn"}


def test_factors_of_an_axis_and_axes_that_the_layout_does_not_know() -> None:
    layout = on("ws-2d", "v5e:4x4", "x0:2,x1:2,y:4")
    assert dict(layout.storage) == {"x0": "embed", "x1": "embed", "y": "ffn"}
    layout = on("wg-xy", "tpu7x:2x2x1")
    assert dict(layout.storage) == {"x": "embed", "y": "ffn", "z": "ffn", "core": "ffn"}
    assert layout.prefill.gather == ("x", "y")
    layout = on("ws-2d", "h200:8", "a:2,b:4")
    assert dict(layout.storage) == {"a": "embed", "b": "ffn"}


def test_what_holds_for_a_whole_phase_is_kept() -> None:
    """Whatever a phase says besides roles of axes: here that of a layout for three axes, on two and on four."""
    for phase in ("prefill", "decode"):
        given = load_layout("palm-540b-low-latency").phase(phase)
        for slice_ in ("v5e:4x4", "tpu7x:2x2x1"):
            kept = on("palm-540b-low-latency", slice_).phase(phase)
            assert (kept.ahead, kept.whole) == (given.ahead, given.whole)


def test_a_layout_of_the_slices_own_axes_stays_as_it_is() -> None:
    for name in resources.names("layouts"):
        layout = load_layout(name)
        slice_ = parse_slice("v4:4x4x4" if len(layout.axes) == 3 else "v5e:4x4")
        assert layout_for(slice_, layout) is layout


def test_every_shipped_layout_applies_or_says_what_it_needs() -> None:
    """Under every shape of up to 16 chips that can be rented, in one line."""
    applied = 0
    for name in resources.names("layouts"):
        layout = load_layout(name)
        for slice_ in map(parse_slice, ("v5e-1", "v5e-16", "v6e-8", "v5p-8", "v4-32", "tpu7x-8", "h100x8", "cpu:2x2", "h200:8")):
            try:
                found = layout_for(slice_, layout)
            except InvalidInput as error:
                (line,) = error.offences
                assert "it needs a mesh of at least as many axes" in line
                assert slice_.name in line
            else:
                applied += 1
                assert found.axes == tuple(slice_.axis_sizes)
                assert {role for _, role in found.storage} == {role for _, role in layout.storage}
    assert applied > 70


@pytest.mark.parametrize(
    ("name", "slice_", "words"),
    [
        ("ws-2d", "h200:8", "layout of 2 kinds of axes (x · y z): it needs a mesh of at least as many axes, and h200:8 has 1 (x:8)"),
        ("wg-xy", "v5e-16", "layout of 3 kinds of axes (x · y · z)"),
        ("ws-1d", "v5e-16*2", "no role for axis dcn, the network between the slices of v5e:4x4*2"),
    ],
)
def test_a_slice_with_too_few_axes_is_named_in_a_line(name: str, slice_: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "llama-3-8b", "--slice", slice_, "--layout", name]
    for command in (["plan", "--input", "64", "--output", "8"], ["explain", "--input", "64"], ["simulate", "--requests", "2"]):
        assert main([*command, *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


def test_the_library_takes_names_of_layouts_and_slices(tmp_path: Path) -> None:
    named = partinf.plan("llama-3-8b", "v5litepod-8", layout="ws-2d")
    assert named.slice == parse_slice("v5e:2x4")
    assert named.layout == on("ws-2d", "v5e:2x4")
    file = tmp_path / "mine.toml"
    file.write_text((resources.find("layouts", "ws-2d")).read_text())
    for layout in (file, str(file), load_layout("ws-2d")):
        assert partinf.plan("llama-3-8b", "v5e-8", layout=layout).layout == named.layout
    with pytest.raises(InvalidInput, match="did you mean 'ws-2d'"):
        partinf.plan("llama-3-8b", "v5e-8", layout="ws-2f")


def test_a_named_layout_is_priced_as_the_search_prices_it() -> None:
    """Every candidate of a search, given by its roles, has the same figures; the best of them is the best of those given."""
    question = Question(load_model_config("llama-3-8b"), Workload(8, 256, 64))
    for workload in (question.workload, Workload(8, context_len=256, phase="decode"), Workload(8, 256, phase="prefill")):
        same = Question(question.model, workload)
        found = answer(same, parse_slice("v5e:2x4"))
        some = found.candidates[:: max(1, len(found.candidates) // 20)]
        again = given(same, found.slice, [(candidate.layout, candidate.padded_heads) for candidate in some])
        for mine, other in zip(again, some, strict=True):
            assert mine.score == pytest.approx(other.score, rel=1e-9)
            assert (mine.memory, mine.meets_bound) == (other.memory, other.meets_bound)
            assert mine.main.ledger.seconds == pytest.approx(mine.main.step_seconds)


def test_two_layouts_of_my_own_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = {
        "one": '[axes]\nx = "ffn"\ny = "ffn"\n[decode]\nattention = { x = "heads", y = "heads" }\n',
        "two": '[axes]\nx = "embed"\ny = "ffn"\n[decode]\nattention = { x = "batch", y = "heads" }\n',
    }
    files = []
    for name, text in mine.items():
        (tmp_path / f"{name}.toml").write_text(text)
        files += ["--layout", str(tmp_path / f"{name}.toml")]
    assert main([*ASKED, *files, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    compared = report["comparison"]
    assert [layout["name"] for layout in compared["layouts"]] == files[1::2]
    assert [layout["layout"][:7] for layout in compared["layouts"]] == ["E F_xy,", "E_x F_y"]
    assert len(report["candidates"]) == 2
    for phase in ("prefill", "decode"):
        rows = [row for row in compared["entries"] if row["phase"] == phase]
        for index, layout in enumerate(compared["layouts"]):
            assert sum(row["seconds"][index] for row in rows) == pytest.approx(layout["step_seconds"][phase])
        assert all(row["difference"][0] == row["seconds"][1] - row["seconds"][0] for row in rows)
    assert main([*ASKED, *files]) == 0
    assert "Side by side" in capsys.readouterr().out


def test_one_layout_is_planned_for_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.toml"
    assert main([*ASKED, "--layout", "ws-1d", "--save", str(file)]) == 0
    out = capsys.readouterr().out
    assert "1 role assignment\n" in out
    assert "Side by side" not in out
    assert load_layout(str(file)).storage == on("ws-1d", "v5e-8").storage


def test_every_typo_of_every_layout_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text('[axes]\nx = "fnn"\ny = "ffn"\n[decode]\nattention = { x = "haeds", y = "heads" }\n')
    second.write_text('[axes]\nx = "ffn"\ny = "ffn"\n[decode]\ngathr = ["x"]\nattention = { x = "heads", y = "heads" }\n')
    assert main([*ASKED, "--layout", str(first)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "unknown role 'fnn'; did you mean 'ffn'" in lines[0]
    assert "unknown role 'haeds'; did you mean 'heads'" in lines[1]
    assert main([*ASKED, "--layout", str(first), "--layout", str(second), "--layout", "ws-9d"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(str(file) in " ".join(lines) for file in (first, second))
    assert "did you mean 'ws-" in lines[3]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--slice", "auto:v5e", "--max-latency-ms", "100"], "a layout is priced on one slice and mesh"),
        (["--slice", "v5e-8", "--mesh", "auto"], "a layout is priced on one slice and mesh"),
        (["--slice", "v5e-8", "--layout", "ws-1d"], "--layout ws-1d: given more than once"),
        (["--slice", "v5e-8", "--model", "palm-62b", "--layout", "nowhere.toml"], "no such file"),
    ],
)
def test_bad_input(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = [] if "--model" in flags else ["--model", "llama-3-8b"]
    assert main(["plan", *model, "--batch", "8", "--input", "64", "--layout", "ws-1d", *flags]) == 2
    assert any(words in line for line in capsys.readouterr().err.splitlines())


def test_a_layout_that_cannot_hold_the_model_says_which() -> None:
    with pytest.raises(InvalidInput, match="d_model"):
        Plan(load_model_config("gpt3-13b"), parse_slice("cpu:3"), layout_for(parse_slice("cpu:3"), load_layout("ws-1d")))
