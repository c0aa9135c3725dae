"""A second start of a command loads what the first compiled, with jax's own cache of compilations on, as the command line sets it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from partinf.cli import main
from partinf.transformer.kernels import cpu as cpu_kernels


def test_a_second_bench_loads_every_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert os.environ["JAX_COMPILATION_CACHE_DIR"]
    cpu_kernels.available()
    (tmp_path / "native").symlink_to(cpu_kernels._library().parent)  # made once for all tests
    monkeypatch.setenv("PARTINF_CACHE_DIR", str(tmp_path))

    def bench() -> tuple[int, int, int]:
        load = ["--requests", "4", "--max-batch", "4", "--lengths", "fixed:8:4", "--arrivals", "poisson:100"]
        assert main(["bench", "--model", "demo", "--slice", "cpu:1", *load, "--format", "json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["programs"], found["programs_loaded"], found["compiled_while_serving"]

    programs, loaded, _ = bench()
    assert programs > 0
    assert loaded == 0
    assert bench() == (0, programs, 0)
