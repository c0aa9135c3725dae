"""Real processes, each with a part of the devices: the answers of one, and an end for all when one of them is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from partinf.experiment.together import free_port
from partinf.foundation.resources import find
from partinf.hosts.job import NAMES
from partinf.model.load import load_model_config
from partinf.model.weights import num_params
from tests.hosts import worker

COUNT = 18
BOUNDS = {"silence": 15.0, "stall": 60.0, "grace": 1.0}  # patient: only a process that is stopped may seem so
SILENCE = 4.0  # where one is stopped


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled steps, which the first job makes and the others load."""
    return tmp_path_factory.mktemp("executables")


class LocalJob:
    """Processes of one job on this machine; all devices together are eight."""

    def __init__(self, root: Path, folder: Path, cache: Path, count: int, what: str, **options: Any) -> None:
        self.folder, self.count = folder, count
        address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "tests.hosts.worker", what, json.dumps({"bounds": BOUNDS | options.pop("bounds", {}), **options})]
        self.processes: list[subprocess.Popen[bytes]] = []
        for index in range(count):
            environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
            environment |= dict(zip(NAMES, (address, str(count), str(index)), strict=True))
            environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // count), "PYTHONPATH": str(root)}
            environment |= {"PARTINF_RESULTS": str(folder), "PARTINF_CACHE_DIR": str(cache)}
            with (folder / f"printed-{index}").open("wb") as printed:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=printed, stderr=printed, cwd=root))

    def wait_ready(self, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while not all((self.folder / f"ready-{index}").exists() for index in range(self.count)):
            assert time.monotonic() < deadline, self.printed()
            assert all(process.poll() is None for process in self.processes), self.printed()
            time.sleep(0.05)

    def wait(self, seconds: float, but: int | None = None) -> list[int | None]:
        """The exit codes, once all but one have ended."""
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for index, process in enumerate(self.processes) if index != but):
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.05)
        return [process.poll() for process in self.processes]

    def printed(self, index: int | None = None) -> str:
        chosen = range(self.count) if index is None else [index]
        return "\n".join(f"{number}: {(self.folder / f'printed-{number}').read_text(errors='replace')[-30_000:]}" for number in chosen)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def start(root: Path, tmp_path: Path, cache: Path) -> Iterator[Callable[..., LocalJob]]:
    made: list[LocalJob] = []

    def job(count: int, what: str, **options: Any) -> LocalJob:
        made.append(LocalJob(root, tmp_path, cache, count, what, **options))
        return made[-1]

    yield job
    for each in made:
        each.end()


@pytest.fixture(scope="module")
def alone() -> dict[str, object]:
    """The answers of one process that has all devices."""
    return worker.answer(worker.make_engine(None), COUNT)


def compare(found: dict, alone: dict) -> None:
    """Every answer that came to its end is the same; a cancelled one is how far it came."""
    assert found["answers"].keys() == alone["answers"].keys()
    for name, (reason, tokens) in found["answers"].items():
        expected_reason, expected = alone["answers"][name]
        shorter = min(len(tokens), len(expected))
        assert tokens[:shorter] == expected[:shorter], name
        if "cancelled" not in (reason, expected_reason):
            assert (reason, tokens) == (expected_reason, expected), name


def check_answers(job: LocalJob, alone: dict, held_by_all: float = 0.0) -> None:
    """Every process ends well, the answers are right, and each has read its own part of the weights, besides what all hold."""
    codes = job.wait(300)
    assert codes == [0] * job.count, job.printed()
    found = json.loads((job.folder / "answers.json").read_text())
    compare(found, alone)
    assert found["swaps"] > 0
    assert found["cached"] > 0
    assert found["cancelled"] > 0
    stored = (find("models", "demo") / "model.safetensors").stat().st_size
    read = [int((job.folder / f"read-{index}").read_text()) for index in range(job.count)]
    most = stored * (held_by_all + (1.1 - held_by_all) / job.count)
    assert max(read) < most, f"processes read {read} of {stored} bytes"


def test_two_processes_give_the_answers_of_one(start: Callable[..., LocalJob], alone: dict) -> None:
    check_answers(start(2, "answer", requests=COUNT), alone)


@pytest.mark.slow
def test_four_processes_give_the_answers_of_one(start: Callable[..., LocalJob], alone: dict) -> None:
    check_answers(start(4, "answer", requests=COUNT), alone)


@pytest.mark.slow
def test_the_pages_of_a_request_may_lie_in_several_processes(start: Callable[..., LocalJob]) -> None:
    alone = worker.answer(worker.make_engine(None, "long-context"), COUNT)
    check_answers(start(4, "answer", requests=COUNT, layout="long-context"), alone)


@pytest.mark.slow
def test_three_processes_with_a_pipeline_stage_each(start: Callable[..., LocalJob]) -> None:
    """Each holds the layers of its stage, their part of the pages, and the embeddings."""
    model = load_model_config("demo")
    embeddings = model.padded_vocab_size * model.embed_dim / num_params(model)
    check_answers(start(3, "answer", requests=COUNT, layout="stages"), worker.answer(worker.make_engine(None, "stages"), COUNT), embeddings)


def bounds_for(number: signal.Signals) -> dict[str, float]:
    return {"silence": SILENCE} if number is signal.SIGSTOP else {}


def ends_everywhere(job: LocalJob, index: int, number: signal.Signals) -> None:
    """A process that gets this signal is named by the others, which end within half a minute."""
    job.wait_ready()
    time.sleep(1.0)  # into the middle of it
    os.kill(job.processes[index].pid, number)
    codes = job.wait(30, but=index)
    why = "has ended" if number is signal.SIGKILL else f"was silent for {SILENCE:g} s"
    for other in set(range(job.count)) - {index}:
        printed = job.printed(other)
        if index == 0 and codes[other] == -signal.SIGABRT:  # jax holds a connection to process 0 too, and is sometimes faster
            assert "the JAX distributed service detected fatal errors" in printed, printed
            continue
        assert codes[other] == 1, printed
        assert f"the job ends: process {index} (" in printed, printed
        assert why in printed, printed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_process_that_is_gone_ends_the_other(start: Callable[..., LocalJob], number: signal.Signals) -> None:
    ends_everywhere(start(2, "serve", bounds=bounds_for(number)), 1, number)


def test_a_process_that_disagrees_ends_both(start: Callable[..., LocalJob]) -> None:
    job = start(2, "serve", wrong=1)
    codes = job.wait(240)
    assert codes == [1, 1], job.printed()
    for index in range(2):
        assert "disagrees: its schedule differs from that of process 0" in job.printed(index), job.printed()
        assert "the job ends: process 1 (" in job.printed(index), job.printed()


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_any_of_four_processes_ends_all(start: Callable[..., LocalJob], number: signal.Signals, index: int) -> None:
    ends_everywhere(start(4, "serve", bounds=bounds_for(number)), index, number)
