"""Does the TPU's kernel for decode pay against attention tile by tile? What the TPU compiler says of a step with each.

Writes results.json and the table of the README:

    python -m experiments.paged_decode_on_tpu.measure       # about three minutes; libtpu, no TPU

Eight layers of Llama 3 8B on four chips, 64 lanes whose context of 2048 tokens is full, and the same step where the lanes are as long as
`RAGGED` says, of which only the bytes of keys and values are counted: the kernel fetches each lane's own pages, tiles go to the longest.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from experiments.results import place, write
from partinf.hardware.platform import PLATFORMS, TPU
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.proof.proving import schedule_of
from partinf.proof.topology import mesh_of
from partinf.transformer.kernels import tiles as kernels
from partinf.transformer.step import compile_step

LAYERS, ROWS, CONTEXT, PAGE = 8, 64, 2048, 16
CASES = [("v5e:2x2", "batch"), ("v5e:2x2", "heads"), ("v6e:2x2", "batch"), ("v5p:2x2x1", "batch"), ("v4:2x2x1", "batch")]
RAGGED = [CONTEXT * (lane + 1) // ROWS for lane in range(ROWS)]  # evenly from short to full


def make_plan(slice_name: str, role: str) -> Plan:
    slice_ = parse_slice(slice_name)
    axes = [axis.name for axis in slice_.axes]
    model = replace(load_model_config("llama-3-8b"), num_layers=LAYERS)
    layout = make_layout(dict.fromkeys(axes, "ffn"), dict.fromkeys(axes, role))
    shards = slice_.num_devices if role == "batch" else 1
    return Plan(model, slice_, layout, cache=CacheConfig(PAGE, ROWS * CONTEXT // PAGE // shards, ROWS), max_len=CONTEXT)


def compiled(plan: Plan, bucket: Bucket, tiles: kernels.Tiles) -> dict[str, Any]:
    """What a proof says of everything but collectives; kernels are priced as the plan prices them."""
    PLATFORMS["tpu"] = replace(TPU, tiles=tiles)
    program = compile_step(plan, mesh_of(plan), bucket, unrolled=False)
    schedule = schedule_of(plan, bucket, program.as_text())
    assert ("paged_decode" in schedule.kernels) == tiles.paged
    of_kernels = sum(kernel.seconds for kernel in schedule.kernels.values())
    memory = program.memory_analysis().temp_size_in_bytes
    return {"seconds": schedule.compute_seconds, "of_kernels": of_kernels, "temporary_bytes": memory}


def read_tokens(tiles: kernels.Tiles) -> float:
    """Tokens of keys that ragged lanes make one device read, over those that they hold."""
    tile = PAGE if tiles.paged else tiles.keys
    up = lambda length: -(-length // tile) * tile  # noqa: E731
    read = sum(map(up, RAGGED)) if tiles.paged else ROWS * up(max(RAGGED))
    return read / sum(RAGGED)


def table(steps: list[dict[str, Any]]) -> str:
    """As Markdown."""
    heads = ("slice, attention", "with the kernels, ms", "of that priced as in the plan", "tile by tile, ms", "temporaries, MB")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in steps:
        with_kernel, tiles = row["kernel"], row["tiles"]
        times = " | ".join(f"{1e3 * seconds:.2f}" for seconds in (with_kernel["seconds"], with_kernel["of_kernels"], tiles["seconds"]))
        held = " / ".join(f"{one['temporary_bytes'] / 1e6:.1f}" for one in (with_kernel, tiles))
        lines.append(f"| {row['slice']}, {row['attention']} | {times} | {held} |")
    return "\n".join(lines)


def main() -> None:
    ways = {"kernel": TPU.tiles, "tiles": replace(TPU.tiles, paged=False)}
    found: dict[str, Any] = {"ragged_read": {name: read_tokens(tiles) for name, tiles in ways.items()}, "steps": []}
    for slice_name, role in CASES:
        plan = make_plan(slice_name, role)
        row = {"slice": slice_name, "attention": role}
        row |= {name: compiled(plan, Bucket(ROWS, CONTEXT // PAGE), tiles) for name, tiles in ways.items()}
        found["steps"].append(row)
        print(json.dumps(row), flush=True)
    write(__file__, found)
    place(__file__, table(found["steps"]))


if __name__ == "__main__":
    main()
