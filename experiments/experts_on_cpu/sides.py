"""The two sides of the comparison: a decode step of some rows by the compiled paged step here, and by transformers with each of its ways
to multiply experts.

This file runs under the interpreter of each side and imports nothing of the library but on the library's own.

    PYTHON sides.py make FOLDER                   # writes a model with random weights, by transformers
    PYTHON sides.py partinf|transformers TYPE FOLDER      # answers a line `WAY ROWS` with the median seconds of a few calls

transformers' side answers `bandwidth 0` with bytes per second, and `hits ROWS` with how many experts the rows hit, in all layers.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

CONTEXT, CALLS, PAGE = 256, 9, 64
SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
WAYS = ("eager", "batched_mm", "grouped_mm")
Call = Callable[[], object]


def tokens(rows: int) -> list[int]:
    """The last token of every row: all different."""
    return random.Random(0).sample(range(SHAPE["vocab_size"]), rows)


def context(rows: int) -> list[int]:
    """What stands before the last token, in every row: which experts rows go through depends on it."""
    return random.Random(rows).choices(range(SHAPE["vocab_size"]), k=CONTEXT - 1)


def partinf(dtype: str, folder: str) -> Callable[[str, int], float]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from dataclasses import replace

    import jax
    import numpy as np

    from partinf import api
    from partinf.checkpoint.hf import load_hf
    from partinf.partition.sharding import device_mesh
    from partinf.plans import Bucket, CacheConfig
    from partinf.transformer.batch import empty_batch, pack
    from partinf.transformer.params import abstract_params
    from partinf.transformer.step import compile_step, empty_state
    from partinf.workload import DType, Workload

    kind = {"float32": DType.F32, "bfloat16": DType.BF16}[dtype]
    plan = api.plan(folder, "local", Workload(32, CONTEXT - 1, 1, weights=kind, kv=kind))
    mesh = device_mesh(plan)
    params = load_hf(folder, plan.model, abstract_params(plan, mesh, unrolled=True))

    @cache
    def made(rows: int) -> Call:
        pages = CONTEXT // PAGE
        sized, bucket = replace(plan, cache=CacheConfig(PAGE, rows * pages, rows), max_len=CONTEXT), Bucket(rows, pages)
        held = [empty_state(sized, mesh, unrolled=True)]
        prompts = Bucket(prefill_tokens=CONTEXT, prefill_slots=1)
        step, batch = compile_step(sized, mesh, prompts, unrolled=True), empty_batch(prompts, sized)
        at = np.arange(CONTEXT - 1)
        batch.prefill.token[at], batch.prefill.owner[at], batch.prefill.position[at], batch.prefill.last[0] = context(rows), 0, at, at[-1]
        for row in range(rows):
            batch.prefill.page[0][at], batch.prefill.slot[0] = row * pages + at // PAGE, row
            held[0], _ = step(params, held[0], jax.device_put(pack([batch])))
        step, batch = compile_step(sized, mesh, bucket, unrolled=True), empty_batch(bucket, sized)
        batch.decode.token[:], batch.decode.slot[:], batch.decode.position[:] = tokens(rows), np.arange(rows), CONTEXT - 1
        batch.decode.tables[0].pages[:] = np.arange(rows * pages).reshape(rows, pages)
        packed = jax.device_put(pack([batch]))

        def call() -> None:
            held[0], out = step(params, held[0], packed)
            out.tokens.block_until_ready()

        return call

    return lambda way, rows: timed(made(rows))


def transformers(dtype: str, folder: str) -> Callable[[str, int], float]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @cache
    @torch.inference_mode()
    def made(rows: int) -> Callable[..., Any]:
        prompt = torch.tensor([context(rows)])
        past = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        past.batch_repeat_interleave(rows)
        token = torch.tensor(tokens(rows))[:, None]

        @torch.inference_mode()
        def call(**options: Any) -> Any:
            found = model(token, past_key_values=past, use_cache=True, **options)
            found.logits[:, -1].argmax(-1)
            past.crop(CONTEXT - 1 - past.get_seq_length())  # a negative number of tokens to take off
            return found

        return call

    def hits(rows: int) -> int:
        routers = made(rows)(output_router_logits=True).router_logits
        return sum(len(set(layer.topk(SHAPE["num_experts_per_tok"]).indices.flatten().tolist())) for layer in routers)

    def bandwidth() -> float:
        x = torch.ones(1 << 26)
        return 4 * x.numel() / min(elapsed(x.sum) for _ in range(7))

    def answer(way: str, rows: int) -> float:
        if way in ("bandwidth", "hits"):
            return bandwidth() if way == "bandwidth" else hits(rows)
        model.set_experts_implementation(way)
        return timed(made(rows))

    return answer


def timed(call: Call) -> float:
    """The median of a few calls after one."""
    call()
    return statistics.median(elapsed(call) for _ in range(CALLS))


def elapsed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def make(folder: str) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE)).save_pretrained(folder)


def main() -> None:
    if sys.argv[1] == "make":
        return make(sys.argv[2])
    side, dtype, folder = sys.argv[1:]
    answer = {"partinf": partinf, "transformers": transformers}[side](dtype, folder)
    print("ready", flush=True)
    for line in sys.stdin:
        way, rows = line.split()
        print(answer(way, int(rows)), flush=True)
    return None


if __name__ == "__main__":
    main()
