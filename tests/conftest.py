"""The environment of the tests, set before anything imports jax: a pure test never does, and a jax test finds it all in place.

Variables that are set already win, so that a run on an accelerator is `JAX_PLATFORMS=tpu pytest …`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
_CACHE = ROOT / ".cache"

_QUICK_COMPILATION = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it does not know, and newer ones may not know these
    _QUICK_COMPILATION += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]

_ENVIRONMENT = {
    # With libtpu installed and no TPU, jax would look for one and complain.
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # A fifth of the compilation time; what the tests check does not depend on how well the CPU code is optimised.
    "XLA_FLAGS": " ".join(_QUICK_COMPILATION),
    # Compiling is most of the time of the suite, and most programs do not change between two runs.
    "JAX_COMPILATION_CACHE_DIR": str(_CACHE / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Tests of the cache of compiled steps name a directory of their own.
    "PARTINF_CACHE_DIR": "off",
    "HYPOTHESIS_STORAGE_DIRECTORY": str(_CACHE / "hypothesis"),
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# Whatever is set: no hardware file of the user may change what a test plans.
os.environ["XDG_CONFIG_HOME"] = str(_CACHE / "config")

# An example that compiles takes seconds the first time and nothing the second, so a deadline only makes tests flaky.
settings.register_profile("partinf", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("partinf")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def relaxed_promotion() -> Iterator[None]:
    """For tests that run other libraries' code (flax, optax), which mixes dtypes and ranks as numpy does."""
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def nothing_compiles() -> Callable[[], AbstractContextManager[None]]:
    """`with nothing_compiles(): …` fails when jax compiles anything meanwhile, in whatever thread, a step of the engine or an addition."""
    import jax

    @contextmanager
    def watched() -> Iterator[None]:
        compiled: list[object] = []

        def hear(event: str, seconds: float, **more: object) -> None:
            if "backend_compile" in event:
                compiled.append(more.get("fun_name", event))

        jax.monitoring.register_event_duration_secs_listener(hear)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(hear)
        assert compiled == []

    return watched


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run an interpreter of its own on this checkout: `run_python("-c", code)`; what it exits with is the caller's to check."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
