"""`plan --prove`: the compiler's answers order the planner's candidates."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError

import pytest

from partinf.cli import main
from partinf.hardware.slices import parse_slice
from partinf.model.load import load_model_config
from partinf.planner.report import PlanReport, search
from partinf.planner.results import Candidate
from partinf.proof import Proof, StepProof
from partinf.proof.candidates import key, proven_seconds, reordered
from partinf.proof.report import Estimate, Memory
from partinf.workload import Workload
from tests.proof.test_slices import needs_compiler


def proof(*seconds: float, fits: bool = True) -> Proof:
    memory = Memory(0, 0, 0, 0, 0, 1, 2)
    steps = (StepProof("a step", fits, memory, 1.0, estimate=Estimate(s, 0.0, 0.0, 0.0, 0.25, "")) for s in seconds)
    return Proof("model", "slice", "compiler", tuple(steps))


def report_of(phase: str | None) -> PlanReport:
    workload = Workload(8, 32, 16, phase=phase) if phase is None else Workload(8, context_len=64, phase=phase)
    return search(load_model_config("llama-125m"), parse_slice("v5e:2x2"), workload)


def test_proven_ones_come_first_and_refused_ones_last() -> None:
    report = report_of("decode")
    first, second, third, *rest = report.candidates
    order = reordered(report, {key(first): proof(3.0), key(second): proof(2.0), key(third): proof(1.0, fits=False)})
    assert order == (second, first, *rest, third)
    assert reordered(report, {}) == report.candidates


def test_a_whole_workload_is_judged_by_both_steps() -> None:
    report = report_of(None)
    candidate: Candidate = report.best
    assert proven_seconds(report, candidate, proof(0.5, 3.0)) == report.workload.counted_prefills * 3.0 + 16 * 0.5


@needs_compiler
def test_the_command_puts_proofs_into_candidates(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    what = ("--model", "demo", "--slice", "v5e:2x2", "--phase", "decode", "--batch", "8", "--context", "64")
    done = run_python("-m", "partinf", "plan", *what, "--prove", "2", "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    proven = [candidate for candidate in found["candidates"] if "proof" in candidate]
    assert proven == found["candidates"][:2]
    assert "proof" in found["best"]
    assert all(one["proof"]["fits"] for one in proven)
    times = [one["proof"]["step_seconds_estimate"] for one in proven]
    assert times == sorted(times)
    assert times[0] > 0


@pytest.mark.parametrize("count", ["0", "some"])
def test_a_wrong_number_is_refused(run_python: Callable[..., subprocess.CompletedProcess[str]], count: str) -> None:
    done = run_python("-m", "partinf", "plan", "--model", "llama-125m", "--slice", "v5e:2x2", "--batch", "8", "--prove", count)
    assert done.returncode == 2
    assert f"--prove {count}" in done.stderr


def test_a_slice_whose_compiler_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("partinf.proof.process.metadata.version", missing)
    flags = ["--model", "llama-125m", "--slice", "v5e:2x2", "--phase", "decode", "--batch", "8", "--context", "64"]
    assert main(["prove", *flags]) == 2
    assert "the TPU compiler is not installed" in capsys.readouterr().err
