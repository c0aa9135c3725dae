"""What it costs that several processes make one schedule: `python -m experiments.multi_host.measure` writes results.json.

Without a model: process 0 has an engine whose runner takes a given time and computes nothing, the others follow over loopback as they
would over a network, each a process of its own. Per iteration: bytes and time of process 0's broadcast, time of the digest, and how much
later than process 0 the last of the others has the same step ready. With a model: the demo model on eight virtual devices, over two
processes.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.results import write
from partinf.engine import Engine, RunnerLimits, SamplingParams
from partinf.engine.replicas import IterationInputs
from partinf.engine.step import SampledToken, Step, StepOutput
from partinf.experiment.together import run_local
from partinf.hosts import Group
from partinf.hosts.wire import Door, connect

ITERATIONS = 400
STEP_SECONDS = 0.010
PROMPT, OUTPUT = 200, 100


class Waiting:
    """Steps that take a fixed time and sample token 1; notes when each was submitted."""

    def __init__(self, rows: int, seconds: float) -> None:
        pages = 2 * rows * ((PROMPT + OUTPUT) // 16 + 1)
        self.limits = RunnerLimits(rows, 1024, rows, 16, pages, 1, 2 * rows, 2048, 100)
        self.submitted: list[float] = []
        self._seconds = seconds
        self._queue: list[tuple[Step, float]] = []

    def submit(self, step: Step) -> None:
        now = time.perf_counter()
        self.submitted.append(now)
        begins = max(now, self._queue[-1][1]) if self._queue else now
        self._queue.append((step, begins + self._seconds))

    def collect(self) -> StepOutput:
        step, done = self._queue.pop(0)
        time.sleep(max(0.0, done - time.perf_counter()))
        token = SampledToken(1, 0.0)
        return StepOutput((token,) * len(step.decode), tuple(token if chunk.last else None for chunk in step.prefill))

    def reset(self) -> None:
        self._queue.clear()


class Timed:
    """A group whose broadcast is timed."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.leads = group.leads
        self.check, self.failed = group.check, group.failed
        self.broadcast_seconds: list[float] = []
        self.bytes_sent: list[int] = []

    def broadcast(self, inputs: IterationInputs) -> None:
        started = time.perf_counter()
        self._group.broadcast(inputs)
        self.broadcast_seconds.append(time.perf_counter() - started)
        self.bytes_sent.append(len(self._group._encoder.encode(inputs)))

    def scheduled(self, number: int, digest: bytes) -> None:
        self._group.scheduled(number, digest)


