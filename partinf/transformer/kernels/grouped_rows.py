"""Rows sorted by group, each times the matrix of its own group, as a kernel for TPUs that reads matrices as they are stored.

`jax.lax.ragged_dot` becomes a kernel of the compiler's there, which wants a matrix [in, out]: of weights that are stored [out, in] it lays
out all groups anew first, in every step, and of stacked layers it copies one. Here a block of a matrix is fetched once for all rows of
its group, whichever layer it lies in, and groups without rows are not touched. int8 is widened on the chip.

A *visit* is a tile of rows and a group that has any of them: tiles are visited once by every such group, which writes its own rows.

Letters: R rows, G groups, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from partinf.foundation.rounding import ceil_div, round_up
from partinf.partition.quantize import Quantized

_LANES = 128
_ROWS = 128  # of a tile; as many pass a matrix unit while its weights are exchanged
_FEWEST_ROWS = 16  # of a tile of bfloat16
_BLOCK = 1 << 21  # elements of a matrix that are on the chip at once, of which there are two
_TILE = 1 << 20  # the same of the rows


def fits(x: jax.Array, weights: jax.Array | Quantized) -> bool:
    """Whether the kernel takes rows [R, K] and matrices [.., N, K]: those of whole lanes."""
    *_, outputs, inputs = weights.shape
    return x.dtype == jnp.bfloat16 and inputs % _LANES == 0 and outputs % _LANES == 0 and inputs * _LANES <= _BLOCK


def grouped_rows(
    x: jax.Array, weights: jax.Array | Quantized, sizes: jax.Array, first: jax.Array | int, dtype: Any, name: str, interpret: bool = False
) -> jax.Array:
    """The product of every row with the matrix of its group.

    Args:
        x: [R, K], those of the first group first. weights: [G, N, K], with scales [G, N] where they are int8.
        sizes: [groups], rows of each; rows beyond their sum are given anything. first: the matrix of the first group.
        dtype: of the result. name: of the kernel, by which a proof knows whose work it does.
        interpret: run without a TPU.

    Returns:
        [R, N].
    """
    values = weights.values if isinstance(weights, Quantized) else weights
    rows, inputs = x.shape
    outputs = values.shape[1]
    tile = _tile(rows, inputs)
    padded = round_up(rows, tile)
    width = max(size for size in range(_LANES, outputs + 1, _LANES) if outputs % size == 0 and size * inputs <= _BLOCK)
    group, place, ends, visits = _visits(sizes, tile, padded // tile)
    scalars = (group, place, ends, jnp.asarray(first, jnp.int32).reshape(1))
    arrays = [jnp.pad(x, ((0, padded - rows), (0, 0))) if padded > rows else x, values]
    of_tile = lambda n, v, group, place, ends, first: (place[v], 0)  # noqa: E731
    of_group = lambda n, v, group, place, ends, first: (first[0] + group[v], n, 0)  # noqa: E731
    in_specs = [pl.BlockSpec((tile, inputs), of_tile), pl.BlockSpec((None, width, inputs), of_group)]
    if isinstance(weights, Quantized):
        arrays.append(weights.scale[:, None])
        in_specs.append(pl.BlockSpec((None, 1, width), lambda n, v, group, place, ends, first: (first[0] + group[v], 0, n)))
    out = pl.pallas_call(
        lambda *refs: _kernel(*refs, tile=tile),
        out_shape=jax.ShapeDtypeStruct((padded, outputs), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(outputs // width, visits),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((tile, width), lambda n, v, group, place, ends, first: (place[v], n)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * outputs,
            bytes_accessed=min(rows, sizes.shape[0]) * outputs * inputs * values.dtype.itemsize + rows * (inputs + outputs) * 2,
            transcendentals=0,
        ),
        interpret=interpret,
        name=name,
    )(*scalars, *arrays)
    return out[:rows]


def _kernel(group: Any, place: Any, ends: Any, first: Any, x: Any, weights: Any, *others: Any, tile: int) -> None:
    """One visit: x [tile, K] times [width, K], scaled where there are scales, into those rows of [tile, width] that are the group's."""
    *scale, out = others
    visit = pl.program_id(1)
    found = lax.dot_general(x[...], weights[...].astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if scale:
        found = found * scale[0][...]
    row = place[visit] * tile + lax.broadcasted_iota(jnp.int32, found.shape, 0)
    begin = jnp.where(group[visit] > 0, ends[jnp.maximum(group[visit] - 1, 0)], 0)
    mine = (row >= begin) & (row < ends[group[visit]])
    out[...] = jnp.where(mine, found, out[...].astype(jnp.float32)).astype(out.dtype)


def _tile(rows: int, inputs: int) -> int:
    """Rows of a tile: as many as there are, at most `_ROWS`, fewer where they are long."""
    tile = min(_ROWS, round_up(rows, _FEWEST_ROWS))
    while tile > _FEWEST_ROWS and tile * inputs > _TILE:
        tile = round_up(tile // 2, _FEWEST_ROWS)
    return tile


def _visits(sizes: jax.Array, tile: int, tiles: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The group and the tile of every visit, in the order of both, where each group ends, and how many visits there are; at least one."""
    groups = sizes.shape[0]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    begins = ends - sizes
    visited = jnp.where(sizes > 0, ceil_div(ends, tile) - begins // tile, 0)
    done = jnp.cumsum(visited, dtype=jnp.int32)
    numbers = jnp.arange(tiles + groups - 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(numbers[:, None] >= done[None], axis=1, dtype=jnp.int32), groups - 1)
    place = begins[group] // tile + numbers - (done - visited)[group]
    return group, jnp.clip(place, 0, tiles - 1), ends, jnp.maximum(done[-1], 1)
