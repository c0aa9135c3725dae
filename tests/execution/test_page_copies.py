"""KV pages to host memory and back: on the shard that owns them, and only there."""

from __future__ import annotations

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.model.kinds import Kind
from partinf.partition.sharding import device_mesh
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.transformer.page_copies import PAGES, HostPages, compile_put, compile_take
from partinf.transformer.step import abstract_state
from partinf.workload import DType

MODEL = ModelConfig("tiny", 2, 16, 16, 4, 2, 4, 32, max_len=256)
PER_SHARD = 24


def test_pages_split_over_parts_come_back_to_theirs() -> None:
    """Two shards of requests, the pages of each sequence split over four places, more than one program moves."""
    layout = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, {"x": "sequence", "y": "batch", "z": "sequence"})
    per_part, count, first = 24, 4 * PAGES + 7, 4 * 24  # of the second shard
    plan = Plan(MODEL, parse_slice("cpu:2x2x2"), layout, kv=DType.F32, cache=CacheConfig(4, 4 * per_part, 4))
    mesh = device_mesh(plan)
    rng = np.random.default_rng(1)
    kv = jax.tree.map(
        lambda leaf: jax.device_put(rng.integers(-100, 100, leaf.shape).astype(leaf.dtype), leaf.sharding),
        abstract_state(plan, mesh, True).kv[0],
    )
    before = jax.device_get(kv)
    copies = HostPages(plan, mesh, True, 0, compile_take(plan, mesh, True, 0), compile_put(plan, mesh, True, 0))

    def round_robin() -> list[int]:
        free = [(first + part * per_part + rng.permutation(per_part)).tolist() for part in range(4)]
        return [free[index % 4].pop() for index in range(count)]

    pages, there = round_robin(), round_robin()
    copies.out(kv, pages, range(count))
    assert copies.num_bytes == sum(leaf.nbytes // 2 for leaf in jax.tree.leaves(kv)) * 2 * PAGES // per_part  # nothing twice, nothing else
    after = jax.device_get(copies.back(kv, there, range(count)))
    rest = sorted(set(range(2 * 4 * per_part)) - set(there))
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[there], after), jax.tree.map(lambda leaf: leaf[pages], before))
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[rest], after), jax.tree.map(lambda leaf: leaf[rest], before))


@pytest.mark.parametrize(
    ("kv_dtype", "unrolled", "group"), [(DType.F32, True, 0), (DType.INT8, True, 1), (DType.F32, False, 1), (DType.INT8, False, 0)]
)
def test_pages_come_back_to_their_shard(kv_dtype: DType, unrolled: bool, group: int) -> None:
    """Two shards of requests, heads split in two, a third axis that holds copies; more pages than one program moves, of either group of a
    model that has a window in one of its layers."""
    slice_ = parse_slice("cpu:2x2x2")
    layout = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, {"x": "batch", "y": "heads", "z": "heads"})
    model = replace(MODEL, kinds=(Kind("near", 8), Kind("all")), pattern=("near", "all"))
    cache = CacheConfig(4, PER_SHARD if group == 0 else 40, 4, (PER_SHARD if group else 40,))
    plan = replace(Plan(model, slice_, layout, kv=kv_dtype, cache=cache), buckets=(Bucket(4, 2),))
    mesh = device_mesh(plan)
    rng = np.random.default_rng(0)

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(rng.integers(-100, 100, leaf.shape).astype(leaf.dtype), leaf.sharding)

    kv = jax.tree.map(filled, abstract_state(plan, mesh, unrolled).kv[group])
    before = jax.device_get(kv)
    copies = HostPages(plan, mesh, unrolled, group, compile_take(plan, mesh, unrolled, group), compile_put(plan, mesh, unrolled, group))
    count = PAGES + 3
    pages = [PER_SHARD + page for page in rng.permutation(PER_SHARD)[:count].tolist()]
    copies.out(kv, pages, range(7, 7 + count))

    axis = 0 if unrolled else 1
    one_shard = sum(leaf.nbytes // plan.num_shards for leaf in jax.tree.leaves(kv))
    assert copies.num_bytes == one_shard * 2 * PAGES // PER_SHARD  # two groups, each piece once
    at = lambda ids: (slice(None),) * axis + (np.asarray(ids),)  # noqa: E731
    there = [PER_SHARD + page for page in rng.permutation(PER_SHARD)[:count].tolist()]
    after = jax.device_get(copies.back(kv, there, range(7, 7 + count)))
    rest = sorted(set(range(2 * PER_SHARD)) - set(there))
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[at(there)], after), jax.tree.map(lambda leaf: leaf[at(pages)], before))
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[at(rest)], after), jax.tree.map(lambda leaf: leaf[at(rest)], before))
    assert copies.num_bytes == 0
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(kv))
