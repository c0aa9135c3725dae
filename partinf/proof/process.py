"""Runs the compiler in a process of its own, within bounds of time and memory, and leaves nothing behind.

Failures are distinguished: libtpu missing or of the wrong version (one line before anything starts), a program that the compiler
refuses, a compiler that crashes, runs out of its memory or takes too long.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from partinf.foundation import resources
from partinf.foundation.errors import InvalidInput
from partinf.foundation.extras import PROOF, missing
from partinf.hardware.platform import CPU, TPU, Platform
from partinf.hardware.slices import Slice
from partinf.plans import Bucket, Plan
from partinf.proof.worker import Job

_ENVIRONMENT = {
    **CPU.environment(1),
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
_WORKER = ("-m", "partinf.proof.worker")
# Settings of the calling process that would change what is compiled, or where.
_NOT_INHERITED = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "TF_")


class CompilerFailed(RuntimeError):
    """The compiler ended without an answer: a crash, or a bound that was exceeded."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one compilation."""

    seconds: float = 600.0
    memory_bytes: int = 16 << 30


@dataclass(frozen=True)
class Compiled:
    """The compiler's result.

    Attributes:
        program: the compiled text; empty when it refused. refusal: its message then. memory: bytes by kind.
    """

    compiler: str
    seconds: float
    memory: dict[str, int]
    program: str
    refusal: str = ""


def unavailable(platform: Platform = TPU) -> str | None:
    """One line on why nothing can be proven on this installation for chips of this platform, or None."""
    absent = missing(PROOF, "a proof")
    if absent or not platform.described:
        return absent
    try:
        libtpu = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return "the TPU compiler is not installed: pip install 'partinf[proof]' (libtpu, Linux x86-64 only)"
    wanted = [re.match(r"libtpu\s*==\s*([\d.]+?)(\.\*)?\s*;", line) for line in metadata.requires("jax") or ()]
    versions = [match[1] for match in wanted if match]
    if versions and not any((libtpu + ".").startswith(version + ".") for version in versions):
        return f"libtpu {libtpu} does not match jax {metadata.version('jax')}, which needs {versions[0]}.*: pip install 'partinf[proof]'"
    return None


def compile_bucket(plan: Plan, bucket: Bucket, limits: Limits, by_compiler: bool = False) -> Compiled:
    """Compile one step, or its twin that the compiler partitions.

    Raises:
        InvalidInput: libtpu is missing or does not match jax, or the compiler knows no such slice.
        CompilerFailed: the compiler crashed or exceeded a bound.
    """
    reason = unavailable(plan.slice.chip.platform)
    if reason:
        raise InvalidInput(reason)
    with tempfile.TemporaryDirectory(prefix="partinf-proof-") as name:
        directory = Path(name)
        (directory / "job").write_bytes(pickle.dumps(Job(plan, bucket, limits.memory_bytes, by_compiler)))
        code, errors = _run(directory, limits.seconds, _environment(plan.slice))
        if not (directory / "result.json").is_file():
            raise CompilerFailed(f"{_ending(code, errors)}; it was allowed {limits.memory_bytes / 2**30:.3g} GiB of memory")
        result = json.loads((directory / "result.json").read_text())
        program = directory / "program"
        text = program.read_text() if program.is_file() else ""
    if "refused" in result:
        return _refused(result)
    return Compiled(result["compiler"], result["compile_seconds"], result["memory"], text)


def _environment(slice_: Slice) -> dict[str, str]:
    """What the worker's jax finds: no accelerator but the one to compile for, of which nothing is reserved."""
    platform = slice_.chip.platform
    return _ENVIRONMENT | (platform.environment(slice_.num_devices) if platform.virtual else {}) | dict(platform.proof_environment)


def _run(directory: Path, seconds: float, environment: dict[str, str]) -> tuple[int, str]:
    """Run the worker in a session of its own, so that whatever it starts ends with it; its exit code and the end of its errors."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_INHERITED)}
    environment = {**kept, **environment, "TMPDIR": str(directory), "PYTHONPATH": resources.python_path()}
    with (directory / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *_WORKER, str(directory)],
            env=environment,
            cwd=directory,
            stdin=subprocess.PIPE,  # nothing is written; the worker ends when it closes
            stdout=errors,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise CompilerFailed(f"the compiler was stopped after {seconds:.0f} s, the bound on one compilation") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdin:
                process.stdin.close()
        errors.seek(0)
        return code, errors.read()[-4000:]


def _ending(code: int, errors: str) -> str:
    if code < 0:
        how = f"crashed with {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code} and no answer"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    message = next((line for line in reversed(lines) if re.search(r"check failed|error|exception|fatal|alloc", line, re.IGNORECASE)), "")
    return f"the compiler {how}" + (f": {message[:300]}" if message else "")


def _refused(result: dict[str, Any]) -> Compiled:
    """A program that does not fit is an answer; what else the compiler or our own checks raise is not."""
    message = result["message"]
    if result["refused"] == InvalidInput.__name__:
        raise InvalidInput(message.splitlines())
    if "RESOURCE_EXHAUSTED" not in message:
        raise CompilerFailed(f"the compiler failed: {message.splitlines()[0] if message else result['refused']}")
    return Compiled(f"libtpu {metadata.version('libtpu')}, jax {metadata.version('jax')}", 0.0, {}, "", message)
