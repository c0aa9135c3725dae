"""What int8 weights and an int8 cache do to the demo model: right answers, and the error of its logits. Writes results.json.

    python -m experiments.int8_on_demo.measure        # about a minute

Answers are greedy, through the engine. Logits are compared with those of float32 under teacher forcing: every type is fed the same
tokens one by one, so that whatever it stored of earlier ones is read back from its cache.
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from experiments.results import write
from partinf.buckets import Capacity, with_capacity
from partinf.checkpoint.hf import load_hf
from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.demo_tasks import check, mixed_tasks
from partinf.engine.engine import Engine
from partinf.engine.request import SamplingParams
from partinf.execution.runner import JaxRunner
from partinf.foundation import resources
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.partition.sharding import device_mesh
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.transformer.batch import empty_batch, pack
from partinf.transformer.cache import cache_bytes_per_device
from partinf.transformer.params import abstract_params, params_bytes_per_device
from partinf.transformer.step import compile_step, empty_state
from partinf.workload import DType

DEMO = resources.find("models", "demo")
TYPES = {
    "float32": (DType.F32, DType.F32),
    "bfloat16": (DType.BF16, DType.BF16),
    "bfloat16, int8 cache": (DType.BF16, DType.INT8),
    "int8 weights": (DType.INT8, DType.BF16),
    "int8 weights and cache": (DType.INT8, DType.INT8),
}
TASKS, LANES, PAGE, PAGES = 1000, 64, 16, 4


def make_plan(weights: DType, kv: DType) -> Plan:
    return Plan(load_model_config("demo"), parse_slice("cpu:1"), make_layout({"x": "ffn"}, {"x": "heads"}), weights=weights, kv=kv)


def right_answers(plan: Plan, params: Any, tokenizer: Any) -> float:
    """Share of tasks that are answered exactly."""
    plan = with_capacity(plan, Capacity(max_rows=32, max_len=PAGES * PAGE, prefill_tokens=128, random=False))
    tasks = list(mixed_tasks(TASKS, seed=31))
    outputs = Engine(JaxRunner(plan, params), tokenizer=tokenizer).generate([task.prompt for task in tasks], SamplingParams(max_tokens=32))
    return sum(check(task, output.text) for task, output in zip(tasks, outputs, strict=True)) / TASKS


def forced_logits(plan: Plan, params: Any, texts: list[list[int]]) -> np.ndarray:
    """Logits [positions, V] after every token of every text."""
    plan = Plan(plan.model, plan.slice, plan.layout, weights=plan.weights, kv=plan.kv, cache=CacheConfig(PAGE, LANES * PAGES, LANES))
    bucket, mesh = Bucket(LANES, PAGES), device_mesh(plan)
    step, state, found = compile_step(plan, mesh, bucket, unrolled=True, with_logits=True), empty_state(plan, mesh, unrolled=True), []
    for position in range(max(map(len, texts)) - 1):
        batch, lanes = empty_batch(bucket, plan), [lane for lane, text in enumerate(texts) if position < len(text) - 1]
        for lane in lanes:
            batch.decode.token[lane], batch.decode.slot[lane], batch.decode.position[lane] = texts[lane][position], lane, position
            batch.decode.tables[0].pages[lane] = np.arange(lane * PAGES, (lane + 1) * PAGES)
        state, out = step(params, state, jax.device_put(pack(batch)))
        found.append(np.asarray(out.logits)[lanes, : plan.model.vocab_size])
    return np.concatenate(found)


def main() -> None:
    tokenizer = load_tokenizer(DEMO)
    texts = [tokenizer.encode(f"{task.prompt}{task.answer}") for task in mixed_tasks(LANES, seed=32)]
    results, reference = {}, None
    for name, (weights, kv) in TYPES.items():
        plan = make_plan(weights, kv)
        params = load_hf(DEMO, plan.model, abstract_params(plan, device_mesh(plan), unrolled=True))
        logits = forced_logits(plan, params, texts)
        reference = logits if reference is None else reference
        error = np.abs(logits - reference)
        results[name] = {
            "right_answers": right_answers(plan, params, tokenizer),
            "positions": len(logits),
            "logit_deviation": float(reference.std()),
            "largest_error": float(error.max()),
            "root_mean_square_error": float(np.sqrt((error**2).mean())),
            "same_first_choice": float((logits.argmax(-1) == reference.argmax(-1)).mean()),
            "parameter_bytes": params_bytes_per_device(plan),
            "cache_bytes_per_token": cache_bytes_per_device(plan) / (plan.cache.pages_per_shard * plan.cache.page_size),
        }
        print(name, json.dumps(results[name]), flush=True)
    write(__file__, results)


if __name__ == "__main__":
    main()
