"""`partinf score`: likely text scores higher, in JSON and as a table, and bad input is named."""

from __future__ import annotations

import json

import pytest

from partinf.cli import main


def test_right_answers_score_higher(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["--text", "sort: d b a c = a b c d", "--text", "sort: d b a c = a b d c"]
    assert main(["score", "--model", "demo", "--slice", "cpu:2x2x2", "--max-len", "64", *texts, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    right, wrong = (score["logprobs"] for score in report["scores"])
    assert sum(right[-4:]) > -0.5
    assert sum(wrong[-4:]) < -3
    assert report["num_tokens"] == len(right) + len(wrong)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--model", "demo", "--slice", "cpu:2x2x2", "--max-len", "64", "--text", "copy: a b c = a b c"]) == 0
    out = capsys.readouterr().out
    assert "copy: a b c = a b c" in out
    assert "chip-ms per token" in out


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--model", "demo", "--texts", "no-such-file", "--layout", "ws-9d", "--max-len", "-1"]) == 2
    errors = capsys.readouterr().err
    assert [word in errors for word in ("no such file", "unknown layout 'ws-9d'", "--max-len -1")] == [True] * 3
