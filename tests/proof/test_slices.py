"""Small proofs by the real compiler, one for each family of slices, and what is reported when there is no proof."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.hardware.chips import chips
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.proof import CompilerFailed, Limits, process, prove, unavailable
from partinf.workload import DType

MODEL = ModelConfig("tiny", 2, 1024, 2048, 16, 8, 128, 2000, max_len=256)
BUCKET = Bucket(64, 4)
_HAS_WHEELS = sys.platform == "linux" and platform.machine() == "x86_64"
needs_compiler = pytest.mark.skipif(not _HAS_WHEELS, reason="libtpu has wheels for Linux x86-64 only")


def plan_for(slice_name: str) -> Plan:
    slice_ = parse_slice(slice_name)
    storage = {axis.name: "embed" if axis.name == "x" else "ffn" for axis in slice_.axes}
    layout = make_layout(storage, dict.fromkeys(storage, "batch"))
    return Plan(MODEL, slice_, layout, cache=CacheConfig(16, 32, 64))


@needs_compiler
@pytest.mark.parametrize(("slice_name", "kv"), [("v5e:2x2", DType.INT8), ("v5p:2x2x2", DType.BF16), ("v4:2x2x1", DType.BF16)])
def test_a_small_plan_is_proven(slice_name: str, kv: DType) -> None:
    assert unavailable() is None
    plan = replace(plan_for(slice_name), kv=kv)
    proof = prove(plan, [BUCKET])
    (step,) = proof.steps
    assert proof.fits
    assert "libtpu" in proof.compiler
    assert 0 < step.memory.needed < step.memory.usable
    assert step.estimate is not None
    assert step.estimate.seconds >= step.estimate.floor > 0
    assert "kernel paged_decode: priced from the ledger" in step.estimate.note
    assert "kernel paged_write: priced at half of the rate of a transfer" in step.estimate.note
    assert not any("write." in work.source_op and "cache.py" in work.source_op for work in step.work)  # the cache stays where it lies
    assert any(c.overlapped_fraction for c in step.collectives if c.op == "all-to-all")  # alongside other work, as is requested
    # What is planned runs: every byte is accounted for by a collective of the plan or by a listed difference.
    kinds = {difference.kind for difference in step.differences}
    assert not kinds - {"extra copy", "merged collectives", "eliminated"}  # every reduce-scatter is kept
    requested = {collective.requested for collective in step.collectives}
    assert requested == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    assert all(c.source_op.startswith("partinf/transformer/") for c in step.collectives)
    layers: Counter[object] = Counter()
    for one in step.collectives:
        if "ffn" in one.source_op:
            layers[one.op, one.axes, one.bytes] += one.count
    assert set(layers.values()) == {2}  # once per layer


@needs_compiler
def test_the_compiler_describes_a_host_and_a_torus_of_every_tpu() -> None:
    """By the names and shapes of the hardware table, for a chip as good as for any other."""
    program = (
        "from partinf.hardware.chips import chips; from partinf.hardware.slices import make_slice; from partinf.proof import topology\n"
        "for chip in chips().values():\n"
        "    if chip.platform.described:\n"
        "        for shape in (chip.host_shape, (1,) * chip.torus_dims, (4,) * chip.torus_dims):\n"
        "            print(chip.name, len(topology._described(make_slice(chip, shape))) // chip.devices_per_chip)\n"
    )
    environment = os.environ | process._environment(parse_slice("v4:2x2x1")) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [tuple(line.split()) for line in done.stdout.splitlines()]
    tpus = [(name, chip.torus_dims) for name, chip in chips().items() if chip.platform.described]
    assert found == [(name, str(count)) for name, dims in tpus for count in (4, 1, 4**dims)]


@needs_compiler
def test_stages_over_the_network_between_slices_are_proven() -> None:
    """What a stage sends on is the only large thing that leaves a slice."""
    slice_ = parse_slice("v5e:2x2*2")
    layout = make_layout({"dcn": "stage", "x": "ffn", "y": "ffn"}, {"dcn": "none", "x": "heads", "y": "heads"})
    plan = Plan(MODEL, slice_, layout, cache=CacheConfig(16, 2 * BUCKET.decode_rows * BUCKET.decode_pages, 2 * BUCKET.decode_rows))
    (step,) = prove(plan, [BUCKET]).steps
    assert step.fits
    between = {(c.op, c.bytes, c.count) for c in step.collectives if c.axes == ("dcn",)}
    sent = BUCKET.decode_rows * MODEL.embed_dim // 4 * 2  # [rows, E.xy] in bfloat16
    assert ("collective-permute", sent, 1) in between
    assert {op for op, _, _ in between} == {"collective-permute", "all-reduce"}  # and what the last stage chose
    assert not {"other collective", "eliminated"} & {d.kind for d in step.differences if "dcn" in d.what}


@needs_compiler
def test_what_does_not_fit_is_refused_with_the_compilers_figures() -> None:
    plan = replace(plan_for("v5e:2x2"), model=replace(MODEL, embed_dim=16384, ffn_dim=1 << 19))
    (step,) = prove(plan, [BUCKET]).steps
    assert not step.fits
    assert step.memory.needed > step.memory.usable == int(15.75 * 2**30)
    assert "RESOURCE_EXHAUSTED" in step.refusal
    assert "v5e:" in step.advice


@needs_compiler
def test_the_command_prints_the_promised_fields(run_python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    where = ("--model", "llama-125m", "--slice", "v5e:2x2", "--phase", "decode", "--batch", "8", "--context", "64")
    done = run_python("-m", "partinf", "prove", *where, "--format", "json", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"compiler", "fits", "memory", "collectives", "step_seconds_estimate", "compile_seconds", "differences"} <= set(found)
    assert {"op", "axes", "bytes", "count", "overlapped_fraction", "source_op"} <= set(found["collectives"][0])
    assert not list(tmp_path.iterdir())  # no dump, no job


@pytest.mark.parametrize("weights", [pytest.param(DType.F32, marks=pytest.mark.slow), DType.BF16])
def test_a_plan_for_the_devices_here_is_proven(weights: DType) -> None:
    """Virtual CPU devices: the program that runs here, its memory and its collectives; no libtpu takes part."""
    plan = replace(plan_for("cpu:2x2"), weights=weights, kv=weights)
    proof = prove(plan, [BUCKET])
    (step,) = proof.steps
    assert "XLA for cpu" in proof.compiler
    assert proof.fits
    assert 0 < step.memory.needed < step.memory.usable
    assert step.estimate is not None
    assert step.estimate.seconds >= step.estimate.floor > 0
    assert {collective.op for collective in step.collectives} == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    assert all(c.source_op.startswith("partinf/transformer/") for c in step.collectives)
    widened = {difference.kind for difference in step.differences} & {"wider type", "other collective"}
    assert widened == (set() if weights is DType.F32 else {"wider type"})


def test_without_the_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(InvalidInput, match="not installed") as caught:
        prove(plan_for("v5e:2x2"), [BUCKET])
    assert len(caught.value.offences) == 1


def test_a_compiler_that_does_not_match_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.99" if name == "libtpu" else "0.10.2")
    assert "libtpu 0.0.99 does not match jax 0.10.2" in (unavailable() or "")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Run this code where the compiler would run."""
    monkeypatch.setattr(process, "unavailable", lambda family: None)
    return lambda code: monkeypatch.setattr(process, "_WORKER", ("-c", code))


