"""An experiment on a pod: the pod scripts of this checkout, driven by its description."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from partinf.experiment.description import Experiment
from partinf.foundation.errors import InvalidInput, collect, raise_offences


def launch(experiment: Experiment, file: Path, description: Path, options: Any) -> Path | None:
    """Create the slice, run the experiment on all workers, fetch and delete; the folder of what was fetched, None after a dry run.

    A CPU slice runs on the CPUs of the hosts, which tries everything but the chips.

    Args:
        file: of the experiment, which has to be in the commit that is sent.
        options: `run_id`, `pod_output`, `dry_run`, `yes`, `poll_seconds`.

    Raises:
        InvalidInput: no pod scripts here, a wrong description, or an experiment that is not sent.
        RuntimeError: the run failed; what was fetched lies in its folder.
    """
    folder = Path(__file__).resolve().parents[2] / "tpu_scripts"
    if not (folder / "pod.py").is_file():
        raise InvalidInput("a run on a pod: tpu_scripts/ is missing; launching sends a commit, so run it from a checkout of partinf")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    pod: Any = importlib.import_module("pod")
    command = ["python", "-m", "partinf", "run", str(file), "--on", "worker", "--format", "json"]
    text, folder = pod.read_text(description, "description"), description.resolve().parent
    read = pod.read_description(text, str(description), folder, command=command)
    slice_, pod_slice = experiment.target(), read.tpu.slice
    offences: list[str] = []
    if slice_.chip.platform.virtual:
        if slice_.num_devices % read.tpu.num_hosts:
            offences.append(
                f"{file}: the {slice_.num_devices} devices of {slice_.name} cannot be divided evenly by {read.tpu.num_hosts} hosts"
            )
    elif (slice_.chip.name, sorted(slice_.shape)) != (pod_slice.chip.name, sorted(pod_slice.shape)):
        offences.append(f"{file}: its slice is {slice_.name}, and {read.tpu.name} of {description} is {pod_slice.name}")
    inside = collect(offences, lambda: _path_in_commit(file, read.repository, read.commit))
    raise_offences(offences)
    read = replace(read, command=tuple(str(inside) if word == str(file) else word for word in command))
    run_id = options.run_id or time.strftime("%y%m%d-%H%M%S", time.gmtime())
    chosen = pod.Options("launch", run_id, options.pod_output, None, options.dry_run, options.yes, options.poll_seconds)
    if options.dry_run:
        pod.perform(chosen, read)
        return None
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
        code = pod.perform(chosen, read)
    output = (options.pod_output / f"{read.name}-{run_id}").absolute()
    if code:
        raise RuntimeError(f"the run on the pod failed; what was fetched is in {output}")
    return output


def _path_in_commit(file: Path, repository: Path, commit: str) -> str:
    """The file's path in the repository, if the commit has it as it is here."""
    try:
        inside = str(file.resolve().relative_to(repository))
    except ValueError:
        raise InvalidInput(f"experiment {file} is not in the repository that is sent, {repository}") from None
    done = subprocess.run(["git", "-C", str(repository), "show", f"{commit}:{inside}"], capture_output=True)
    if done.returncode or done.stdout != file.read_bytes():
        raise InvalidInput(f"experiment {file} is not in commit {commit} as it is here; the workers get the commit, so commit it first")
    return inside
