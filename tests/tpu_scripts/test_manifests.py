"""The Kubernetes manifests that are printed or stand in docs/ are valid by the published schemas, and the plan arrives in the pod."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from partinf.cli import main
from tests.tpu_scripts.support import HERE

SCHEMAS = json.loads((HERE / "kubernetes_schemas.json").read_text())
GKE = {"image": "an/image:1", "context": "my-cluster"}


def closed(schema: Any) -> Any:
    """The schema with unknown keys refused, as kubectl refuses them, which validates strictly."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def offences(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest."""
    schema = closed(SCHEMAS[manifest["kind"]])
    schema["properties"]["metadata"] = closed(SCHEMAS["Service"]["properties"]["metadata"])  # a CRD leaves it to Kubernetes
    return [f"{list(error.instance_path)}: {error.message}" for error in jsonschema_rs.validator_for(schema).iter_errors(manifest)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plans") / "plan.toml"
    words = ["--model", "demo", "--slice", "v5e-16", "--batch", "8", "--input", "16", "--output", "8", "--save", str(file)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["plan", *words, "--format", "json"]) == 0
    return file


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["launch", "--manifest", "--run-id", "r1", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"command": None, "model": "gs://my-bucket/some/llama", "gke": {**GKE, "service_account": "reader"}},
        {"command": None, "model": "/in/the/image"},
        {"spot": True, "retries": 0},
    ],
)
def test_the_jobset_is_valid(plan: Path, cloud, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]) -> None:
    description = cloud.describe(**{"type": None, "gke": GKE, **changes})
    jobset = printed(capsys, "--plan", str(plan), "--description", str(description))
    assert offences(jobset) == []
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    container = pod["spec"]["containers"][0]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert ("readinessProbe" in container) == ("serve" in container["command"])


def test_what_is_wrong_is_found(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The schemas see values of other types, keys that are not known and keys that are missing, deep in the pod too."""
    jobset = printed(capsys, "--plan", str(plan))
    assert offences(jobset) == []
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    spec["parallelism"] = "4"
    container["readynessProbe"] = container.pop("readinessProbe")
    del container["name"]
    assert len(offences(jobset)) == 3


def test_a_plan_alone_gives_a_jobset_that_serves_it(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On four hosts of a v5e-16; only the first has clients, and is ready when it can answer."""
    jobset = printed(capsys, "--plan", str(plan))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert (job["parallelism"], job["completions"]) == (4, 4)
    words = "python -m partinf serve --plan partinf-plan.toml --max-num-seqs 8 --max-model-len 24 --multi-host --host 0.0.0.0 --port 8000"
    assert container["command"] == words.split()
    ready = container["readinessProbe"]["exec"]["command"]
    codes = []
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # an image has a `python`, this machine perhaps not
    for index in ("0", "3"):  # nothing listens here
        env = {**os.environ, "PATH": path, "JOB_COMPLETION_INDEX": index}
        codes.append(subprocess.run(ready, env=env, stderr=subprocess.DEVNULL).returncode)
    assert codes == [1, 0]


def test_the_plan_arrives_in_the_pod(plan: Path, cloud, capsys: pytest.CaptureFixture[str]) -> None:
    description = cloud.describe(type=None, gke=GKE, command=["cat", "partinf-plan.toml"])
    assert cloud.pod("gke", description, "--run-id", "r1", "--plan", str(plan)) == 0
    logs = (cloud.folder / "my results" / "my-run-r1" / "logs.txt").read_text().splitlines()
    assert [line.removeprefix("[pod/0] ") for line in logs if line.startswith("[pod/0] ")] == plan.read_text().splitlines()


def test_manifests_in_docs_are_valid(root: Path) -> None:
    texts = [path.read_text() for path in sorted((root / "docs").glob("*.md"))]
    manifests = [
        each for text in texts for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) for each in yaml.safe_load_all(block)
    ]
    assert {each["kind"] for each in manifests} == {"Service"}
    assert [offences(each) for each in manifests] == [[]] * len(manifests)


def test_descriptions_in_docs_are_right(root: Path, plan: Path, cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """Each launches a plan, and gives a manifest where it says what a cluster needs."""
    found = {
        path.stem: block for path in (root / "docs").glob("*.md") for block in re.findall(r"```toml\n(.*?)```", path.read_text(), re.DOTALL)
    }
    assert {"serve-v5e-16", "serve-gke"} <= found.keys()
    for name in ("serve-v5e-16", "serve-gke"):
        file = cloud.repository / f"{name}.toml"
        file.write_text(found[name])
        words = ["launch", "--plan", str(plan), "--description", str(file), "--run-id", "a"]
        assert main([*words, "--dry-run"]) == 0
        assert "--model weights/llama-3-8b --max-num-seqs 8" in capsys.readouterr().out
    assert main([*words, "--manifest"]) == 0
    jobset = json.loads(capsys.readouterr().out)
    assert offences(jobset) == []
    (service,) = yaml.safe_load_all(re.findall(r"```yaml\n(.*?)```", (root / "docs" / "serve-gke.md").read_text(), re.DOTALL)[0])
    assert service["spec"]["selector"]["jobset.sigs.k8s.io/jobset-name"] == jobset["metadata"]["name"]
    assert cloud.calls == []
