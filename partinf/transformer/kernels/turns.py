"""Times of every form of a product on this machine, measured so that other work on it does little.

Forms take turns in a process of their own that stays on one core; what counts is the core's time and not the clock's, and of several turns
the least. It is divided by the cores that work at once: all of them for kernels of ours, which cut every product up, and for XLA with many
rows; with few, which it makes on one core where the matrix is no large one, as many as it is seen to use. So the order of the
forms is right on a busy machine too. What other processes took meanwhile is returned with the times.

    python -m partinf.transformer.kernels.turns         # prints them, for `take_turns`
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partinf.hardware.platform import CPU, Form
from partinf.transformer.kernels import products

ROWS = (1, 4, 16, 64, 256)
_FEW = 16  # rows up to which forms that take few are measured
_ON_ONE_CORE = 64  # rows up to which XLA may use one core
_SIZE = 1024  # inputs and outputs
_BYTES, _FLOPS = 8 << 20, 1.5e9  # of weights that one call reads, more than a core's own caches hold, and of its arithmetic at most
_ROUNDS, _SPREAD = (3, 12), 0.15  # at least and at most, and how much the two least times of the best form may differ
_HOPELESS = 2.0  # times the best: no more turns
_SECONDS, _WAIT = 15.0, 120.0  # of the process, after which what is missing counts as unsettled; and of the clock, after which all is
_DTYPES = {"f32": (jnp.float32, jnp.float32), "bf16": (jnp.bfloat16, jnp.bfloat16), "int8": (jnp.int8, jnp.bfloat16)}


@dataclass(frozen=True)
class Times:
    """Seconds of one product [rows, 1024] · [1024, 1024] in one form on all cores of an idle machine, by rows."""

    kind: str
    form: Form
    measured: tuple[tuple[int, float], ...]

    def seconds(self, rows: float) -> float:
        """At any number of rows: along a line between the logarithms, and in proportion beyond the last; never for fewer than the first."""
        points = self.measured
        if not points or rows < points[0][0]:
            return math.inf
        for (fewer, less), (more, longer) in itertools.pairwise(points):
            if rows <= more:
                part = math.log(rows / fewer) / math.log(more / fewer)
                return less ** (1 - part) * longer**part
        return points[-1][1] * rows / points[-1][0]

    @staticmethod
    def read(stored: dict[str, Any]) -> Times:
        return Times(str(stored["kind"]), Form(stored["form"]), tuple((int(rows), float(seconds)) for rows, seconds in stored["measured"]))


@dataclass(frozen=True)
class Measured:
    """The times of all forms. `unsettled`: types for which they did not settle. `others`: the share of all cores that other processes took
    meanwhile; 0 where the system does not say."""

    times: tuple[Times, ...] = ()
    unsettled: tuple[str, ...] = ()
    others: float = 0.0


def take_turns() -> Measured:
    """What a process of its own measures; nothing settles where that fails."""
    root = str(Path(__file__).resolve().parents[3])
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    environment |= CPU.environment(1) | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with suppress(OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        command = [sys.executable, "-m", __name__]
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=_WAIT)
        found = json.loads(done.stdout)
        times = tuple(Times.read(each) for each in found["times"])
        return Measured(times, tuple(map(str, found["unsettled"])), float(found["others"]))
    return Measured(unsettled=tuple(CPU.products or {}))


def main() -> None:
    print(json.dumps(asdict(measured())))


def measured(rows: Sequence[int] = ROWS, seconds: float = _SECONDS) -> Measured:
    """The times of all forms in this process."""
    began, busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
    deadline = own + seconds
    found: list[Times] = []
    unsettled = []
    for kind in CPU.products or {}:
        weights = _weights(kind)
        least: dict[Form, list[tuple[int, float]]] = {form: [] for form in products.forms(kind)}
        for count in rows:
            times, settled = _cell(kind, count, weights, deadline)
            for form, took in times.items():
                least[form].append((count, took))
            if not settled:
                unsettled.append(kind)
                break
        found += [Times(kind, form, tuple(points)) for form, points in least.items()]
    others = _busy_seconds() - busy - (time.process_time() - own)
    share = max(0.0, others) / (time.perf_counter() - began) / (os.cpu_count() or 1)
    return Measured(tuple(found), tuple(unsettled), round(share, 3))


def _busy_seconds() -> float:
    """Seconds that all cores together have worked, or were taken from this machine by the one that it runs on; 0 where nothing says so."""
    try:
        user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _cell(kind: str, rows: int, weights: list[jax.Array], deadline: float) -> tuple[dict[Form, float], bool]:
    """Least seconds of every form for one number of rows, and whether those of the best came twice."""
    few = {Form.ROWS, Form.ROWS_OF_PAIRS} if rows > _FEW else set()
    number = max(1, min(len(weights), int(_FLOPS / (2 * rows * _SIZE**2))))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, _SIZE)), _DTYPES[kind][1])
    calls = {form: _call(form, x, weights[:number]) for form in products.forms(kind) if form not in few}
    times: dict[Form, list[float]] = {form: [] for form in calls}
    cores = _usable()
    together = {form: len(cores) if products.leaves_out(form) or rows > _ON_ONE_CORE else _seen_cores(call) for form, call in calls.items()}

    def least(form: Form) -> float:
        return min(times[form], default=math.inf) / together[form]

    _stay_on({min(cores)})
    for turn in range(_ROUNDS[1]):
        best = min(map(least, calls))
        for form, call in calls.items():
            if turn == 0 or least(form) <= _HOPELESS * best:
                started = time.process_time()
                call()
                times[form].append((time.process_time() - started) / number)
        first, second = sorted(times[min(calls, key=least)])[:2] if turn else (0.0, math.inf)
        settled = second <= (1 + _SPREAD) * first
        if time.process_time() > deadline or (settled and turn + 1 >= _ROUNDS[0]):
            break
    _stay_on(cores)
    return {form: least(form) for form in calls}, settled


def _seen_cores(call: Callable[[], None]) -> float:
    """How many cores a call uses at once: at most, of a few calls, since others may use some of them meanwhile."""
    found = 1.0
    for _ in range(_ROUNDS[0]):
        started, own = time.perf_counter(), time.process_time()
        call()
        found = max(found, (time.process_time() - own) / (time.perf_counter() - started))
    return min(found, len(_usable()))


def _usable() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _stay_on(cores: set[int]) -> None:
    """Keep all threads of this process on these cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # it has ended
                os.sched_setaffinity(int(task.name), cores)


def _call(form: Form, x: jax.Array, weights: list[jax.Array]) -> Callable[[], None]:
    """Products of x with each of these matrices, one after the other."""

    def run(x: jax.Array, *weights: jax.Array) -> jax.Array:
        products_of = (products.made(form, x, matrix, dtype=jnp.float32 if matrix.dtype == jnp.int8 else x.dtype) for matrix in weights)
        return jnp.concatenate([jax.lax.optimization_barrier(product)[:1, :1] for product in products_of])

    compiled = jax.jit(run).lower(x, *weights).compile()

    def call() -> None:
        jax.block_until_ready(compiled(x, *weights))

    call()
    return call


def _weights(kind: str) -> list[jax.Array]:
    dtype = jnp.dtype(_DTYPES[kind][0])
    rng = np.random.default_rng(1)
    values = rng.integers(-127, 128, (_SIZE, _SIZE)).astype(np.int8)
    return [jnp.asarray(values, dtype) + 0 for _ in range(max(1, _BYTES // (_SIZE**2 * dtype.itemsize)))]


if __name__ == "__main__":
    main()
