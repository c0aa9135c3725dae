"""The same description as a GKE JobSet: the manifest, and a run that deletes it whatever happens.

The manifest is JSON, which kubectl takes as it takes YAML and in which no name needs quoting rules. Kubernetes restarts after a lost node
(`maxRestarts`) and ends what outlives its time (`activeDeadlineSeconds`), so nothing has to watch it from outside.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pod_commands import Command, Runner, Signals
from pod_deletion import Deletion, say
from pod_description import PLAN, Description
from pod_failures import reason

from partinf.foundation.errors import raise_offences

_POLLS_WITHOUT_ANSWER = 10
_PORT = 8000
_PLAN_KEY, _PLAN_FOLDER, _WEIGHTS_FOLDER = "partinf/plan", "/partinf", "/weights"
# All pods of a slice are made alike and process 0 alone has clients: the others are ready at once.
_READY = f"""test "$JOB_COMPLETION_INDEX" != 0 || python -c 'import urllib.request as r; r.urlopen("http://127.0.0.1:{_PORT}/health")'"""
# What kubectl says of a JobSet that it has not sent, or that the cluster did not take.
_REFUSED = re.compile(
    r"no context|context .* does not exist|logged in|Unauthorized|Forbidden|no matches for kind|error validating|is invalid|no such host"
    r"|connection refused|connection to the server .* was refused|executable .* (not found|failed)|is it installed and on PATH",
    re.IGNORECASE,
)


def manifest(description: Description, run_id: str, plan: str | None = None) -> dict[str, Any]:
    """A JobSet of one slice: one pod per host.

    Args:
        plan: the text of a saved plan that is sent along.

    Raises:
        InvalidInput: no image is given.
    """
    raise_offences(["'gke.image' is missing: a container image that holds partinf"] if not description.gke.image else [])
    hosts, time_to_live = description.tpu.num_hosts, description.time_to_live
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        "activeDeadlineSeconds": time_to_live,
        "template": _pod(description, run_id, plan),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": f"{description.name}-{run_id}",
            "namespace": description.gke.namespace,
            "labels": {"partinf-run": run_id},
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": description.retries},
            "ttlSecondsAfterFinished": time_to_live,
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pod(description: Description, run_id: str, plan: str | None) -> dict[str, Any]:
    """The template of every pod. The plan is an annotation, which a volume shows as a file in the directory where the command runs: so the
    JobSet is the one object to make and to delete."""
    tpu, annotations = description.tpu, dict[str, str]()
    select = {"cloud.google.com/gke-tpu-accelerator": tpu.cloud.gke_accelerator, "cloud.google.com/gke-tpu-topology": tpu.topology}
    if description.spot:
        select["cloud.google.com/gke-spot"] = "true"
    container = _container(description, run_id)
    spec: dict[str, Any] = {"restartPolicy": "Never", "nodeSelector": select, "containers": [container]}
    if plan is not None:
        annotations[_PLAN_KEY] = plan
        file = {"path": PLAN, "fieldRef": {"fieldPath": f"metadata.annotations['{_PLAN_KEY}']"}}
        _mount(spec, {"name": "plan", "downwardAPI": {"items": [file]}}, _PLAN_FOLDER)
        container["workingDir"] = _PLAN_FOLDER
    if description.bucket:
        annotations["gke-gcsfuse/volumes"] = "true"
        attributes = {"bucketName": description.bucket, "mountOptions": "implicit-dirs"}
        source = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": attributes}
        _mount(spec, {"name": "weights", "csi": source}, _WEIGHTS_FOLDER)
    if description.gke.service_account:
        spec["serviceAccountName"] = description.gke.service_account
    return {**({"metadata": {"annotations": annotations}} if annotations else {}), "spec": spec}


def _container(description: Description, run_id: str) -> dict[str, Any]:
    words, chips = list(description.command), description.tpu.chips_per_host
    if description.bucket:  # read in place, not where `setup` would copy it to
        words = [f"{_WEIGHTS_FOLDER}/{description.weights}" if word == description.weights_here else word for word in words]
    container: dict[str, Any] = {
        "name": "worker",
        "image": description.gke.image,
        "command": words,
        "env": [{"name": "PARTINF_RUN_ID", "value": run_id}],
        # The first is how the hosts of a slice find each other, the second the coordinator of jax.distributed.
        "ports": [{"containerPort": 8471}, {"containerPort": 8482}],
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
    }
    if description.serves:
        words += ["--host", "0.0.0.0", "--port", str(_PORT)]
        container["ports"].append({"containerPort": _PORT})
        container["readinessProbe"] = {"exec": {"command": ["sh", "-c", _READY]}, "periodSeconds": 10, "timeoutSeconds": 5}
    return container


def _mount(spec: dict[str, Any], volume: dict[str, Any], path: str) -> None:
    """Let the container of a pod see a volume, read only."""
    spec.setdefault("volumes", []).append(volume)
    mount = {"name": volume["name"], "mountPath": path, "readOnly": True}
    spec["containers"][0].setdefault("volumeMounts", []).append(mount)


def run_jobset(
    description: Description,
    run_id: str,
    runner: Runner,
    signals: Signals,
    output: Path,
    poll_seconds: float = 20.0,
    plan: str | None = None,
    now: Callable[[], float] = time.time,
) -> int:
    """Apply the manifest, wait for its end, keep the logs, delete it; 0 when it completed.

    Raises:
        InvalidInput: no image or no cluster is given.
    """
    raise_offences(["'gke.context' is missing: the kubectl context of the cluster"] if not description.gke.context else [])
    content = json.dumps(manifest(description, run_id, plan), indent=2) + "\n"
    file = output / "jobset.json"
    if not runner.dry:
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    kube = ("kubectl", f"--context={description.gke.context}", f"--namespace={description.gke.namespace}")
    name, state, seen, refused, gone = f"{description.name}-{run_id}", "", False, False, True
    try:
        done = runner.run(Command((*kube, "apply", f"--filename={file}"), shielded=True, timeout=300))
        refused = bool(done.code) and _REFUSED.search(done.err) is not None
        seen = not done.code
        state = "" if seen else f"apply: {reason(done)}"
        deadline, silent = now() + description.time_to_live, 0
        while not state:
            answer = runner.run(Command((*kube, "get", "jobset", name, "--output=jsonpath={.status.terminalState}"), "Completed"))
            state, silent = answer.out.strip(), silent + 1 if answer.code else 0
            if not state and (silent >= _POLLS_WITHOUT_ANSWER or now() >= deadline):
                state = "no answer from the cluster" if silent else "the time to live is over"
            if not state:
                signals.sleep(poll_seconds)
        if seen:
            logs = runner.run(Command((*kube, "logs", f"--selector=jobset.sigs.k8s.io/jobset-name={name}", "--prefix", "--tail=-1")))
            if not runner.dry:
                (output / "logs.txt").write_text(logs.out)
    finally:
        if not refused:
            command = Command((*kube, "delete", "jobset", name, "--wait"), shielded=True, timeout=900)
            gone = Deletion("THE JOBSET", name, command, runner, poll_seconds).until_gone(awaited=not seen)
    if state != "Completed":
        say(state)
    return 0 if state == "Completed" and gone else 1
