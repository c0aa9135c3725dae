"""The one description that drives creating, running and deleting a pod: read from TOML, checked whole before any command runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from pod_types import TpuType, parse_type, type_of_slice

from partinf.foundation import documents
from partinf.foundation.documents import shown
from partinf.foundation.errors import InvalidInput, collect, nearest, raise_offences
from partinf.planner.files import SavedPlan
from partinf.planner.show.commands import serve_command, ships_weights, unservable
from partinf.plans import Plan

PLAN = "partinf-plan.toml"  # the name of a plan that is sent along, in the directory where the command runs
# TPU images carry a Python that may be older than partinf needs, hence uv; libtpu comes with the extra.
SETUP = (
    "python3 -m pip install --user --quiet uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv && "
    "python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,serve]'"
)
REQUIRED = ("name", "project", "zone", "type", "time_to_live", "command")
WHY = {
    "project": "nothing runs without the Google Cloud project that pays for it",
    "zone": "nothing runs without a zone, for example us-west4-a",
    "time_to_live": "nothing is created that may live for ever; for example '2h'",
    "command": 'what every worker runs, as a list: ["python", "-m", "partinf", …]',
}
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Gke:
    """What a JobSet needs besides the description: a container image that holds partinf, and the cluster it goes to.

    Attributes:
        service_account: of Kubernetes, which may read the bucket that a model lies in.
    """

    image: str = ""
    context: str = ""
    namespace: str = "default"
    service_account: str = ""


@dataclass(frozen=True)
class Description:
    """One pod run.

    Attributes:
        tpu: the slice; in the file `type`, and `topology` where the type has several.
        runtime: the software version of the TPU VM; by default the one of the generation.
        time_to_live: seconds after which nothing of this run may exist, all attempts together.
        wait: seconds to wait for capacity per attempt.
        retries: further attempts after capacity was lost.
        command: the argument list that every worker runs in the synced checkout.
        setup: the argument list that prepares the synced checkout, once per worker and commit.
        repository: the git checkout whose `commit` is sent.
        confirm_above_chips: a larger slice needs a confirmation.
        serves: whether `command` is the one that serves the plan.
        bucket, weights: where the served model lies, if in Cloud Storage: the bucket, and the folder in it.
    """

    name: str
    project: str
    zone: str
    tpu: TpuType
    time_to_live: int
    command: tuple[str, ...]
    runtime: str
    repository: Path
    spot: bool = False
    wait: int = 1800
    retries: int = 2
    setup: tuple[str, ...] = ("bash", "-c", SETUP)
    commit: str = "HEAD"
    confirm_above_chips: int = 16
    gke: Gke = field(default_factory=Gke)
    serves: bool = False
    bucket: str = ""
    weights: str = ""

    @property
    def weights_here(self) -> str:
        """Where `setup` puts a model of a bucket: in the checkout."""
        return local_weights(self.weights)


_KEYS = ({key.name for key in fields(Description)} - {"tpu", "serves", "bucket", "weights"}) | {"type", "topology", "model"}
_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])/([^/\s]+(?:/[^/\s]+)*)/?")


def local_weights(path: str) -> str:
    """Where a folder of a bucket is copied to, in the checkout."""
    return f"weights/{path.rpartition('/')[2]}"


def read_description(
    text: str, where: str, folder: Path, planned: SavedPlan | None = None, command: Sequence[str] | None = None
) -> Description:
    """Read a description; with a plan, `type` may be left out and must be the plan's slice, and without a `command` the plan is served.

    Args:
        command: stands in place of the description's own.

    Raises:
        InvalidInput: everything that is wrong with it, each with what would be valid.
    """
    table = documents.toml_of(text, where)
    offences = [f"unknown key '{key}'{nearest(key, _KEYS)}" for key in table if key not in _KEYS]
    table = {key: value for key, value in table.items() if key in _KEYS}
    if command is not None:
        table["command"] = list(command)
    plan, serves = None if planned is None else planned.plan, planned is not None and "command" not in table
    if planned is not None:
        collect(offences, lambda: _take_type(table, planned.plan))
    offences += _model_offences(table, planned)
    bucket, weights = _in_bucket(table)
    if planned is not None and serves and "model" in table:
        model = local_weights(weights) if weights else table["model"]
        table["command"] = ["python", "-m", *serve_command(PLAN, planned.plan, planned.workload, model or None)]
        table["command"] += ["--served-model-name", planned.plan.model.name] if model else []
    missing = [key for key in REQUIRED if table.get(key) in (None, "", []) and not (key in ("type", "command") and plan)]
    offences += [f"'{key}' is missing{': ' + WHY[key] if key in WHY else ''}" for key in missing]
    offences += _name_offences(table) + _scalar_offences(table)
    times: dict[str, Any] = {}
    for key in ("time_to_live", "wait"):
        if table.get(key) not in (None, ""):
            times[key] = collect(offences, partial(_seconds, key, table[key]))
    lists: dict[str, Any] = {key: tuple(table[key]) for key in ("command", "setup") if _is_argument_list(table, key, offences)}
    if weights:
        lists["setup"] = _with_weights(lists.get("setup", Description.setup), f"gs://{bucket}/{weights}")
    gke = collect(offences, lambda: _gke(table.get("gke", {})))
    tpu = None
    if table.get("type") and all(isinstance(table.get(key, ""), str) for key in ("type", "topology")):
        tpu = collect(offences, lambda: parse_type(table["type"], table.get("topology")))
    if tpu is not None and plan is not None and (tpu.slice.chip, sorted(tpu.slice.shape)) != (plan.slice.chip, sorted(plan.slice.shape)):
        offences.append(f"type '{tpu.name}' is {tpu.slice.name}, but the plan is for {plan.slice.name}")
    raise_offences(f"{where}: {offence}" for offence in offences)
    assert tpu is not None
    assert gke is not None
    simple = ("name", "project", "zone", "spot", "retries", "commit", "confirm_above_chips")
    rest: dict[str, Any] = {key: table[key] for key in simple if key in table}
    runtime = table.get("runtime", tpu.cloud.runtime)
    repository = (folder / table.get("repository", ".")).resolve()
    return Description(
        tpu=tpu, runtime=runtime, repository=repository, gke=gke, serves=serves, bucket=bucket, weights=weights, **rest, **times, **lists
    )


def _take_type(table: dict[str, Any], plan: Plan) -> None:
    if "type" not in table:
        tpu = type_of_slice(plan.slice)
        table["type"] = tpu.name
        if not tpu.default_topology:
            table["topology"] = tpu.topology


def _model_offences(table: dict[str, Any], planned: SavedPlan | None) -> list[str]:
    """What is wrong with `model`, or with its absence; where the plan is to be served and nothing is, `model` is there, empty for where the
    plan says."""
    given = table.get("model", "")
    if not isinstance(given, str):
        return []
    if "command" in table or planned is None:
        return [f"model '{given}': it belongs to a plan that is served; a 'command' says all itself"] if "model" in table else []
    if reason := unservable(planned.plan):
        return [f"'command' is missing: what every worker runs; the plan cannot be served, because {reason}"]
    if not given and not ships_weights(planned.model):
        where = "gs://BUCKET/FOLDER, or a directory of the workers"
        return [f"'model' is missing: where the weights of {planned.plan.model.name} lie that are to be served, {where}; or a 'command'"]
    if given.startswith("gs:") and _BUCKET.fullmatch(given) is None:
        return [f"model = {shown(given)}: expected gs://BUCKET/FOLDER"]
    table["model"] = given
    return []


def _in_bucket(table: dict[str, Any]) -> tuple[str, str]:
    """Bucket and folder of the model, where it lies in one; what is no such place has its own line."""
    match = _BUCKET.fullmatch(table["model"]) if isinstance(table.get("model"), str) else None
    return ("", "") if match is None else (match[1], match[2])


def _with_weights(setup: Sequence[str], url: str) -> tuple[str, ...]:
    """What prepares the checkout, and then copies a folder of a bucket into it."""
    return ("bash", "-c", f"{shlex.join(setup)} && mkdir -p weights && gcloud storage cp --recursive {shlex.quote(url)} weights/")


def _name_offences(table: dict[str, Any]) -> list[str]:
    patterns = {
        "name": (r"[a-z]([a-z0-9-]{0,28}[a-z0-9])?", "lower-case letters, digits and '-', at most 30, for example my-run"),
        "project": (r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", "a project id such as my-project"),
        "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]", "a zone such as us-west4-a"),
    }
    given = {key: table[key] for key in patterns if table.get(key) and isinstance(table[key], str)}
    return [f"{key} '{text}': expected {patterns[key][1]}" for key, text in given.items() if not re.fullmatch(patterns[key][0], text)]


def _scalar_offences(table: dict[str, Any]) -> list[str]:
    kinds = {"spot": bool, "retries": int, "confirm_above_chips": int, "commit": str, "repository": str, "runtime": str, "type": str}
    kinds |= {"topology": str, "name": str, "project": str, "zone": str, "model": str}
    wrong = [key for key, kind in kinds.items() if table.get(key) is not None and type(table[key]) is not kind]
    offences = [f"{key} = {shown(table[key])}: expected {kinds[key].__name__}" for key in wrong]
    if "retries" not in wrong and not 0 <= table.get("retries", 0) <= 20:
        offences.append(f"retries = {shown(table['retries'])}: expected 0 to 20")
    texts = [key for key in kinds if isinstance(table.get(key), str) and "\0" in table[key]]
    return offences + [f"{key} = {shown(table[key])}: no such name" for key in texts]


def _is_argument_list(table: dict[str, Any], key: str, offences: list[str]) -> bool:
    if table.get(key, []) in ([], None, ""):  # missing, which is reported elsewhere
        return False
    good = isinstance(table[key], list) and all(isinstance(word, str) for word in table[key])
    if not good:
        offences.append(f"{key} = {shown(table[key])}: expected a list of words, one per argument; a shell line is ['bash', '-c', '…']")
    return good


def _seconds(key: str, value: Any) -> int:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", value if isinstance(value, str) else "")
    if match is None or int(match[1]) == 0:
        raise InvalidInput(f"{key} = {shown(value)}: expected a number and a unit, such as '90m', '2h' or '1d'")
    return int(match[1]) * _UNITS[match[2]]


def _gke(table: Any) -> Gke:
    known = {key.name for key in fields(Gke)}
    if not isinstance(table, dict):
        raise InvalidInput(f"gke = {shown(table)}: expected a table with {', '.join(sorted(known))}")
    raise_offences(f"unknown key 'gke.{key}'{nearest(key, known)}" for key in table if key not in known)
    raise_offences(f"gke.{key} = {shown(value)}: expected text" for key, value in table.items() if not isinstance(value, str))
    return Gke(**table)
