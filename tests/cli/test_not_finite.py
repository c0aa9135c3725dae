"""Commands on weights that contain NaN: requests that meet it fail by name, all others are answered, and JSON stays JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.cli import main
from partinf.foundation import resources

SORT = "sort: d b a c ="
WHERE = ["--slice", "cpu:1", "--max-len", "24", "--format", "json"]


@pytest.fixture
def spoilt(tmp_path: Path) -> Callable[[str, object, float, type], str]:
    """The demo with one number of one tensor replaced, stored in some type."""

    def spoil(name: str, place: object, value: float, kind: type) -> str:
        directory = tmp_path / "spoilt"
        shutil.copytree(resources.find("models", "demo"), directory)
        np.dtype(ml_dtypes.bfloat16)  # known to numpy by now, which reads the demo's weights
        tensors = {key: tensor.astype(kind) for key, tensor in load_file(directory / "model.safetensors").items()}
        tensors[name][place] = value
        save_file(tensors, directory / "model.safetensors")
        return str(directory)

    return spoil


def strict(text: str) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found: dict = json.loads(text, parse_constant=refuse)
    return found


def test_a_token_whose_embedding_is_not_finite(spoilt: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    text = "copy: q a ="
    token = load_tokenizer(resources.find("models", "demo")).encode(text)[-3]
    model = ["--model", spoilt("model.embed_tokens.weight", (token, 0), np.nan, np.float32)]
    assert main(["generate", *model, *WHERE, "--max-tokens", "8", "--prompt", text, "--prompt", SORT, "--prompt", text]) == 1
    out, err = capsys.readouterr()
    bad, good, again = strict(out)["outputs"]
    assert (good["tokens"], good["finish_reason"]) == ([11, 12, 13, 14, 2], "stop")
    assert "error" not in good
    for output in (bad, again):
        assert (output["tokens"], output["text"], output["finish_reason"]) == ([], "", "failed")
        assert "NaN or infinite" in output["error"]
    assert "prompt 1: the model's logits after" in err
    assert "prompt 3: " in err
    assert "prompt 2" not in err
    assert main(["score", *model, *WHERE, "--text", text, "--text", SORT]) == 1
    out, err = capsys.readouterr()
    bad, good = strict(out)["scores"]
    assert bad["total"] is None
    assert "NaN or infinite" in bad["error"]
    assert good["total"] == sum(good["logprobs"]) < 0
    assert "text 1: " in err


@pytest.mark.slow
def test_a_norm_that_is_not_finite(spoilt: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", spoilt("model.norm.weight", 0, np.inf, np.float16)]
    assert main(["score", *model, *WHERE, "--text", SORT]) == 1
    (score,) = strict(capsys.readouterr().out)["scores"]
    assert (score["logprobs"], score["total"]) == ([], None)
    arrivals = ["--arrivals", "poisson:1000", "--requests", "3", "--lengths", "fixed:8:4"]
    assert main(["bench", *model, "--slice", "cpu:1", *arrivals, "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert strict(out)["failed"] == 3
    assert "3 requests failed" in err
