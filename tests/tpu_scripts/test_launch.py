"""From a saved plan to a run: `partinf launch`, and a partinf command through the scripts as two worker processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from partinf.cli import main
from tests.tpu_scripts.support import HERE, SCRIPTS, git

WORKLOAD = ["--model", "demo", "--batch", "8", "--input", "16", "--output", "8"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plans") / "a plan.toml"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["plan", *WORKLOAD, "--slice", "v4:2x2x2", "--save", str(file), "--format", "json"]) == 0
    return file


def test_a_plan_alone_shows_its_commands(plan: Path, cloud, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (root / ".git").exists():
        pytest.skip("it shows how this checkout's commit is sent, and this is no checkout")
    assert main(["launch", "--plan", str(plan), "--dry-run", "--run-id", "r1"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("gcloud compute tpus queued-resources create run-demo-r1 --project=your-project --zone=your-zone1-a ")
    assert "--accelerator-type=v4-16" in lines[0]
    assert any("partinf-plan.toml" in line and " scp " in line for line in lines)
    assert " delete " in lines[-1]
    assert "placeholders for project, zone, time_to_live" in printed.err
    assert cloud.calls == []


def test_a_plan_alone_gives_a_manifest_and_does_not_run(plan: Path, cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--plan", str(plan), "--manifest", "--run-id", "r1"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "JobSet"
    assert main(["launch", "--plan", str(plan)]) == 2
    assert "--description is missing" in capsys.readouterr().err
    assert cloud.calls == []


def test_a_plan_gives_the_type_and_is_served_and_its_slice_must_be_the_types(plan: Path, cloud, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--plan", str(plan), "--dry-run", "--description"]
    assert main(["launch", *flags, str(cloud.describe(type=None, command=None))]) == 0
    served = "python -m partinf serve --plan partinf-plan.toml --max-num-seqs 8 --max-model-len 24 --multi-host'"
    assert served in capsys.readouterr().out
    assert main(["launch", *flags, str(cloud.describe(type=None, command=None, model="/weights/mine"))]) == 0
    printed = capsys.readouterr().out
    assert "serve --plan partinf-plan.toml --model /weights/mine --max-num-seqs 8" in printed
    assert "--served-model-name demo" in printed
    assert main(["launch", *flags, str(cloud.describe(type="v4-8"))]) == 2
    assert "type 'v4-8' is v4:2x2x1, but the plan is for v4:2x2x2" in capsys.readouterr().err


def test_a_model_of_a_bucket_is_copied_to_the_workers_and_read_in_place_by_pods(
    plan: Path, cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    described = {"type": None, "command": None, "gke": {"image": "an/image:1"}}
    flags = ["--plan", str(plan), "--description", str(cloud.describe(**described, model="gs://my-bucket/models/llama/"))]
    assert main(["launch", *flags, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (setup,) = [line for line in lines if "partinf_worker.sh setup" in line]
    assert "mkdir -p weights && gcloud storage cp --recursive gs://my-bucket/models/llama weights/" in setup
    assert "echo prepared >> prepared" in setup  # the description's own
    assert any("serve --plan partinf-plan.toml --model weights/llama --max-num-seqs 8" in line for line in lines)
    assert main(["launch", *flags, "--manifest"]) == 0
    pod = json.loads(capsys.readouterr().out)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    words = pod["spec"]["containers"][0]["command"]
    assert words[words.index("--model") + 1] == "/weights/models/llama"
    (volume,) = [volume for volume in pod["spec"]["volumes"] if "csi" in volume]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    assert pod["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert main(["launch", "--plan", str(plan), "--description", str(cloud.describe(**described, model="gs://my-bucket"))]) == 2
    assert "model = 'gs://my-bucket': expected gs://BUCKET/FOLDER" in capsys.readouterr().err
    assert cloud.calls == []


def test_no_machine_is_paid_for_without_something_to_run(cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither for a simulation, nor for a model whose weights cannot be found."""
    plans = {}
    for model in ("llama-3-8b", "palm-8b"):
        plans[model] = tmp_path / f"{model}.toml"
        flags = ["--slice", "v5e-16", "--phase", "decode", "--batch", "8", "--context", "64", "--format", "json"]
        assert main(["plan", "--model", model, *flags, "--save", str(plans[model])]) == 0
    capsys.readouterr()
    here = ["--description", str(cloud.describe(type=None, command=None))]
    assert main(["launch", "--plan", str(plans["llama-3-8b"]), *here]) == 2
    assert "'model' is missing: where the weights of llama-3-8b lie that are to be served" in capsys.readouterr().err
    for more in (here, ["--dry-run"], ["--manifest"]):
        assert main(["launch", "--plan", str(plans["palm-8b"]), *more]) == 2
        printed = capsys.readouterr().err
        assert "'command' is missing: what every worker runs; the plan cannot be served, because weights of palm-8b" in printed
    both = cloud.describe(type=None, model="/weights", wait="x")
    assert main(["launch", "--plan", str(plans["llama-3-8b"]), "--description", str(both)]) == 2
    printed = capsys.readouterr().err
    assert "model '/weights': it belongs to a plan that is served" in printed
    assert "wait = 'x'" in printed
    assert main(["launch", "--plan", str(plans["llama-3-8b"]), "--description", str(cloud.describe(type=None, command=None, model=3))]) == 2
    assert "model = 3: expected str" in capsys.readouterr().err
    assert cloud.calls == []


