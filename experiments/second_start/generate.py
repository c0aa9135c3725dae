"""A first and further starts of `partinf generate`, from the shell's call to its end, with their peaks of memory. Writes generate.json.

    python -m experiments.second_start.generate [--starts N]        # half a minute

Llama of 125 M parameters with random weights in float32, in a directory that is read from the page cache. Every start is a process of its
own that answers one prompt of five tokens with one. Before the first there are the CPU's kernels and the measured forms of products, and no
program.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.results import machine, write
from partinf import api
from partinf.checkpoint.hf import save_hf
from partinf.foundation.caches import DIRECTORY_VARIABLE, NATIVE
from partinf.partition.sharding import device_mesh
from partinf.transformer.kernels import choices
from partinf.transformer.params import random_params
from partinf.workload import DType, Workload

MODEL = "llama-125m"


def make(model: Path) -> None:
    """The model's directory."""
    plan = api.plan(MODEL, "local", Workload(1, 16, 16, weights=DType.F32, kv=DType.F32))
    save_hf(random_params(plan, device_mesh(plan), unrolled=True), plan.model, model)


def start(model: Path, cache: Path) -> dict[str, float]:
    """Wall and core seconds, and MB at most."""
    environment = os.environ | {DIRECTORY_VARIABLE: str(cache), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "partinf", "generate", "--model", str(model), "--prompt", "1 2 3 4 5", "--max-tokens", "1"]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"generate ended with {process.returncode}")
    return {
        "seconds": time.perf_counter() - started,
        "core_seconds": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss * 1024 / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="after the first (default: 5)")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make)
        return
    choices.current()
    native = choices.path()
    with tempfile.TemporaryDirectory() as folder:
        model, cache = Path(folder) / "model", Path(folder) / "cache"
        # In a process of its own: a start's peak counts what the process that starts it holds at that moment.
        subprocess.run([sys.executable, "-m", "experiments.second_start.generate", "--make", str(model)], check=True)
        cache.mkdir(mode=0o700)
        if native is not None:
            shutil.copytree(native.parent, cache / NATIVE, copy_function=shutil.copy2)
            (cache / NATIVE).chmod(0o700)
        found = [start(model, cache) for _ in range(1 + args.starts)]
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6
    first, *later = found
    medians = {name: statistics.median(each[name] for each in later) for name in first}
    results: dict[str, Any] = {"machine": machine(), "weights_mb": weights, "first": first, "later": later, "medians": medians}
    write(__file__, results, "generate.json")
    for name, each in (("first", first), ("later", medians)):
        print(f"{name}: {each['seconds']:.2f} s, {each['core_seconds']:.2f} s of a core, {each['peak_mb']:.0f} MB at most", flush=True)


if __name__ == "__main__":
    main()
