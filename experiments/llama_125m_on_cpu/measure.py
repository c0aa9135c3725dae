"""A Llama of 125 M parameters on one CPU device, beside transformers on torch: time of a decode step and of a prefill. Writes results.json.

    python -m experiments.llama_125m_on_cpu.measure [--torch-python PYTHON]      # about 3 minutes

The paged engine step (`partinf.transformer.step`) and `transformers` each live in a process of their own, with as many threads as there are
cores, and take turns: one round measures every case once on each side, so that what else the machine does meets both. Figures are medians
over the rounds, ratios medians of the rounds' ratios. Both see random weights of the same architecture: decode feeds one token to every
sequence after a context of 256, prefill is one prompt of 512. PYTHON needs torch and transformers; without it they are looked for here.

Once a round all cores read as much memory as the weights of a float32 step fill. The floor of a decode step is what its weights and its
context take at that rate, each read once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from experiments.results import machine, write
from partinf.model.weights import num_params

CASES = [("decode", 1), ("decode", 8), ("decode", 32), ("prefill", 512)]
DTYPES = ("float32", "bfloat16")
CONTEXT, PAGE, ROUNDS, CALLS = 256, 64, 7, 3


def ours(dtype: str, spread: str) -> dict[tuple[str, int], Callable[[], None]]:
    """The compiled steps of one dtype, each called with its own state."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from dataclasses import replace

    import jax
    import numpy as np

    from partinf import api
    from partinf.buckets import least_rows
    from partinf.partition.sharding import device_mesh
    from partinf.plans import Bucket, CacheConfig
    from partinf.transformer.batch import empty_batch, pack
    from partinf.transformer.params import random_params
    from partinf.transformer.step import compile_step, empty_state
    from partinf.workload import DType, Workload

    kind = DType.F32 if dtype == "float32" else DType.BF16
    plan = api.plan("llama-125m", "local", Workload(32, CONTEXT - 1, 1, weights=kind, kv=kind))
    plan = replace(plan, cache=CacheConfig(PAGE, 32 * CONTEXT // PAGE, 32), max_len=512)
    mesh = device_mesh(plan)
    params = random_params(plan, mesh, unrolled=True)

    def prepared(bucket: Bucket, fill: Callable[[Any], None]) -> Callable[[], None]:
        step, batch = compile_step(plan, mesh, bucket, unrolled=True), empty_batch(bucket, plan)
        fill(batch)
        held = [empty_state(plan, mesh, unrolled=True)]
        packed = jax.device_put(pack([batch]))

        def call() -> None:
            held[0], out = step(params, held[0], packed)
            out.tokens.block_until_ready()

        return call

    def decode(rows: int) -> Callable[[Any], None]:
        pages = CONTEXT // PAGE

        def fill(batch: Any) -> None:
            batch.decode.token[:rows], batch.decode.slot[:rows] = 5, np.arange(rows)
            batch.decode.position[:rows] = CONTEXT - 1
            batch.decode.tables[0].pages[:rows] = np.arange(rows * pages).reshape(rows, pages)

        return fill

    def prefill(tokens: int) -> Callable[[Any], None]:
        def fill(batch: Any) -> None:
            batch.prefill.token[:], batch.prefill.owner[:] = 3, 0
            batch.prefill.position[:] = np.arange(tokens)
            batch.prefill.page[0][:] = np.arange(tokens) // PAGE
            batch.prefill.last[0], batch.prefill.slot[0] = tokens - 1, 0

        return fill

    buckets = {
        "decode": lambda rows: Bucket(max(rows, least_rows(plan)), CONTEXT // PAGE),
        "prefill": lambda tokens: Bucket(prefill_tokens=tokens, prefill_slots=1),
    }
    fills = {"decode": decode, "prefill": prefill}
    return {(kind, size): prepared(buckets[kind](size), fills[kind](size)) for kind, size in CASES}


def theirs(dtype: str, spread: str) -> dict[tuple[str, int], Callable[[], None]]:
    """transformers with its dynamic cache, cut back to the context before every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    shape = json.loads(spread)
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["embed_dim"],
        intermediate_size=shape["ffn_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    vocab = shape["vocab_size"]

    def decode(rows: int) -> Callable[[], None]:
        with torch.inference_mode():
            past = model(torch.randint(0, vocab, (rows, CONTEXT - 1)), use_cache=True, logits_to_keep=1).past_key_values
        token = torch.randint(0, vocab, (rows, 1))

        def call() -> None:
            with torch.inference_mode():
                model(token, past_key_values=past, use_cache=True).logits[:, -1].argmax(-1)
                past.crop(CONTEXT - 1 - past.get_seq_length())  # a negative number of tokens to take off

        return call

    def prefill(tokens: int) -> Callable[[], None]:
        prompt = torch.randint(0, vocab, (1, tokens))

        def call() -> None:
            with torch.inference_mode():
                model(prompt, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)

        return call

    return {(kind, size): (decode if kind == "decode" else prefill)(size) for kind, size in CASES}


def reading_seconds(num_bytes: int) -> float:
    """Median seconds in which all cores read that many bytes of memory, each a part of them."""
    import numpy as np

    parts = np.array_split(np.ones(num_bytes // 4, np.float32), os.cpu_count() or 1)
    seconds = []
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(2 * CALLS + 1):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def worker(side: str, dtype: str, spread: str) -> None:
    """Answer every case that is asked for on standard input with the median seconds of a few calls."""
    calls = (ours if side == "ours" else theirs)(dtype, spread)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, size = line.split()
        call = calls[kind, int(size)]
        call()
        seconds = []
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds), flush=True)


class Side:
    """A worker process."""

    def __init__(self, python: str, side: str, dtype: str, spread: str) -> None:
        command = [python, str(Path(__file__).resolve()), "--worker", side, dtype, spread]
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._read() == "ready"

    def seconds(self, kind: str, size: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind} {size}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"a worker ended with {self._process.wait()}")
        return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch and transformers")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    from dataclasses import asdict

    from partinf.model.load import load_model_config

    config = load_model_config("llama-125m")
    spread = json.dumps({key: value for key, value in asdict(config).items() if isinstance(value, int)})
    matrices = num_params(config) - config.vocab_size * config.embed_dim  # the table is looked up
    of_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim  # keys and values
    rates = []
    found: dict[str, Any] = {"date": str(date.today()), "machine": machine(), "dtypes": {}}
    for dtype in DTYPES:
        sides = [Side(sys.executable, "ours", dtype, spread), Side(args.torch_python, "theirs", dtype, spread)]
        rounds: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in CASES}
        for number in range(ROUNDS):
            rates.append(4 * matrices / reading_seconds(4 * matrices))
            order = sides if number % 2 else sides[::-1]
            for case in CASES:
                times = {side: side.seconds(*case) for side in order}
                rounds[case].append((times[sides[0]], times[sides[1]]))
        for side in sides:
            side.close()
        found["dtypes"][dtype] = {
            f"{kind} {size}": {
                "partinf_ms": 1e3 * statistics.median(mine for mine, _ in pairs),
                "transformers_ms": 1e3 * statistics.median(other for _, other in pairs),
                "ratio": statistics.median(mine / other for mine, other in pairs),
                "rounds_ms": [[1e3 * mine, 1e3 * other] for mine, other in pairs],
            }
            for (kind, size), pairs in rounds.items()
        }
        for rows in (size for kind, size in CASES if kind == "decode"):
            num_bytes = (4 if dtype == "float32" else 2) * (matrices + rows * CONTEXT * of_token)
            found["dtypes"][dtype][f"decode {rows}"]["floor_ms"] = 1e3 * num_bytes / statistics.median(rates)
        for case, said in found["dtypes"][dtype].items():
            print(
                f"{dtype:9} {case:12} {said['partinf_ms']:8.1f} ms {said['transformers_ms']:8.1f} ms  ratio {said['ratio']:.2f}"
                + (f"  floor {said['floor_ms']:.1f} ms" if "floor_ms" in said else ""),
                flush=True,
            )
    found["reading_gb_s"] = statistics.median(rates) / 1e9
    write(__file__, found)


if __name__ == "__main__":
    main()