def test_a_plan_for_what_is_no_tpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.toml"
    assert main(["plan", *WORKLOAD, "--slice", "cpu:2x2", "--save", str(file), "--format", "json"]) == 0
    capsys.readouterr()
    assert main(["launch", "--plan", str(file), "--dry-run"]) == 2
    assert "slice 'cpu:2x2': no TPU type gives it" in capsys.readouterr().err


def test_partinf_runs_on_two_workers_as_it_runs_here(plan: Path, cloud, root: Path) -> None:
    """What is sent is a commit of this checkout's own files, and every worker runs it from there with the plan that was sent along."""
    checkout = cloud.folder / "a checkout"
    for name in ("partinf", "models", "layouts"):
        shutil.copytree(root / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    git(checkout, "init", "--quiet")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message", "all")
    (checkout / "partinf" / "__init__.py").write_text("raise SystemExit('not the commit')\n")

    words = ["simulate", "--model", "demo", "--slice", "v4:2x2x2", "--layout", "partinf-plan.toml", "--requests", "8", "--kv-pages", "64"]
    words += ["--format", "json"]
    description = cloud.describe(repository=str(checkout), command=["python", "-m", "partinf", *words])
    assert main(["launch", "--plan", str(plan), "--description", str(description), "--run-id", "r1", *_quick(cloud)]) == 0
    local = subprocess.run(
        [sys.executable, "-m", "partinf", *[str(plan) if word == "partinf-plan.toml" else word for word in words]],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = _without_wall_time(local.stdout)
    assert expected["requests"]
    for worker in range(2):
        assert _without_wall_time(cloud.result("r1", worker, "stdout")) == expected
    assert cloud.state["machines"] == {}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A repository of this checkout's own files, weights of the demo model among them, and an experiment."""
    folder = tmp_path_factory.mktemp("an experiment") / "a checkout"
    for name in ("partinf", "models", "layouts"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (root / "experiments" / "on_a_pod" / "demo.toml").read_text()
    assert "rounds = 5" in text
    (folder / "demo.toml").write_text(text.replace("rounds = 5", "rounds = 0"))
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


def test_the_demo_experiment_on_a_pod_gives_what_it_gives_here(checkout: Path, cloud) -> None:
    """Two workers are one mesh: tokens and all else that follows from the description are those of this process with its eight devices."""
    from partinf.experiment.description import read_experiment
    from partinf.experiment.execute import execute
    from partinf.experiment.result import deterministic

    output = cloud.folder / "result.json"
    flags = ["--on", "pod", "--description", str(cloud.describe(repository=str(checkout), command=None)), "--run-id", "r1"]
    flags += ["--pod-output", str(cloud.folder / "my results"), "--poll-seconds", "0.5", "--output", str(output)]
    assert main(["run", str(checkout / "demo.toml"), *flags]) == 0
    assert cloud.state["machines"] == {}
    found = json.loads(output.read_text())
    assert (found["where"]["processes"], found["where"]["devices"]) == (2, 8)
    here = json.loads(json.dumps(execute(read_experiment(checkout / "demo.toml"))))
    assert deterministic(found) == deterministic(here)
    assert all(request["tokens"] for request in found["requests"])


def test_an_experiment_that_is_not_sent_is_refused(checkout: Path, cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--on", "pod", "--description", str(cloud.describe(repository=str(checkout), command=None)), "--dry-run"]
    elsewhere = tmp_path / "demo.toml"
    shutil.copy(checkout / "demo.toml", elsewhere)
    assert main(["run", str(elsewhere), *flags]) == 2
    assert "is not in the repository that is sent" in capsys.readouterr().err
    changed = checkout / "changed.toml"
    changed.write_text((checkout / "demo.toml").read_text().replace("cpu:2x2x2", "v4:2x2x1"))
    assert main(["run", str(changed), *flags]) == 2
    printed = capsys.readouterr().err
    assert "its slice is v4:2x2x1, and v4-16 of" in printed
    assert "is not in commit HEAD as it is here" in printed
    assert main(["run", str(checkout / "demo.toml"), *flags]) == 0
    assert "python -m partinf run demo.toml --on worker" in capsys.readouterr().out
    assert cloud.calls == []


def _quick(cloud) -> list[str]:
    return ["--output", str(cloud.folder / "my results"), "--poll-seconds", "0.5"]


def _without_wall_time(text: str) -> dict:
    return {key: value for key, value in json.loads(text).items() if key != "wall_seconds"}


def test_shell_is_clean() -> None:
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert shellcheck is not None
    done = subprocess.run([shellcheck, *map(str, SCRIPTS.glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_fakes_accept_names_its_reference_pages() -> None:
    table = tomllib.loads((HERE / "accepted_commands.toml").read_text())
    assert all(row["source"].startswith(("https://cloud.google.com/", "https://kubernetes.io/")) for row in table.values())


@pytest.mark.parametrize(
    "words",
    [
        ["gcloud", "compute", "tpus", "queued-resources", "make", "x"],
        ["gcloud", "compute", "tpus", "queued-resources", "create", "x", "--project=p", "--zone=z", "--max-run-duration=1h"],
        ["gcloud", "compute", "tpus", "queued-resources", "delete", "x", "--zone=z"],
        ["kubectl", "apply", "--filename=x"],
    ],
)
def test_the_fakes_refuse_what_they_do_not_know(cloud, words: list[str]) -> None:
    assert subprocess.run(words, env=cloud.environment, capture_output=True).returncode != 0