def test_a_crash_of_the_compiler_is_reported(worker: Callable[[str], None]) -> None:
    worker("import os, sys; sys.stderr.write('F0101 Check failed: shapes'); sys.stderr.flush(); os.kill(os.getpid(), 11)")
    with pytest.raises(CompilerFailed, match="crashed with SIGSEGV: F0101 Check failed: shapes"):
        prove(plan_for("v5e:2x2"), [BUCKET])


def test_the_bound_on_time_holds_and_no_process_is_left(worker: Callable[[str], None], tmp_path: Path) -> None:
    note = tmp_path / "pids"
    child = "subprocess.Popen(['sleep', '60'])"
    worker(f"import os, subprocess, time; p = {child}; open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{p.pid}}'); time.sleep(60)")
    with pytest.raises(CompilerFailed, match="stopped after 2 s"):
        prove(plan_for("v5e:2x2"), [BUCKET], Limits(seconds=2))
    pids = [int(pid) for pid in note.read_text().split()]
    assert len(pids) == 2
    until = time.monotonic() + 10  # the worker's own child is not ours to wait for: it ends soon after its signal
    while any(map(_runs, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(_runs, pids))


@needs_compiler
def test_nothing_is_left_by_a_proof_that_is_killed(tmp_path: Path) -> None:
    code = "from tests.proof.test_slices import *; prove(plan_for('v5e:2x2'), [BUCKET])"
    caller = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)})
    until = time.monotonic() + 60
    children = Path(f"/proc/{caller.pid}/task/{caller.pid}/children")
    while not (pids := [int(pid) for pid in children.read_text().split()]) and time.monotonic() < until:
        time.sleep(0.01)
    assert pids
    assert list(tmp_path.iterdir())
    time.sleep(1.0)  # let the worker begin; should it not have, it ends as soon as it does
    caller.kill()
    caller.wait()
    while (any(map(_runs, pids)) or list(tmp_path.iterdir())) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(_runs, pids))
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_the_bound_on_memory_holds() -> None:
    with pytest.raises(CompilerFailed, match="it was allowed 0.0625 GiB of memory"):
        prove(plan_for("v5e:2x2"), [BUCKET], Limits(memory_bytes=64 << 20))


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for the process that inherited it."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_proof_needs_steps_and_devices() -> None:
    with pytest.raises(InvalidInput, match="no buckets"):
        prove(plan_for("v5e:2x2"))
    with pytest.raises(InvalidInput, match="slice h200:64"):  # there is no GPU here, or not as many
        prove(plan_for("h200:64"), [BUCKET])


def test_int8_changes_what_is_planned() -> None:
    from partinf.proof.proving import _stored

    plan = plan_for("v5e:2x2")
    assert _stored(replace(plan, weights=DType.INT8), BUCKET) < _stored(plan, BUCKET)
