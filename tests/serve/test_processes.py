"""Several processes: the others run the very steps of the first, and end with it."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from partinf.engine import Engine, FakeRunner, FinishReason, SamplingParams
from partinf.engine.step import Step
from partinf.errors import InvalidInput
from partinf.serve.processes import FollowerLost, Leader, Processes, follow
from tests.serve.support import LIMITS
from tests.serve.test_life import BODY, process


class Recorder(FakeRunner):
    """Counts what is still to be collected, and how often it was reset."""

    def __init__(self) -> None:
        super().__init__(LIMITS)
        self.most = self.resets = 0

    def submit(self, step: Step) -> None:
        super().submit(step)
        self.most = max(self.most, len(self._done))

    def reset(self) -> None:
        super().reset()
        self.resets += 1


def followed() -> tuple[Leader, FakeRunner, Recorder, threading.Thread]:
    here, there = socket.socketpair()
    runner, other = FakeRunner(LIMITS), Recorder()
    thread = threading.Thread(target=follow, args=(other, there))
    thread.start()
    return Leader(runner, [here]), runner, other, thread


def test_followers_run_the_same_steps() -> None:
    leader, runner, other, thread = followed()
    engine, rng = Engine(leader, lag=1, prefix_caching=True), random.Random(0)
    prompts = [rng.choices(range(96), k=rng.randint(1, 90)) for _ in range(40)]
    params = [
        SamplingParams(max_tokens=rng.randint(1, 20), temperature=rng.choice([0.0, 1.0]), n=rng.choice([1, 1, 3]), presence_penalty=p)
        for p in rng.choices([0.0, 1.0], k=40)
    ]
    engine.generate(prompts, params)
    leader.close()
    thread.join(10)
    assert not thread.is_alive()
    assert other.steps == runner.steps
    assert len(runner.steps) > 50
    assert other.most <= 8
    assert other.resets == 0


def test_a_step_that_fails_is_forgotten_everywhere() -> None:
    leader, runner, other, thread = followed()
    engine = Engine(leader, lag=1)
    broken = iter([True])

    def submit(step: Step) -> None:
        if len(runner.steps) == 3 and next(broken, False):
            raise OSError("device lost")
        FakeRunner.submit(runner, step)

    runner.submit = submit  # type: ignore[method-assign]
    with pytest.raises(OSError, match="device lost"):
        engine.generate([[1, 2]], SamplingParams(max_tokens=9))
    assert len(engine.generate([[1, 2]], SamplingParams(max_tokens=9))[0].tokens) == 9
    leader.close()
    thread.join(10)
    assert other.resets == 1


def test_a_lost_follower_is_no_matter_of_one_request() -> None:
    here, there = socket.socketpair()
    engine = Engine(Leader(FakeRunner(LIMITS), [here]))
    engine.add_request([1], SamplingParams(max_tokens=9))
    there.close()
    with pytest.raises(FollowerLost):
        engine.step()
    assert [output.finish_reason for output in engine.step()] == [FinishReason.FAILED]
    here.close()


def test_what_a_job_must_say() -> None:
    assert Processes.of(None, None, None) == Processes()
    assert Processes.of("host:9000", 4, 3) == Processes("host", 9000, 4, 3)
    assert Processes.of("[::1]:9000", 2, 0).host == "::1"
    with pytest.raises(InvalidInput) as error:
        Processes.of("host", None, 7)
    assert len(error.value.offences) == 2
    with pytest.raises(InvalidInput, match=r"valid: 0\.\.1"):
        Processes.of("host:1", 2, 2)


@pytest.mark.slow
def test_two_processes_serve_one_model(root: Path) -> None:
    """Each holds half of the model; the answers are those of one."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = ["-m", "partinf", "serve", "--model", "demo", "--slice", "cpu:2", "--max-model-len", 64]
    command += ["--max-num-seqs", 4, "--port", 0, "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    other = subprocess.Popen(
        [sys.executable, *map(str, command), "--process-id", "1"],
        env={**environment, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with process(root, *command, "--process-id", 0, JAX_NUM_CPU_DEVICES=None) as server:
            server.wait_ready(240)
            for text in ("s e c r e t", "a b c"):
                status, content = server.ask("POST", "/v1/completions", BODY | {"prompt": f"copy: {text} =", "ignore_eos": False})
                assert status == 200
                assert f'"text":" {text}"' in content
            server.child.send_signal(signal.SIGTERM)
            code, printed = server.end()
        _, said = other.communicate(timeout=60)
    finally:
        other.kill()
        other.wait()
    assert (code, other.returncode) == (0, 0), printed + said
    assert "2 processes" in printed
    assert re.search("following process 0", said)
    assert "listening" not in said
