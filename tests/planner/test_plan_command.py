"""`partinf plan` and `partinf explain` as a user calls them: the JSON's fields, saved files, and bad input, all offences at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from partinf.cli import main
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.planner.curves import front
from partinf.planner.files import plan_from_toml
from partinf.planner.show.work import by_work
from partinf.workload import Workload
from tests.cli.words import with_flags

PALM = ["--model", "palm-540b", "--slice", "v4:4x4x4", "--batch", "64", "--weights", "int8"]
DECODE = [*PALM, "--phase", "decode", "--context", "2048"]
CANDIDATE = {
    "layout": str,
    "roles": dict,
    "fits": bool,
    "tie_with_best": bool,
    "hbm_bytes_per_device": dict,
    "step_seconds": float,
    "seconds_per_token": float,
    "tokens_per_second": float,
    "mfu": float,
    "chip_ms_per_token": float,
    "ffn": str,
    "attention": str,
    "phases": dict,
}
PHASE = {
    "gather": list,
    "attention_roles": dict,
    "ffn": str,
    "attention": str,
    "step_seconds": float,
    "mfu": float,
    "collectives": list,
    "ledger": list,
}


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["plan", *arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def has_fields(value: dict[str, object], fields: dict[str, type]) -> None:
    for key, kind in fields.items():
        assert isinstance(value[key], kind), key


@pytest.mark.parametrize("phases", [["decode"], ["prefill"], ["prefill", "decode"]], ids=" ".join)
def test_json_fields(capsys: pytest.CaptureFixture[str], phases: list[str]) -> None:
    lengths = ["--input", "1024", "--output", "64"]
    words = ["--phase", phases[0]] if len(phases) == 1 else []
    report = planned(capsys, "--model", "llama-3-8b", "--slice", "v5e:2x4", "--batch", "8", *lengths, *words)
    assert {"model", "slice", "workload", "best", "candidates"} <= report.keys()
    assert report["best"] == report["candidates"][0]
    for candidate in report["candidates"]:
        has_fields(candidate, CANDIDATE)
        assert list(candidate["phases"]) == phases
        memory = candidate["hbm_bytes_per_device"]
        assert memory["total"] == memory["weights"] + memory["kv"] + memory["activations"]
        assert candidate["fits"] == (memory["total"] <= memory["usable"])
        for phase in candidate["phases"].values():
            has_fields(phase, PHASE)
            assert all(set(line) >= {"op", "axes", "bytes", "count", "seconds"} for line in phase["collectives"])
            exposed = sum((line["seconds"] - line.get("overlapped", 0.0)) * line["count"] for line in phase["ledger"])
            assert exposed == pytest.approx(phase["step_seconds"])
        assert candidate["step_seconds"] == candidate["phases"][phases[-1]]["step_seconds"]


def test_figures_of_the_requested_phase(capsys: pytest.CaptureFixture[str]) -> None:
    best = planned(capsys, *DECODE)["best"]
    step = best["step_seconds"]
    assert best["tokens_per_second"] == pytest.approx(64 / step)
    assert best["chip_ms_per_token"] == pytest.approx(1e3 * 64 * step / 64)
    assert best["mfu"] == pytest.approx(2 * 540.36e9 * 64 / (64 * 275e12 * step), rel=1e-3)
    assert best["seconds_per_token"] == step


def test_the_papers_layout_within_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    """A 2D weight-stationary FFN with batch-sharded attention is first or within 5 % of it, without jax."""
    code = (
        "import sys\nfrom partinf.cli import main\n"
        f"main({['plan', *DECODE, '--format', 'json']!r})\nassert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    wanted = next(c for c in report["candidates"] if c["ffn"] == "ws-2d" and c["attention"] == "batch")
    assert wanted["tie_with_best"]
    assert wanted["step_seconds"] <= 1.05 * report["best"]["step_seconds"]


def test_table_and_saved_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    assert main(["plan", *PALM, "--input", "1984", "--output", "64", "--save", str(file)]) == 0
    out = capsys.readouterr().out
    assert "Chosen:" in out
    assert "Memory |" in out
    saved = plan_from_toml(file.read_text(), str(file))
    assert saved.model.name == "palm-540b"
    assert saved.slice.name == "v4:4x4x4"
    assert main(["explain", *DECODE, "--layout", str(file)]) == 0
    assert "decode step" in capsys.readouterr().out


def test_explain_chooses_for_the_program_that_is_requested(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "palm-8b", "--slice", "v5p:2x2x1", "--phase", "decode", "--batch", "128", "--context", "128", "--weights", "int8"]
    chosen = []
    for program in ("looped", "tiled"):
        assert main(["plan", *flags, "--program", program, "--format", "json"]) == 0
        chosen.append(json.loads(capsys.readouterr().out)["best"]["layout"])
        assert main(["explain", *flags, "--program", program, "--layout", "auto"]) == 0
        assert capsys.readouterr().out.splitlines()[0].endswith(f": {chosen[-1]}")
    assert chosen[0] != chosen[1]


def test_explain_in_the_papers_notation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *DECODE, "--layout", "ws-2d", "--program", "looped"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("all-gather(y)", "B L E_x", "B L F_yz {x unreduced}", "B_xyz L H Q", "reduce-scatter(x)", "all-to-all(xyz)"):
        assert words in out, words


BAD = {
    "unknown model": (["--model", "palm-540"], "did you mean 'palm-540b'"),
    "impossible slice": (["--slice", "v4:4x4x3"], "no torus axis of 3 chips"),
    "unknown chip": (["--slice", "v9:4x4"], "unknown chip 'v9'"),
    "batch 0": (["--batch", "0"], "batch = 0"),
    "batch that is no number": (["--batch", "many"], "--batch many: a whole number"),
    "negative context": (["--context", "-5"], "context = -5"),
    "unknown phase": (["--phase", "encode"], "phase = 'encode'"),
    "unknown type": (["--weights", "int9"], "--weights int9"),
    "unknown objective": (["--objective", "speed"], "--objective speed"),
    "impossible bound": (["--max-latency-ms", "0"], "it must be positive"),
    "bound without number": (["--max-latency-ms", "fast"], "--max-latency-ms fast"),
    "unknown format": (["--format", "xml"], "--format xml"),
    "unknown bandwidth model": (["--bandwidth-model", "none"], "--bandwidth-model none"),
    "unknown calibration": (["--calibration", "some"], "--calibration some"),
    "too many axes": (["--mesh", "x0:2,x1:2,y0:2,y1:2,z:4"], "at most 4 axes can be searched"),
    "unknown mesh": (["--mesh", "x:8,y:4,z:4"], "must multiply to 4"),
    "nowhere for a page": (["--html", "/nowhere/plan.html"], "there is no directory /nowhere"),
    "nowhere to save": (["--save", "/nowhere/plan.toml"], "there is no directory /nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(capsys: pytest.CaptureFixture[str], name: str) -> None:
    flags, words = BAD[name]
    assert main(["plan", *with_flags(DECODE, *flags)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]


def test_all_offences_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [flag for name in ("unknown model", "impossible slice", "batch 0", "negative context", "unknown type") for flag in BAD[name][0]]
    assert main(["plan", *with_flags(DECODE, *flags)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_explain_says_how_heads_are_padded(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--slice", "v4:4x4x4", "--phase", "decode", "--batch", "64", "--context", "2048", "--layout", "ws-2d"]
    assert main(["explain", "--model", "palm-62b", *flags]) == 0
    assert "query heads are padded from 32 to 64: 8590 M parameters more (13.7%)" in capsys.readouterr().out
    assert main(["explain", "--model", "palm-540b", *with_flags(flags, "--batch", "32")]) == 0
    found = capsys.readouterr()
    assert "padded from 48 to 64" in found.out
    assert found.err == ""


def test_lengths_beyond_the_models_context_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "llama-3-8b", "--slice", "v5e:2x2", "--phase", "decode", "--context", "9000"]
    for command in (["plan", "--top", "1"], ["explain"]):
        assert main([*command, *flags]) == 0
        assert "requests of 9000 tokens; model llama-3-8b has a context of 8192 tokens" in capsys.readouterr().err
    assert main(["plan", *flags[:-1], "8192", "--top", "1"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("prompt", "output", "served"), [(1, 131071, "1:8191"), (8000, 8000, "4096:4096"), (131071, 1, "8191:1")])
def test_a_server_is_proposed_for_as_much_of_a_load_as_the_models_context_holds(
    prompt: int, output: int, served: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["--input", str(prompt), "--output", str(output), "--batch", "2"]
    assert main(["plan", "--model", "llama-3-8b", "--slice", "v5e:2x4", "--top", "1", *load]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"--max-model-len 8192 --arrivals poisson:1 --lengths fixed:{served}" in printed


def test_what_no_layout_can_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "palm-540b", "--slice", "cpu:5", "--phase", "decode", "--context", "8"]) == 0
    assert main(["explain", *with_flags(DECODE, "--slice", "h200:8"), "--layout", "ws-2d"]) == 2
    assert "it needs a mesh of at least as many axes, and h200:8 has 1 (x:8)" in capsys.readouterr().err


def test_plot_of_the_ledgers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "ledgers.svg"
    assert main(["plan", *PALM, "--input", "1984", "--output", "64", "--top", "3", "--plot", str(file)]) == 0
    drawn = file.read_text()
    for words in ("activation collectives", "prefill step", "decode step", "wg-xy"):
        assert words in drawn, words
    report = search(load_model_config("llama-3-8b"), parse_slice("v5e:2x4"), Workload(8, context_len=1024, phase="decode"))
    for result in report.best.phases:
        assert sum(by_work(result.ledger).values()) == pytest.approx(result.step_seconds)


def test_plots_of_the_front_and_the_volumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "front.svg"
    small = ["plan", "--model", "llama-3-8b", "--slice", "v5e:2x2", "--phase", "decode", "--context", "512"]
    assert main([*small, "--plot", str(file), "--plot-kind", "front"]) == 0
    assert "latency against cost" in file.read_text()
    report = search(load_model_config("llama-3-8b"), parse_slice("v5e:2x2"), Workload(1, context_len=512, phase="decode"))
    points = front(report)
    best = [point for point in points if point.on_front]
    assert points[0] in best
    for point in points:
        assert any(b.seconds <= point.seconds and b.chip_ms_per_token <= point.chip_ms_per_token for b in best)
    file = tmp_path / "volume.svg"
    assert main(["plan", *DECODE, "--plot", str(file), "--plot-kind", "volume"]) == 0
    assert "wg-xyz" in file.read_text()
    assert main([*small, "--plot", str(file), "--plot-kind", "volumes"]) == 2
    assert "did you mean 'volume'" in capsys.readouterr().err


def test_page_that_needs_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    assert main(["plan", *PALM, "--input", "1984", "--output", "64", "--top", "3", "--html", str(file)]) == 0
    text = file.read_text()
    shown = re.sub(r"<sub>(\w+)</sub>", r"_\1", text)
    for words in ("E_x F_yz", "Memory of a device", "prefill step, line by line", "B L F_yz {x unreduced}", "Largest batch worth decoding"):
        assert words in shown, words
    assert not re.search(r"<(script|img|link)|https?://|url\(", text)
    small = ["--slice", "v4:2x2x2", "--phase", "decode", "--context", "8", "--format", "json"]
    assert main(["plan", "--model", "palm-540b", *small, "--html", str(file)]) == 0
    text = file.read_text()
    assert "Nothing fits" in text
    assert "weights in int8: " in text


def test_what_keeps_a_plot_from_being_drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", *DECODE, "--plot", "/nowhere/plot.bmp"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "partinf[plot]" in lines[0]
    assert ".png, .svg, .pdf" in lines[1]
    assert "no directory /nowhere" in lines[2]
