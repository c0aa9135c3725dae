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

PLAN = """
model = "demo"
slice = "cpu:2x2"
weights = "f32"
kv = "f32"
axes = { x = "embed", y = "ffn" }
decode = { attention = { x = "batch", y = "heads" } }
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_serve_one_model(root: Path, tmp_path: Path, count: int) -> None:
    """Each holds its part of the model; the answers are those of one. Four serve a saved plan, as four hosts of a slice do."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (tmp_path / "plan.toml").write_text(PLAN)
    where = ["--plan", tmp_path / "plan.toml"] if count == 4 else ["--model", "demo", "--slice", "cpu:2"]
    command = ["-m", "partinf", "serve", *where, "--max-model-len", 64]
    command += ["--max-num-seqs", 4, "--port", 0, "--coordinator", f"127.0.0.1:{port}", "--num-processes", count]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    others = [
        subprocess.Popen(
            [sys.executable, *map(str, command), "--process-id", str(number)],
            env={**environment, "PYTHONPATH": str(root)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(1, count)
    ]
    texts = []
    try:
        with process(root, *command, "--process-id", 0, JAX_NUM_CPU_DEVICES=None) as server:
            server.wait_ready(240)
            for text in ("s e c r e t", "a b c"):
                status, content = server.ask("POST", "/v1/completions", BODY | {"prompt": f"copy: {text} =", "ignore_eos": False})
                assert status == 200
                assert f'"text":" {text}"' in content
            server.child.send_signal(signal.SIGTERM)
            code, printed = server.end()
        texts = [other.communicate(timeout=60)[1] for other in others]
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert (code, *(other.returncode for other in others)) == (0,) * count, printed + "".join(texts)
    assert f"{count} processes" in printed
    for number, text in enumerate(texts, start=1):
        assert re.search(rf"process {number} \(.*\) of {count}, following process 0", text)
        assert "listening" not in text
