"""Where every array of a model lies under every shipped layout: global shape, dtype, what splits each dimension, bytes per device.

One file per model and layout under `golden/`, so that a change of storage shows up in a review. To write them anew:

    python -m tests.execution.test_golden
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import pytest

from partinf.buckets import Capacity, split_of, with_capacity
from partinf.cost.memory import weight_bytes
from partinf.cost.pricing import Pricing
from partinf.cost.program import PLAIN
from partinf.foundation import resources
from partinf.hardware.slices import parse_slice
from partinf.layout.files import layout_from_toml, make_layout
from partinf.model.load import load_model_config
from partinf.partition.sharding import abstract_mesh
from partinf.plans import Bucket, Plan, layout_offences
from partinf.transformer.params import abstract_params, params_bytes_per_device
from partinf.transformer.step import abstract_state
from partinf.workload import DType

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = ("ws-1d", "ws-2d", "wg-x", "wg-xy", "wg-xyz", "long-context")
MODELS = {  # model: slice, weights and KV, padded heads
    "palm-540b": ("v4:4x4x4", DType.INT8, DType.BF16, 64),
    "llama-3-70b": ("v5p:4x4x4", DType.BF16, DType.INT8, 0),
    "gpt3-175b": ("v4:2x2x4", DType.BF16, DType.BF16, 0),
    "demo": ("cpu:2x2x2", DType.F32, DType.F32, 0),
}
CASES = [(model, layout) for model in MODELS for layout in LAYOUTS]


def make_plan(model: str, layout: str) -> Plan:
    slice_name, weights, kv, padded = MODELS[model]
    text = resources.find("layouts", layout).read_text()
    roles, _ = layout_from_toml(text, layout)
    config = load_model_config(model)
    plan = Plan(config, parse_slice(slice_name), roles, weights, kv, padded_heads=padded)
    max_len = min(2048, config.max_len or 2048)
    pages = 64 // plan.num_shards * max_len // 16  # for 64 full sequences, whatever memory holds
    return with_capacity(plan, Capacity(max_rows=64, max_len=max_len, kv_pages=pages))


def rows(plan: Plan) -> list[tuple[str, ...]]:
    mesh = abstract_mesh(plan)
    tree = {"params": abstract_params(plan, mesh, unrolled=False), "state": abstract_state(plan, mesh, unrolled=False)}
    found: list[tuple[str, ...]] = [("array", "dtype", "shape", "split", "bytes per device")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        spec = [*leaf.sharding.spec, *[None] * len(leaf.shape)][: len(leaf.shape)]
        split = ", ".join("-" if axes is None else "".join((axes,) if isinstance(axes, str) else axes) for axes in spec)
        shape = " × ".join(map(str, leaf.shape))
        found.append((jax.tree_util.keystr(path), str(leaf.dtype), shape, split, f"{held(leaf):,}"))
    return found


def held(leaf: Any) -> int:
    """Bytes on a device, in whole tiles of 8 by 128 where the order in memory is given."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    if leaf.format.layout is not None:
        *before, rows, columns = (shape[dim] for dim in leaf.format.layout.major_to_minor)
        shape = (*before, -(-rows // 8) * 8, -(-columns // 128) * 128)
    return math.prod(shape) * leaf.dtype.itemsize


def table(plan: Plan) -> str:
    found = rows(plan)
    widths = [max(len(row[column]) for row in found) for column in range(len(found[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in found) + "\n"


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_arrays_lie_where_they_did(model: str, layout: str) -> None:
    plan = make_plan(model, layout)
    assert table(plan) == (GOLDEN / f"{model}_{layout}.txt").read_text()
    leaves = jax.tree.leaves(abstract_params(plan, abstract_mesh(plan), unrolled=False))
    assert sum(map(held, leaves)) == params_bytes_per_device(plan)


@pytest.mark.parametrize("model", sorted(resources.names("models")))
@pytest.mark.parametrize("weights", [DType.BF16, DType.INT8])
def test_planned_bytes_of_weights_are_those_that_are_stored(model: str, weights: DType) -> None:
    """On every layout of roles that holds the model, leaf by leaf of what the runner allocates, with and without stages."""
    config, checked = load_model_config(model), 0
    for slice_name, roles in (
        ("v4:2x2x4", {"x": "embed", "y": "ffn", "z": "ffn"}),
        ("v4:2x2x4", {"x": "ffn", "y": "replica", "z": "embed"}),
        ("v5e:2x4", {"x": "embed", "y": "ffn"}),
        ("a100-80:4", {"x": "ffn"}),
        ("v6e:2x4", {"x": "ffn", "y": "ffn"}),  # experts' d_ff of 360 and 96 fill no whole tiles
        ("v5e:2x4", {"x": "stage", "y": "ffn"}),
    ):
        slice_, layout = (
            parse_slice(slice_name),
            make_layout(roles, {axis: "none" if role == "stage" else "batch" for axis, role in roles.items()}),
        )
        if layout_offences(config, slice_, layout):
            continue
        plan, checked = Plan(config, slice_, layout, weights), checked + 1
        stored = sum(map(held, jax.tree.leaves(abstract_params(plan, abstract_mesh(plan), unrolled=False))))
        split = split_of(plan, Bucket(decode_rows=64, decode_pages=1), Pricing(slice_, program=PLAIN))
        assert weight_bytes(split) == stored == params_bytes_per_device(plan), slice_name
    assert checked


def test_no_file_is_left_over() -> None:
    assert {file.name for file in GOLDEN.glob("*.txt")} == {f"{model}_{layout}.txt" for model, layout in CASES}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for model, layout in CASES:
        (GOLDEN / f"{model}_{layout}.txt").write_text(table(make_plan(model, layout)))
