"""The compiling process: reads a job, compiles it, writes what came out, and ends.

It has a process of its own because libtpu wants its environment before jax is imported, may be loaded once per process, and may crash.
Run as `python -m partinf.proof.worker DIRECTORY`; the job lies in DIRECTORY/job, results go there.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partinf.plans import Bucket, Plan


@dataclass(frozen=True)
class Job:
    """One compilation.

    Attributes:
        memory_bytes: how much data the process may hold.
        by_compiler: compile the twin that the compiler partitions (`partinf.transformer.compiler_partitioned`).
    """

    plan: Plan
    bucket: Bucket
    memory_bytes: int
    by_compiler: bool = False


def main(directory: Path) -> None:
    """Compile the job of a directory; whatever the compiler refuses is a result, not a failure."""
    job: Job = pickle.loads((directory / "job").read_bytes())
    _end_with_parent(directory)
    resource.setrlimit(resource.RLIMIT_DATA, (job.memory_bytes, job.memory_bytes))
    try:
        result = _compile(job, directory)
    except Exception as error:
        result = {"refused": type(error).__name__, "message": str(error)}
    (directory / "result.json").write_text(json.dumps(result))


def _compile(job: Job, directory: Path) -> dict[str, Any]:
    import jax

    from partinf.proof.topology import mesh_of
    from partinf.transformer.compiler_partitioned import compile_partitioned
    from partinf.transformer.step import compile_step

    mesh, platform = mesh_of(job.plan), job.plan.slice.chip.platform
    compiler = (
        f"{f'libtpu {_libtpu_version()}' if platform.described else f'XLA for {mesh.devices.flat[0].device_kind}'}, jax {jax.__version__}"
    )
    start = time.monotonic()
    compile_program = compile_partitioned if job.by_compiler else compile_step
    compiled: Any = compile_program(job.plan, mesh, job.bucket, job.plan.unrolled)  # as `partinf.load` does
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    (directory / "program").write_text(compiled.as_text())
    kinds = ("argument", "output", "alias", "temp", "generated_code")
    return {
        "compiler": compiler,
        "compile_seconds": seconds,
        "memory": {kind: getattr(memory, f"{kind}_size_in_bytes") for kind in kinds},
    }


def _end_with_parent(directory: Path) -> None:
    """When the process that waits for this one ends in whatever way, its end of our standard input closes: nothing is left behind then."""

    def watch() -> None:
        while os.read(0, 1):  # not by sys.stdin, whose lock would be held when the interpreter ends
            pass
        while directory.exists():  # the compiler may be writing
            shutil.rmtree(directory, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _libtpu_version() -> str:
    from importlib.metadata import version

    return version("libtpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
