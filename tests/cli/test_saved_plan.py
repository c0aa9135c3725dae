"""From a plan to a service: the saved plan is what is served, and what `simulate --as-served` plays is the engine that would serve."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import pytest

from partinf import api
from partinf.buckets import runner_limits
from partinf.cli import main, serve, simulate
from partinf.cli.flags import Flags, register
from partinf.cli.model_place import ModelPlace
from partinf.cli.served_engine import ServedEngine
from partinf.engine.runner import RunnerLimits
from partinf.planner.files import plan_from_toml

WORKLOAD = ["--batch", "8", "--input", "24", "--output", "8", "--weights", "f32", "--kv", "f32"]
LOAD = ["--arrivals", "poisson:20", "--lengths", "fixed:24:8", "--requests", "30", "--format", "json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plans") / "plan.toml"
    assert main(["plan", "--model", "demo", "--slice", "cpu:2x2", *WORKLOAD, "--save", str(file), "--format", "json"]) == 0
    return file


def flags_of(command: object, *words: str) -> Flags:
    parser = argparse.ArgumentParser()
    register(parser)
    command.add_arguments(parser)  # type: ignore[attr-defined]
    return Flags(parser.parse_args(words))


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--max-num-seqs", "6", "--max-model-len", "96", "--max-num-batched-tokens", "40"),
        ("--scheduler", "mlfq", "--no-enable-prefix-caching", "--lag", "0", "--max-waiting", "3"),
    ],
)
@pytest.mark.parametrize("where", [("--slice", "cpu:2x2", "--layout", "auto"), ("--plan", "PLAN")])
def test_the_simulated_engine_is_the_one_that_is_served(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: tuple[str, ...], more: tuple[str, ...]
) -> None:
    """Plan with its pool and its padded steps, policy and bounds: equal from the same flags, and the runner's limits with them."""
    words = ["--model", "demo", *(str(saved) if word == "PLAN" else word for word in where), *more]
    flags = flags_of(serve, *words)
    served, place = ServedEngine.read(flags), ModelPlace(flags)
    engines: list[tuple[ServedEngine, RunnerLimits]] = []
    plans = []
    monkeypatch.setattr(ServedEngine, "plan", lambda self, place, make=ServedEngine.plan: plans.append(make(self, place)) or plans[-1])
    made = ServedEngine.engine
    monkeypatch.setattr(
        ServedEngine, "engine", lambda self, runner, *a, **b: engines.append((self, runner.limits)) or made(self, runner, *a, **b)
    )
    plan = served.plan(place)
    capsys.readouterr()
    assert main(["simulate", "--as-served", *words, *LOAD]) == 0
    assert plans[1] == plan
    assert engines == [(served, runner_limits(plan))]
    found = json.loads(capsys.readouterr().out)
    assert found["as_served"] is True
    assert found["kv_tokens"] == plan.cache.pages_per_shard * plan.num_shards * plan.cache.page_size
    assert found["requests"]["finished"] + found["requests"]["refused"] == 30


def test_requests_beyond_the_servers_bound_are_refused_in_the_simulation_too(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "demo", "--slice", "cpu:2", "--max-num-seqs", "2", "--max-model-len", "64", "--max-waiting", "3"]
    assert (
        main(["simulate", "--as-served", *words, "--arrivals", "backlog", "--lengths", "fixed:8:8", "--requests", "20", "--format", "json"])
        == 0
    )
    requests = json.loads(capsys.readouterr().out)["requests"]
    assert requests["finished"] + requests["refused"] == 20
    assert requests["refused"] >= 20 - 2 - 3


def test_a_saved_plan_is_served_whole(saved: Path, tmp_path: Path) -> None:
    """Not only its roles: also from how many tokens on prefill's roles hold, and how things are stored."""
    text = saved.read_text()
    changed = tmp_path / "changed.toml"
    changed.write_text("".join("prefill_from_tokens = 77\n" if line.startswith("prefill_from") else line for line in text.splitlines(True)))
    flags = flags_of(serve, "--plan", str(changed))
    plan = ServedEngine.read(flags).plan(ModelPlace(flags))
    kept = plan_from_toml(changed.read_text(), "changed")
    assert flags.args.model == "demo"
    assert (plan.model, plan.slice, plan.layout, plan.weights, plan.kv) == (kept.model, kept.slice, kept.layout, kept.weights, kept.kv)
    assert plan.prefill_from_tokens == 77
    assert plan.note.startswith("A decode step takes ")  # why this layout, which serve says when it loads the model