def serve(engine: Engine, rows: int, seed: int = 0) -> list[float]:
    """Iterations at a steady batch of `rows`: a request that ends is followed by another. Returns their lengths in seconds."""
    rng, lengths = random.Random(seed), []
    ask = lambda: engine.add_request(  # noqa: E731
        [rng.randrange(100) for _ in range(PROMPT)], SamplingParams(max_tokens=rng.randint(OUTPUT // 2, OUTPUT), ignore_eos=True)
    )
    for _ in range(rows):
        ask()
    while len(lengths) < ITERATIONS:
        started = time.perf_counter()
        for _ in engine.step():
            ask()
        lengths.append(time.perf_counter() - started)
    return lengths


def one(rows: int, others: int) -> dict[str, float]:
    """Process 0 and so many others."""
    door = Door.open("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(door.port), door.token.hex(), str(rows), folder]
        command = [sys.executable, "-m", "experiments.multi_host.measure", "follow"]
        processes = [subprocess.Popen([*command, str(index), *arguments]) for index in range(1, others + 1)]
        group = Group(0, others + 1, "process 0", door.accept(others + 1, 60))
        door.listener.close()
        timed, runner = Timed(group), Waiting(rows, STEP_SECONDS)
        engine = Engine(group.runner(runner), lag=1, replicas=timed)
        lengths = serve(engine, rows)
        group.close()
        for process in processes:
            process.wait(60)
        ready = [json.loads((Path(folder) / f"{index}.json").read_text()) for index in range(1, others + 1)]
    late = [
        max(other[number] for other in ready) - mine for number, mine in enumerate(runner.submitted) if all(len(o) > number for o in ready)
    ]
    steady = slice(50, None)
    return {
        "rows": rows,
        "others": others,
        "iteration_ms": 1e3 * statistics.median(lengths[steady]),
        "bytes_sent": statistics.mean(timed.bytes_sent[steady]),
        "broadcast_us": 1e6 * statistics.median(timed.broadcast_seconds[steady]),
        "broadcast_p99_us": 1e6 * sorted(timed.broadcast_seconds[steady])[int(0.99 * len(timed.broadcast_seconds[steady]))],
        "late_us": 1e6 * statistics.median(late[steady]),
        "share": statistics.median(timed.broadcast_seconds[steady]) / statistics.median(lengths[steady]),
    }


def alone(rows: int) -> dict[str, float]:
    """The same engine without other processes."""
    lengths = serve(Engine(Waiting(rows, STEP_SECONDS), lag=1), rows)
    return {"rows": rows, "others": 0, "iteration_ms": 1e3 * statistics.median(lengths[50:])}


def follow(index: str, port: str, token: str, rows: str, folder: str) -> None:
    links = connect([("127.0.0.1", int(port))], bytes.fromhex(token), int(index), f"process {index}", 60)
    group, runner = Group(int(index), 0, f"process {index}", {0: ("process 0", links)}), Waiting(int(rows), STEP_SECONDS)
    group.follow(Engine(group.runner(runner), lag=1, replicas=group))
    (Path(folder) / f"{index}.json").write_text(json.dumps(runner.submitted))


def demo_worker() -> None:
    """One of the processes that have the demo model together."""
    import partinf
    from partinf import hosts
    from partinf.buckets import Capacity
    from partinf.workload import DType, Workload

    group = hosts.join()
    workload = Workload(batch=8, input_len=32, output_len=32, weights=DType.F32, kv=DType.F32)
    plan = partinf.plan("demo", "cpu:2x2x2", workload, capacity=Capacity(max_rows=8, max_len=64, prefill_tokens=32))
    model = partinf.load("demo", plan, group=group)
    timed = Timed(group)
    engine = Engine(group.runner(model.runner), tokenizer=model.tokenizer, lag=1, replicas=timed)
    if not group.leads:
        group.follow(engine)
        return
    lengths = []
    for number in range(60):
        engine.add_request(f"copy: {' '.join('abcdefgh'[number % 4 :])} =", SamplingParams(max_tokens=16))
    while engine.has_work:
        started = time.perf_counter()
        engine.step()
        lengths.append(time.perf_counter() - started)
    group.close()
    figures = {
        "processes": group.count,
        "iterations": len(lengths),
        "iteration_ms": 1e3 * statistics.median(lengths),
        "bytes_sent": statistics.median(timed.bytes_sent),
        "broadcast_us": 1e6 * statistics.median(timed.broadcast_seconds),
        "share": statistics.median(timed.broadcast_seconds) / statistics.median(lengths),
    }
    (Path(os.environ["PARTINF_RESULTS"]) / "demo.json").write_text(json.dumps(figures))


def on_the_demo_model() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run_local([sys.executable, "-m", "experiments.multi_host.measure", "demo"], 2, 4, Path(folder), 600)
        return json.loads((Path(folder) / "demo.json").read_text())


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["follow"]:
        follow(*arguments[1:])
        return
    if arguments[:1] == ["demo"]:
        demo_worker()
        return
    rows = []
    for batch in (32, 256):
        rows.append(alone(batch))
        rows += [one(batch, others) for others in (1, 3, 7)]
    found = {"cores": os.cpu_count(), "python": platform.python_version(), "step_ms": 1e3 * STEP_SECONDS, "without_model": rows}
    found["demo_model"] = on_the_demo_model()
    write(__file__, found)
    print("| batch | other processes | iteration ms | bytes sent | broadcast µs | P99 | last one ready after µs | share of the iteration |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        if row["others"]:
            print(
                f"| {row['rows']} | {row['others']} | {row['iteration_ms']:.2f} | {row['bytes_sent']:.0f} | {row['broadcast_us']:.0f} | "
                f"{row['broadcast_p99_us']:.0f} | {row['late_us']:.0f} | {100 * row['share']:.2f} % |"
            )
        else:
            print(f"| {row['rows']} | 0 | {row['iteration_ms']:.2f} | | | | | |")
    demo = found["demo_model"]
    print(f"\nDemo model over 2 processes: {demo['broadcast_us']:.0f} µs of {demo['iteration_ms']:.1f} ms ({100 * demo['share']:.2f} %).")


if __name__ == "__main__":
    main(sys.argv[1:])
