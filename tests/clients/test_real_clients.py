"""Clients of other projects against a server, each by its own commands, as docs/clients.md shows them."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from partinf.foundation.resources import find
from tests.clients.environments import REQUIREMENTS, environment

HERE = Path(__file__).parent
DEMO = find("models", "demo")
GUIDE = HERE.parents[1] / "docs/clients.md"


def run(client: str, *command: object, folder: Path, **variables: str) -> None:
    """A command of a client, which must succeed."""
    program, *arguments = map(str, command)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI_", "HF_"))}
    done = subprocess.run(
        [environment(client) / program, *arguments],
        env=kept | variables,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def run_documented(client: str, has: str, url: str, folder: Path, **changed: str) -> None:
    """The command of docs/clients.md that runs this program and has this argument, for this server, with some words changed."""
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.S)
    (block,) = [block for block in blocks if has in block]
    for old, new in {"http://127.0.0.1:8000": url, "models/demo": str(DEMO), **changed}.items():
        block = block.replace(old, new)
    words = shlex.split(block.replace("\\\n", " "))
    variables = dict(word.split("=", 1) for word in itertools.takewhile(re.compile(r"[A-Z_]+=").match, words))
    run(client, *words[len(variables) :], folder=folder, **variables)


def tasks(count: int, seed: int) -> list[tuple[str, str]]:
    """Letters to be sorted, and what is right."""
    rng = random.Random(seed)
    letters = [rng.sample("abcdefghijklmnopqrstuvwxyz", 5) for _ in range(count)]
    return [(f"sort: {' '.join(each)} =", f" {' '.join(sorted(each))}") for each in letters]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_the_guide_names_the_versions_that_are_run() -> None:
    table = {row.split("`")[1]: row for row in GUIDE.read_text().splitlines() if row.startswith("| `")}
    for client, (requirement, *_) in REQUIREMENTS.items():
        name, version = requirement.replace("[api]", "").split("==")
        assert version in table.pop(name) if not client.startswith("openai-") else version in table[name], client
    assert list(table) == ["openai"]


@pytest.mark.slow
@pytest.mark.parametrize("major", [1, 2, 3])
def test_openai(major: int, demo_url: str, rain_url: str, tmp_path: Path) -> None:
    run(f"openai-{major}", "python", HERE / "programs/openai_client.py", major, demo_url, rain_url, folder=tmp_path)


@pytest.mark.slow
def test_langchain(demo_url: str, rain_url: str, tmp_path: Path) -> None:
    run("langchain-openai", "python", HERE / "programs/langchain_client.py", demo_url, rain_url, folder=tmp_path)


@pytest.mark.slow
def test_inspect(demo_url: str, tmp_path: Path) -> None:
    shutil.copy(HERE / "programs/sorting.py", tmp_path)
    run_documented("inspect-ai", "inspect eval", demo_url, tmp_path)
    (log,) = (tmp_path / "logs").glob("*.json")
    found = json.loads(log.read_text())
    assert (found["status"], found["results"]["scores"][0]["metrics"]["accuracy"]["value"]) == ("success", 1)


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(demo_url: str, endpoint: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "tasks.jsonl", [{"prompt": prompt, "output_tokens_count": 16} for prompt, _ in tasks(60, 1)])
    run_documented("guidellm", "guidellm run", demo_url, tmp_path, **{"/v1/completions": endpoint})
    totals = [one["metrics"]["request_totals"] for one in json.loads((tmp_path / "report.json").read_text())["benchmarks"]]
    assert [(one["successful"], one["errored"], one["incomplete"]) for one in totals] == [(10, 0, 0)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_aiperf(demo_url: str, endpoint: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "tasks.jsonl", [{"text": prompt} for prompt, _ in tasks(40, 2)])
    run_documented("aiperf", "aiperf profile", demo_url, tmp_path, **{"--endpoint-type completions": f"--endpoint-type {endpoint}"})
    for concurrency in (1, 4):
        report = json.loads((tmp_path / f"found/concurrency_{concurrency}/profile_export_aiperf.json").read_text())
        assert (report["request_count"]["avg"], report.get("error_request_count", {"avg": 0})["avg"]) == (20, 0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, demo_url: str) -> Path:
    """The folder of lm-eval's tasks, their data and what it found over both endpoints."""
    folder = tmp_path_factory.mktemp("lm-eval")
    rng = random.Random(3)
    rows = []
    for prompt, right in tasks(12, 3):
        letters = right.split()
        rng.shuffle(letters)
        rows.append({"prompt": prompt, "endings": [right, f" {' '.join(letters)}"], "right": 0, "answer": right})
    write_lines(folder / "choices.jsonl", rows)
    write_lines(folder / "sorting.jsonl", rows)
    (folder / "tasks").mkdir()
    for task in (HERE / "tasks").glob("*.yaml"):
        (folder / "tasks" / task.name).write_text(task.read_text().replace("DATA", str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # of data sets
        run_documented("lm-eval", "--model local-completions", demo_url, folder)
        run_documented("lm-eval", "--model local-chat-completions", demo_url, folder)
    return folder


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_lm_eval_generates(measured: Path) -> None:
    for folder in ("plain", "chat"):
        found = samples(measured / folder, "partinf_sort")
        assert len(found) == 12
        assert [one["resps"][0][0].strip() for one in found] == [one["doc"]["answer"].strip() for one in found]


@pytest.mark.slow
def test_lm_evals_log_likelihoods_are_those_of_score(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sum over the ending, which is what it compares, and whether greedy generation would give it."""
    from partinf.checkpoint.tokenizer import load_tokenizer
    from partinf.cli import main

    found = samples(measured / "plain", "partinf_choice")
    assert len(found) == 12
    tokenizer = load_tokenizer(DEMO)
    texts = [one["doc"]["prompt"] + ending for one in found for ending in one["doc"]["endings"]]
    responses = [response[0] for one in found for response in one["resps"]]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    assert main(["score", "--model", "demo", "--slice", "cpu:1", "--texts", str(tmp_path / "texts.txt"), "--format", "json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    for text, (value, _), score in zip(texts, responses, scored["scores"], strict=True):
        length = len(tokenizer.encode(text)) - len(tokenizer.encode(re.sub("=.*", "=", text)))
        mine = math.fsum(score["logprobs"][-length:])
        assert abs(float(value) - mine) < 1e-4, text
    right = [str(greedy) for one in found for _, greedy in [one["resps"][0][0]]]
    assert right == ["True"] * 12
