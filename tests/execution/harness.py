"""Drives one compiled step through prefill, chunks over earlier context, mixed steps and decode, and compares with the reference.

In a pipeline every tick takes the next step on the first stage, so that as many of them as stages are in flight.

One program per layout: a bucket with decode lanes, prompt tokens and earlier pages, of which a step leaves empty what it does not need.
Sequences have ragged lengths, pages come in random order, and every sampled row's logits are compared.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partinf.buckets import runner_limits
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import DecodeRow, PageTable, PrefillChunk, RowSampling, Step
from partinf.execution.place import place_step
from partinf.foundation.paging import first_page, most_pages
from partinf.foundation.rounding import round_up
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.model.config import ModelConfig
from partinf.model.weights import declare_layers, group_name
from partinf.partition.quantize import Quantized, quantize
from partinf.partition.sharding import device_mesh
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.transformer import reference
from partinf.transformer.batch import pack
from partinf.transformer.params import abstract_params, random_params
from partinf.transformer.step import compile_step, empty_state
from partinf.workload import DType

# Largest difference of a logit from the float32 reference; logits here are of order 1.
TOLERANCE = {"f32": 1e-4, "bf16": 1e-1, "int8": 3e-1}

MODEL = ModelConfig("tiny", 2, 64, 64, 8, 2, 8, 250, tied_embeddings=True, max_len=64)
_LANES, _TOKENS, _SLOTS, _PAGE = 8, 16, 8, 2
_MAX_LEN = 12
_CHUNK = 5  # tokens of a prompt in a step
_PAGES = _MAX_LEN // _PAGE


def make_plan(
    mesh: str,
    layout: Layout,
    model: ModelConfig = MODEL,
    prefill_from_tokens: int = 1 << 30,
    dtype: DType = DType.F32,
    kv: DType | None = None,
    padded_heads: int = 0,
) -> Plan:
    """A plan of the harness's sizes over 8 virtual devices."""
    plan = Plan(
        model,
        parse_slice("cpu:8", mesh),
        layout,
        weights=dtype,
        kv=dtype if kv is None else kv,
        max_len=_MAX_LEN,
        cache=CacheConfig(_PAGE, 128, _LANES),
        prefill_from_tokens=prefill_from_tokens,
        padded_heads=padded_heads,
    )
    lanes_read, slots_read = (-(-_PAGES // multiple) * multiple for multiple in (plan.num_sequence_shards, plan.prefill_page_multiple()))
    return dataclasses.replace(plan, buckets=(Bucket(_LANES, lanes_read, _TOKENS, _SLOTS, slots_read),))


@functools.cache
def host_params(model: ModelConfig) -> dict:
    """Random parameters on the host, in separate layers; norms not all ones, biases not all zero."""
    from partinf.layout.files import make_layout

    plan = Plan(model, parse_slice("cpu:1"), make_layout({"x": "replica"}, {"x": "batch"}), weights=DType.F32, kv=DType.F32)
    params = jax.tree.map(np.asarray, random_params(plan, device_mesh(plan), unrolled=True, seed=7))
    rng = np.random.default_rng(3)

    def vary(path: tuple, leaf: np.ndarray) -> np.ndarray:
        name = path[-1].key
        if name.endswith("bias") or name.startswith("b") or name == "sinks":
            return rng.normal(size=leaf.shape).astype(leaf.dtype)
        return leaf + rng.uniform(-0.5, 0.5, leaf.shape).astype(leaf.dtype) if "norm" in name else leaf

    return jax.tree_util.tree_map_with_path(vary, params)


def place_params(plan: Plan, mesh: jax.sharding.Mesh, params: dict, unrolled: bool) -> dict:
    """Host parameters on a mesh, layers separate or stacked."""
    layers = tuple({name: pad_heads(leaf, name, plan) for name, leaf in layer.items()} for layer in params["layers"])
    params = params | {"layers": layers}
    if not unrolled:
        params = params | {"layers": _stacked(plan, layers)}

    def place(want: jax.ShapeDtypeStruct | Quantized, leaf: np.ndarray) -> jax.Array | Quantized:
        if isinstance(want, Quantized):
            return jax.tree.map(lambda one, part: jax.device_put(part, one.format), want, quantize(leaf, want.contracted))
        return jax.device_put(leaf.astype(want.dtype), want.format)

    return jax.tree.map(place, abstract_params(plan, mesh, unrolled), params, is_leaf=lambda x: isinstance(x, Quantized))


def _stacked(plan: Plan, layers: tuple[dict, ...]) -> dict:
    """Separate layers as the parameter tree stacks them: those with the same weights together."""
    groups = declare_layers(plan.model)
    stacks = []
    for group in groups:
        alike = [layer for layer, kind in zip(layers, plan.model.kind_of_layers, strict=True) if kind in group.kinds]
        stacks.append(jax.tree.map(lambda *leaves: np.stack(leaves), *alike))
    return stacks[0] if len(groups) == 1 else {group_name(number): stack for number, stack in enumerate(stacks)}


def pad_heads(leaf: np.ndarray, name: str, plan: Plan) -> np.ndarray:
    """Zero heads after the model's own."""
    dims = {"wq": {0: "H"}, "wkv": {1: "K"}, "wo": {1: "HQ"}, "bq": {0: "H"}, "bkv": {1: "K"}, "sinks": {0: "H"}}.get(name, {})
    model, padded = plan.model, plan.padded_model
    extra = {"H": padded.num_heads - model.num_heads, "K": padded.num_kv_heads - model.num_kv_heads}
    extra["HQ"] = extra["H"] * model.head_dim
    return np.pad(leaf, [(0, extra[dims[dim]]) if dim in dims else (0, 0) for dim in range(leaf.ndim)])


@functools.cache
def sequences(vocab: int) -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng(11)
    return tuple(tuple(rng.integers(0, vocab, size=rng.integers(5, _MAX_LEN)).tolist()) for _ in range(_LANES))


@functools.cache
def expected_logits(model: ModelConfig) -> np.ndarray:
    """The reference's logits [sequence, position, V]."""
    rows = [list(tokens) + [0] * (_MAX_LEN - len(tokens)) for tokens in sequences(model.vocab_size)]
    return np.asarray(jax.jit(reference.forward, static_argnums=1)(host_params(model), model, jnp.asarray(rows)))


@dataclass
class _Progress:
    """One sequence on its way: how much of it has been fed; the last `decoded` tokens are fed one by one."""

    tokens: tuple[int, ...]
    shard: int
    pages: tuple[int, ...]
    prompt: int
    fed: int = 0

    def tables(self, query: int, end: int, limits: RunnerLimits) -> tuple[PageTable, ...]:
        """Of every group the pages up to a position, from those that a query sees; a window's are written anew once it has passed them."""
        tables = []
        for group in limits.groups:
            first = first_page(query, group.window, _PAGE) if group.window else 0
            most = round_up(most_pages(group.window - 1 + _CHUNK, _PAGE), limits.num_sequence_shards) if group.window else _PAGES
            ids = tuple(self.pages[page % min(most, _PAGES)] for page in range(first, -(-end // _PAGE)))
            tables.append(PageTable(ids, first))
        return tuple(tables)


def largest_error(plan: Plan, seed: int = 0, unrolled: bool = False, compiler: Callable[..., Any] = compile_step) -> float:
    """Run all sequences through the plan's step; the largest difference of any sampled row's logits from the reference."""
    mesh, rng = device_mesh(plan), random.Random(seed)
    model = plan.model
    params = place_params(plan, mesh, host_params(model), unrolled)
    (bucket,) = plan.buckets
    step = compiler(plan, mesh, bucket, unrolled, with_logits=True)
    state, limits = empty_state(plan, mesh, unrolled), runner_limits(plan)
    progress = _start(plan, rng)
    want, worst, compared = expected_logits(model), 0.0, 0
    pipeline = deque([Step()] * plan.num_stages, maxlen=plan.num_stages)  # the newest step first, on the first stage
    for _ in range(40):
        pipeline.appendleft(_next_step(progress, plan, rng))
        if not any(pipeline):
            break
        placed = [place_step(each, bucket, plan, limits) for each in pipeline]
        state, out = step(params, state, pack([each.batch for each in placed]))
        todo, placed = pipeline[-1], placed[-1]
        logits, tokens = np.asarray(out.logits)[:, : model.vocab_size], np.asarray(out.tokens)
        rows = [(placed.decode_rows[i], row.slot, row.position) for i, row in enumerate(todo.decode)]
        rows += [(placed.prefill_rows[i], chunk.slot, chunk.end - 1) for i, chunk in enumerate(todo.prefill)]
        for row, sequence, position in rows:
            worst = max(worst, float(np.abs(logits[row] - want[sequence, position]).max()))
            assert tokens[row] == logits[row].argmax()
            compared += 1
    assert all(one.fed == len(one.tokens) for one in progress)
    assert compared > 2 * len(progress)
    return worst


def _start(plan: Plan, rng: random.Random) -> list[_Progress]:
    per_shard, held = _LANES // plan.num_shards, plan.cache.pages_per_shard // plan.num_sequence_shards
    free = [rng.sample(range(first, first + held), held) for first in range(0, plan.num_shards * plan.cache.pages_per_shard, held)]
    started = []
    for index, tokens in enumerate(sequences(plan.model.vocab_size)):
        shard = index // per_shard
        pages = [free[shard * plan.num_sequence_shards + page % plan.num_sequence_shards].pop() for page in range(_PAGES)]
        started.append(_Progress(tokens, shard, tuple(pages), len(tokens) - rng.randint(1, 3)))
    return started


def _next_step(progress: list[_Progress], plan: Plan, rng: random.Random) -> Step:
    """Decode what is past its prompt, and chunks of the rest in random order."""
    limits = runner_limits(plan)
    greedy = RowSampling()
    decode = []
    for slot, one in enumerate(progress):
        if one.prompt <= one.fed < len(one.tokens):
            decode.append(DecodeRow(slot, one.shard, one.tokens[one.fed], one.fed, one.tables(one.fed, one.fed + 1, limits), greedy))
    tokens, slots = [0] * limits.num_prefill_shards, [0] * limits.num_prefill_shards
    chunks = []
    for slot in rng.sample(range(len(progress)), len(progress)):
        one = progress[slot]
        target = rng.choice(limits.prefill_shards_of(one.shard))
        count = min(one.prompt - one.fed, _CHUNK, limits.max_prefill_tokens_per_shard - tokens[target])
        if count <= 0 or slots[target] == limits.max_prefill_slots_per_shard:
            continue
        end = one.fed + count
        chunk = PrefillChunk(slot, one.shard, one.tokens[one.fed : end], one.fed, one.tables(one.fed, end, limits), True, greedy, target)
        chunks.append(chunk)
        tokens[target] += count
        slots[target] += 1
    for row in decode:
        progress[row.slot].fed += 1
    for chunk in chunks:
        progress[chunk.slot].fed = chunk.end
    return Step(tuple(decode), tuple(chunks))
