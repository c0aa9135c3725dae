"""`partinf generate` as a user runs it, and every kind of bad input that it is given."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from partinf import api
from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.cli import main
from partinf.cli.model_place import ModelPlace
from partinf.foundation import resources

FIXTURE = Path(__file__).parent.parent / "fixtures" / "llama_gqa"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    code = main(["generate", *arguments])
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.startswith("partinf: error:")]


def test_it_continues_prompts_over_eight_devices(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "demo", "--slice", "cpu:2x2x2", "--max-tokens", "16", "--max-len", "64")
    code, out, _ = run(capsys, *arguments, "--prompt", "sort: d b a c =", "--prompt", "repeat: 5 k =")
    assert code == 0
    assert out == "sort: d b a c = a b c d\nrepeat: 5 k = k k k k k\n"


def test_json_says_how_it_ran(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("copy: a b c =\n\nreverse: a b c =\n")
    arguments = ("--model", str(resources.find("models", "demo")), "--slice", "cpu:4x2", "--max-len", "64", "--stop", " b")
    code, out, _ = run(capsys, *arguments, "--prompts", str(prompts), "--format", "json")
    report = json.loads(out)
    assert code == 0
    assert [output["text"] for output in report["outputs"]] == [" a", " c"]
    assert report["slice"] == "cpu:4x2"
    assert report["programs"] == 2  # of three: no prompt is cut


def test_a_model_without_a_tokenizer_takes_and_gives_token_ids(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A text ends at the tokens that its files name; text is refused, whatever else is wrong with the line."""
    demo = resources.find("models", "demo")
    bare = Path(shutil.copytree(demo, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    prompt = ", ".join(map(str, load_tokenizer(demo).encode("sort: d b a c =")))
    where = ("--slice", "cpu:2x2x2", "--max-len", "64")
    code, out, _ = run(capsys, "--model", str(bare), *where, "--max-tokens", "16", "--prompt", prompt)
    assert code == 0
    ids = [int(word) for word in out.split(",")]
    assert load_tokenizer(demo).decode(ids) == "sort: d b a c = a b c d"
    assert ids[-1] == 2
    code, _, errors = run(capsys, "--model", str(bare), *where, "--prompt", "1, 5", "--prompt", "sort:", "--prompt", "-3")
    assert (code, len(errors)) == (2, 2)
    assert errors[0].endswith("text 2 is 'sort:'; no tokenizer is in its directory, so token ids are needed, such as 1, 17, 5")
    assert run(capsys, "--model", str(bare), *where, "--prompt", "1, 500")[0] == 2
    assert main(["score", "--model", str(bare), *where, "--text", prompt, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["scores"][0]["logprobs"]) == len(prompt.split(",")) - 1


STAGED = """
[axes]
x = "stage"
y = "ffn"

[decode]
gather = []
attention = { x = "none", y = "heads" }
"""


@pytest.mark.slow
def test_three_pipeline_stages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    layout = tmp_path / "staged.toml"
    layout.write_text(STAGED)
    arguments = ("--model", "demo", "--slice", "cpu:3x2", "--layout", str(layout), "--max-len", "64")
    code, out, _ = run(capsys, *arguments, "--max-tokens", "16", "--prompt", "sort: d b a c =", "--prompt", "repeat: 5 k =")
    assert code == 0
    assert out == "sort: d b a c = a b c d\nrepeat: 5 k = k k k k k\n"
    traffic = ["--arrivals", "backlog", "--requests", "12", "--lengths", "fixed:6:5", "--scheduler", "fcfs-chunked", "--format", "json"]
    assert main(["bench", *arguments[:-2], *traffic]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["requests"] == {"finished": 12, "refused": 0}
    assert figures["compiled_while_serving"] == 0
    assert main(["score", *arguments, "--text", "sort: d b a c ="]) == 2
    assert "not scored in 3 pipeline stages" in capsys.readouterr().err


def test_a_text_ends_at_what_any_file_of_the_model_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, names = tmp_path / "model", tmp_path / "model" / "generation_config.json"
    shutil.copytree(resources.find("models", "demo"), model)
    names.write_text('{"eos_token_id": 3}')
    with monkeypatch.context() as patched:
        patched.setattr(
            api, "load", lambda *_, **__: SimpleNamespace(tokenizer=load_tokenizer(model), runner=SimpleNamespace(needed_bytes=0))
        )
        place = ModelPlace.__new__(ModelPlace)
        place.args = Namespace(model=str(model))
        assert place.load(api.plan("demo", "cpu:1")).tokenizer.eos_ids == {2, 3}
    assert "\na text ends at 2 </s>, 3 <pad>: all that generation_config.json, config.json, the tokenizer name\n" in capsys.readouterr().err
    names.write_text('{"eos_token_id": 200}')
    assert main(["generate", "--model", str(model), "--slice", "cpu:1", "--prompt", "sort: d b a c ="]) == 2
    assert "generation_config.json: eos_token_id holds 200, which is no token; the ids are 0 to 95" in capsys.readouterr().err


BAD = [
    (["--model", "dmo", "--prompt", "x", "--top-p", "2", "--slice", "v4:3x3x3", "--layout", "ws-9d"], 4, "did you mean 'demo'"),
    (["--model", "llama-3-8b", "--prompt", "x"], 1, "comes without weights"),
    (["--model", "demo", "--prompts", "no-such-file"], 1, "no such file"),
    (["--model", "demo", "--prompt", "copy: " + "a " * 130 + "="], 1, "the longest prompt is 127"),
    (["--model", "demo", "--prompt", "x", "--max-len", "4096"], 1, "a context of 128 tokens"),
    (["--model", "demo", "--prompt", "x", "--temperature", "-1", "--max-tokens", "0"], 2, "temperature = -1.0"),
]


@pytest.mark.parametrize(("arguments", "lines", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_gets_one_line_per_offence(capsys: pytest.CaptureFixture[str], arguments: list[str], lines: int, message: str) -> None:
    code, out, errors = run(capsys, *arguments)
    assert code == 2
    assert len(errors) == lines
    assert message in "\n".join(errors)
    assert out == ""


def broken(tmp_path: Path, kind: str) -> Path:
    directory = tmp_path / "broken"
    shutil.copytree(FIXTURE, directory)
    weights = next(directory.glob("*.safetensors"))
    if kind == "config":
        (directory / "config.json").unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "shape":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((64, 64), np.float32)
        save_file(tensors, weights)
    return directory


@pytest.mark.parametrize(("kind", "message"), [
    ("config", "no config.json"),
    ("truncated", "truncated"),
    ("shape", "model.layers.1.mlp.down_proj.weight"),
])  # fmt: skip
def test_broken_checkpoints_are_named_before_any_device(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str, message: str
) -> None:
    code, _, errors = run(capsys, "--model", str(broken(tmp_path, kind)), "--prompt", "x")
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]
    if kind == "shape":
        assert "(64, 64)" in errors[0]
        assert "(64, 128)" in errors[0]


def test_heads_that_do_not_divide_get_valid_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    layout = tmp_path / "layout.toml"
    layout.write_text('[axes]\nx = "ffn"\n\n[decode]\nattention = { x = "heads" }\n')
    code, _, errors = run(capsys, "--model", "demo", "--prompt", "x", "--slice", "cpu:16", "--layout", str(layout))
    assert code == 2
    assert any("query heads H = 8 does not divide over x:16" in line and "sizes that divide 16 ways" in line for line in errors)
