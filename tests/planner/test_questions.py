"""Questions that users plan for, one command each: will it fit, how long does a prompt take, where does a context end."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from partinf.cli import main
from partinf.cost.calibration import calibration_for
from partinf.hardware.chips import chips
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner import search
from partinf.workload import Workload


def test_will_llama_3_70b_fit_v6e_8(capsys: pytest.CaptureFixture[str]) -> None:
    """bf16, contexts of 32k, batch 16: 141 GB of weights and 172 GB of KV on eight chips of 33.6 GB."""
    flags = ["--model", "llama-3-70b", "--slice", "v6e-8", "--batch", "16", "--context", "32768", "--phase", "decode"]
    assert main(["plan", *flags]) == 0
    found = capsys.readouterr()
    assert "model llama-3-70b does not fit v6e:2x4" in found.out
    lines = found.out.splitlines()
    assert any("weights and KV in int8" in line and "fits" in line for line in lines)
    assert any("slice v6e:4x4" in line and "fits" in line for line in lines)
    assert "model llama-3-70b has a context of 8192 tokens" in found.err
    assert main(["plan", *flags, "--weights", "int8", "--kv", "int8", "--format", "json"]) == 0
    memory = json.loads(capsys.readouterr().out)["best"]["hbm_bytes_per_device"]
    assert memory["total"] <= memory["usable"]


def test_prefill_of_a_prompt_of_100k_tokens_on_v5p_8(capsys: pytest.CaptureFixture[str]) -> None:
    """`v5p-8` is four chips: the number counts cores."""
    flags = ["--slice", "v5p-8", "--phase", "prefill", "--input", "100000"]
    assert main(["plan", "--model", "llama-3-8b", *flags]) == 0
    found = capsys.readouterr()
    assert "llama-3-8b on v5p:2x2x1" in found.out
    assert "requests of 100000 tokens; model llama-3-8b has a context of 8192 tokens" in found.err
    assert "The first token of a single prompt takes" in found.out
    assert main(["plan", "--model", "llama-3-8b", *flags, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    seconds = report["best"]["step_seconds"]
    assert report["first_token_seconds"] == pytest.approx(seconds)
    products, core = 2 * 8.03e9 * 100_000, 2 * 32 * 4096 * 100_000**2  # of the weights, and of attention that sees what came before
    kernel = calibration_for(chips()["v5p"]).prompt_share  # of the peak, with mask, exponential and sums of every score
    assert 1.0 < seconds / ((products + core / kernel) / (4 * 459e12)) < 3.0


def test_first_token_of_one_prompt_and_prefill_of_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "llama-3-8b", "--slice", "v5e-8", "--batch", "16", "--input", "512", "--output", "64"]
    assert main(["plan", *flags]) == 0
    assert "The first token of a single prompt takes" in (out := capsys.readouterr().out)
    assert "prefilling 16 prompts together takes" in out
    workload = Workload(16, 512, 64)
    report = search(load_model_config("llama-3-8b"), parse_slice("v5e-8"), workload)
    alone = report.first_token_seconds(report.best)
    together = report.best.phase("prefill")
    assert alone is not None
    assert together is not None
    assert together.step_seconds / 16 < alone < together.step_seconds
    one = replace(report, question=replace(report.question, workload=replace(workload, prefill_batch=1)))
    assert one.first_token_seconds(report.best) == alone
    decode = search(report.model, report.slice, Workload(16, context_len=512, phase="decode"))
    assert decode.first_token_seconds(decode.best) is None


def test_a_shape_that_no_cloud_rents_is_planned_for_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "llama-3-8b", "--phase", "decode", "--context", "512", "--top", "1"]
    assert main(["plan", "--slice", "v5e:2x1", *flags]) == 0
    found = capsys.readouterr()
    assert "llama-3-8b on v5e:2x1" in found.out
    assert found.err == "partinf: note: slice v5e:2x1: no cloud rents v5e in this shape; the nearest in size are v5e:1x1 or v5e:2x2\n"
    for rented in ("v5e:2x2", "v5e:4x2", "v5litepod-4", "h100x8"):
        assert main(["plan", "--slice", rented, *flags]) == 0
        assert capsys.readouterr().err == ""
    assert (
        main(["simulate", "--model", "llama-3-8b", "--slice", "v4:2x2x8", "--layout", "ws-1d", "--requests", "1", "--lengths", "fixed:8:2"])
        == 0
    )
    assert "no cloud rents v4 in this shape" in capsys.readouterr().err
