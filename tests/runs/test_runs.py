"""One description, run in the simulator, here, and over several processes: what follows from it is the same everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from partinf.engine.policies.registry import POLICIES
from partinf.experiment.description import Experiment, read_experiment
from partinf.experiment.execute import execute
from partinf.experiment.result import deterministic
from partinf.experiment.simulate import simulate
from partinf.experiment.together import ProcessFailed, run_local
from partinf.foundation.errors import InvalidInput

TEXT = """
model = "demo"
slice = "cpu:2x2x2"
layout = "ws-2d"
weights = "f32"
processes = {processes}
requests = 6
lengths = "uniform:3-9:3-8"
max_batch = 8
prefill_tokens = 32
scheduler = "orca"
rounds = 0
"""


def written(folder: Path, processes: int) -> Path:
    file = folder / "split.toml"
    file.write_text(TEXT.format(processes=processes))
    return file


def on_processes(folder: Path, processes: int) -> dict:
    """The result of the command, as a user gets it."""
    file, output = written(folder, processes), folder / "result.json"
    command = [sys.executable, "-m", "partinf", "run", str(file), "--on", "processes", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The result of this one process with its eight devices."""
    return execute(read_experiment(written(tmp_path_factory.mktemp("here"), 1)))


def same(found: dict, expected: dict) -> None:
    """All that follows from the description is equal, the number of processes aside."""
    expected = json.loads(json.dumps(deterministic(expected)))
    found = json.loads(json.dumps(deterministic(found)))
    found["experiment"]["processes"] = expected["experiment"]["processes"]
    assert found == expected


def test_two_processes_answer_as_one(here: dict, tmp_path: Path) -> None:
    found = on_processes(tmp_path, 2)
    same(found, here)
    assert found["where"] | {"jax": ""} == {"kind": "devices", "devices": 8, "processes": 2, "device_kind": "cpu", "jax": ""}
    assert found["requests"][0]["tokens"]


@pytest.mark.slow
def test_four_processes_answer_as_one(here: dict, tmp_path: Path) -> None:
    same(on_processes(tmp_path, 4), here)


def test_the_simulator_makes_the_same_schedule(here: dict, tmp_path: Path) -> None:
    found = simulate(read_experiment(written(tmp_path, 1)))
    assert keys(found) == keys(here)
    for request in here["requests"]:
        assert len(request["tokens"]) == request["output_len"]
    expected = here | {"requests": [request | {"tokens": None} for request in here["requests"]]}
    same(found, expected)
    assert found["where"]["kind"] == "simulator"
    assert found["figures"]["seconds"] > 0


def keys(value: object) -> object:
    """The keys of a JSON object, all the way down; lists by their first element."""
    if isinstance(value, dict):
        return {key: keys(each) for key, each in value.items()}
    return [keys(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


def test_everything_wrong_with_a_description_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text('modle = "demo"\nslice = "cpu:2x2"\nrequests = "many"\n')
    with pytest.raises(InvalidInput) as caught:
        read_experiment(file)
    text = "\n".join(caught.value.offences)
    assert "unknown key 'modle'; did you mean 'model'?" in text
    assert "'model' is missing" in text
    assert "requests = 'many'; expected a whole number from 1 to 1,000,000" in text
    file.write_text(
        'model = "demo"\nslice = "cpu:3"\nprocesses = 2\nscheduler = "mlfq"\nlengths = "long"\nweights = "f16"\nlayout = "ws-3d"\n'
    )
    with pytest.raises(InvalidInput) as caught:
        read_experiment(file)
    text = "\n".join(caught.value.offences)
    for expected in (
        "3 devices of cpu:3 cannot be divided evenly",
        "'mlfq' looks at the clock",
        "lengths 'long'",
        "weights = 'f16'",
        "layout 'ws-3d'",
    ):
        assert expected in text
    with pytest.raises(InvalidInput, match="no such file"):
        read_experiment(tmp_path / "none.toml")


def test_every_policy_that_does_not_read_the_clock_is_taken(tmp_path: Path) -> None:
    for name, policy in POLICIES.items():
        file = tmp_path / f"{name}.toml"
        file.write_text(f'model = "demo"\nslice = "cpu:2x2x2"\nlayout = "ws-2d"\nscheduler = "{name}"\n')
        if policy.reads_clock:
            with pytest.raises(InvalidInput, match=f"'{name}' looks at the clock"):
                read_experiment(file)
        else:
            assert read_experiment(file).scheduler == name
    assert not POLICIES["priority"].reads_clock


def test_a_layout_of_more_axes_than_the_slice_has_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "axes.toml"
    file.write_text('model = "demo"\nslice = "cpu:2"\nlayout = "ws-2d"\n')
    with pytest.raises(InvalidInput, match=r"of 2 kinds of axes .* and cpu:2 has 1 .* a mesh of factors such as 4x2 for 8 devices$"):
        read_experiment(file)
    file.write_text('model = "demo"\nslice = "cpu:2x2"\nlayout = "ws-2d"\n')
    assert read_experiment(file).layout == "ws-2d"


def test_the_example_can_be_read() -> None:
    file = Path(__file__).parents[2] / "experiments" / "on_a_pod" / "demo.toml"
    assert isinstance(read_experiment(file), Experiment)


def test_all_processes_end_when_one_fails(tmp_path: Path) -> None:
    """The others would wait for it for ever."""
    code = "import os, sys, time; time.sleep(100) if os.environ['PARTINF_PROCESS_ID'] != '1' else sys.exit('no luck')"
    with pytest.raises(ProcessFailed, match=r"process 1 of 3 ended with 1:\nno luck"):
        run_local([sys.executable, "-c", code], 3, 1, tmp_path, timeout=60.0)
    with pytest.raises(ProcessFailed, match="did not end within 0 s"):
        run_local([sys.executable, "-c", "import time; time.sleep(100)"], 2, 1, tmp_path, timeout=0.2)