def test_the_model_may_lie_elsewhere_than_when_the_plan_was_made(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "moved.toml"
    moved.write_text(saved.read_text().replace('model = "demo"', 'model = "was/here/once"'))
    assert main(["simulate", "--plan", str(moved), *LOAD]) == 2
    assert "was/here/once" in capsys.readouterr().err
    directory = api.weights_directory("demo")
    assert main(["simulate", "--as-served", "--plan", str(moved), "--model", str(directory), *LOAD]) == 0


@pytest.mark.parametrize("command", ["serve", "generate", "simulate"])
def test_flags_that_repeat_the_plan_are_refused(saved: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--prompt", "x"] if command == "generate" else []
    words = ["--plan", str(saved), "--slice", "cpu:2", "--mesh", "2", "--layout", "ws-1d", "--weights", "int8", "--kv", "int8"]
    assert main([command, *words, *more]) == 2
    printed = capsys.readouterr().err
    for flag in ("--slice cpu:2", "--mesh 2", "--layout ws-1d", "--weights int8", "--kv int8"):
        assert f"{flag}: --plan {saved} says that already" in printed


@pytest.mark.parametrize("command", ["serve", "generate", "simulate"])
def test_a_model_or_a_plan_is_needed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--slice", "cpu:2", *(["--prompt", "x"] if command == "generate" else [])]) == 2
    assert capsys.readouterr().err == "partinf: error: --model is missing: a model, or --plan FILE, a saved plan that names one\n"
    assert main([command, "--plan", "not-there.toml", *(["--prompt", "x"] if command == "generate" else [])]) == 2
    assert capsys.readouterr().err == "partinf: error: plan not-there.toml: no such file\n"


def test_flags_of_the_other_kind_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--model", "demo", "--slice", "cpu:2"]
    wrong = ["--max-batch", "4", "--prefix-caching", "--page-size", "8", "--eviction", "recompute"]
    assert main(["simulate", "--as-served", *place, *wrong, "--max-num-seqs", "0", "--max-num-batched-tokens", "1"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert "partinf: error: --max-batch: serve has no such flag, it has --max-num-seqs; leave out either it or --as-served" in printed
    assert "partinf: error: --max-num-seqs 0: a whole number is needed, from 1 to 1,048,576" in printed
    assert len(printed) == 6
    assert main(["simulate", *place, "--max-num-seqs", "4", "--no-enable-prefix-caching"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "partinf: error: --max-num-seqs: a flag of serve; it needs --as-served",
        "partinf: error: --enable-prefix-caching: a flag of serve; it needs --as-served",
    ]


def test_help_is_declared_once() -> None:
    """The flags of the engine are the same in both commands."""
    for name in ("--max-num-seqs", "--max-waiting-tokens", "--enable-prefix-caching"):
        actions = []
        for command in (serve, simulate):
            parser = argparse.ArgumentParser()
            command.add_arguments(parser)
            actions += [action for action in parser._actions if name in action.option_strings]
        assert (actions[0].help, actions[0].default) == (actions[1].help, actions[1].default)


@pytest.mark.parametrize(
    "model,more",
    [
        ("demo", ["--slice", "cpu:2x2", "--batch", "4", "--input", "24", "--output", "8"]),
        ("DIRECTORY", ["--slice", "h100:4", "--batch", "8", "--input", "16", "--output", "16"]),
        ("DIRECTORY", ["--slice", "h100:4", "--phase", "decode", "--batch", "8", "--context", "33"]),
        ("llama-3-8b", ["--slice", "v5e-16", "--phase", "prefill", "--batch", "2", "--input", "8192"]),
    ],
)
def test_a_plan_ends_with_commands_that_work(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, more: list[str]
) -> None:
    """For a shipped model, for a Hugging Face directory on four GPUs, and for an architecture whose weights lie elsewhere."""
    model = model.replace("DIRECTORY", str(root / "tests" / "fixtures" / "llama_gqa"))
    file = str(tmp_path / "my plan.toml")
    assert main(["plan", "--model", model, *more, "--save", file]) == 0
    served, simulated = (shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  partinf "))
    assert main(["plan", "--model", model, *more, "--save", file, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["commands"] == {"serve": served, "simulate": simulated}
    assert main([*simulated[1:], "--requests", "3", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == {"finished": 3, "refused": 0}
    assert ("--multi-host" in served) == ("v5e-16" in more)
    words = [word.replace("path/to/llama-3-8b", "llama-3-8b") for word in served[2:]]
    flags = flags_of(serve, *words)
    plan = ServedEngine.read(flags).plan(ModelPlace(flags, runs=False))
    assert found["kv_tokens"] == plan.cache.pages_per_shard * plan.num_shards * plan.cache.page_size
    kept = plan_from_toml(Path(file).read_text(), file)
    assert (plan.slice, plan.layout, plan.prefill_from_tokens) == (kept.slice, kept.layout, kept.prefill_from_tokens)


def test_a_plan_that_cannot_be_served_or_fits_nowhere_offers_no_service(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--phase", "decode", "--batch", "8", "--context", "64"]
    assert main(["plan", "--model", "palm-8b", "--slice", "v5e-16", *words]) == 0
    printed = capsys.readouterr().out
    assert "  partinf serve" not in printed
    assert "(it cannot be served: weights of palm-8b come in no form that is read):\n  partinf simulate --as-served" in printed
    assert main(["plan", "--model", "palm-540b", "--slice", "v5e-1", *words]) == 0
    assert "  partinf " not in capsys.readouterr().out


def test_serve_chooses_a_layout_for_prompts_that_come_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A layout that was judged by the prefill of a whole batch splits prompts over the devices and pads a single one."""
    where, size = ["--model", "llama-3-8b", "--slice", "v5e-8"], ["--max-num-seqs", "16", "--max-model-len", "2048"]
    file = str(tmp_path / "plan.toml")
    assert main(["plan", *where, "--batch", "16", "--input", "1024", "--output", "1024", "--save", file, "--format", "json"]) == 0
    load = ["--arrivals", "poisson:2", "--lengths", "fixed:512:32", "--requests", "20", "--format", "json"]
    means = []
    for chosen in (where, ["--plan", file]):
        capsys.readouterr()
        assert main(["simulate", "--as-served", *chosen, *size, *load]) == 0
        means.append(json.loads(capsys.readouterr().out)["latency"]["ttft"]["mean"])
    assert means[0] < means[1] / 1.5
