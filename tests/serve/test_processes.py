"""One server over several processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.test_life import BODY, process


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
        other.communicate()
    assert (code, other.returncode) == (0, 0), printed + said
    assert "2 processes" in printed
    assert re.search("following process 0", said)
    assert "listening" not in said
