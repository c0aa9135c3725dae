"""Rows sorted by group, each times the matrix of its own group, as a kernel for TPUs that reads matrices as they are stored.

`jax.lax.ragged_dot` becomes a kernel of the compiler's there, which wants a matrix [in, out]: of weights that are stored [out, in] it lays
out all groups anew first, in every step, and of stacked layers it copies one. Here a block of a matrix is fetched once for all rows of
its group, whichever layer it lies in, and groups without rows are not touched. int8 is widened on the chip.

A *visit* is a tile of rows and a group that has any of them: tiles are visited once by every such group, which writes its own rows.

Matrices lie in whole tiles of memory, one after the other: [N, K], or turned, [K, N], where that takes fewer (`lies_turned`). Parameters
are placed so (`partinf.transformer.params`), since the compiler would choose an order by itself and then copy all of them.

Matrices may come several for each group, as those of a gated feed-forward do, and every row meets all of its group's. They stay apart:
where N fills no whole tiles of memory, one after the other they would lie elsewhere, which copies all of them.

Letters: R rows, G groups, I matrices of a group, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from partinf.foundation.rounding import ceil_div, round_up
from partinf.hardware.platform import GROUPED_BLOCK, LANES, lies_turned, takes_matrices
from partinf.partition.quantize import Quantized

_ROWS = 128  # of a tile; as many pass a matrix unit while its weights are exchanged
_FEWEST_ROWS = 16  # of a tile of bfloat16
_TILE = 1 << 20  # the same of the rows


def fits(x: jax.Array, weights: jax.Array | Quantized) -> bool:
    """Whether the kernel takes rows [R, K] and matrices [.., I, N, K]."""
    return x.dtype == jnp.bfloat16 and takes_matrices(*weights.shape[-3:])


def grouped_rows(
    x: jax.Array, weights: jax.Array | Quantized, sizes: jax.Array, first: jax.Array | int, dtype: Any, name: str, interpret: bool = False
) -> jax.Array:
    """The product of every row with the matrices of its group.

    Args:
        x: [R, K], those of the first group first. weights: [G, I, N, K], with scales [G, I, N] where they are int8.
        sizes: [groups], rows of each; rows beyond their sum are given anything. first: those of the first group among G.
        dtype: of the result. name: of the kernel, by which a proof knows whose work it does.
        interpret: run without a TPU.

    Returns:
        [R, I, N].
    """
    values = weights.values if isinstance(weights, Quantized) else weights
    rows, inputs = x.shape
    each, outputs = values.shape[1:3]
    tile, width = _tile(rows, inputs), _width(each, outputs, inputs)
    turned = lies_turned(outputs, inputs)
    padded = round_up(rows, tile)
    group, place, ends, visits = _visits(sizes, tile, padded // tile)
    scalars = (group, place, ends, jnp.asarray(first, jnp.int32).reshape(1))
    arrays = [jnp.pad(x, ((0, padded - rows), (0, 0))) if padded > rows else x, jnp.swapaxes(values, 2, 3) if turned else values]
    of_tile = lambda n, v, group, place, ends, first: (place[v], 0)  # noqa: E731
    of_group = lambda n, v, group, place, ends, first: (first[0] + group[v], 0, *((0, n) if turned else (n, 0)))  # noqa: E731
    block = (None, each, *((inputs, width) if turned else (width, inputs)))
    in_specs = [pl.BlockSpec((tile, inputs), of_tile), pl.BlockSpec(block, of_group)]
    if isinstance(weights, Quantized):
        arrays.append(weights.scale[:, :, None])
        of_scale = lambda n, v, group, place, ends, first: (first[0] + group[v], 0, 0, n)  # noqa: E731
        in_specs.append(pl.BlockSpec((None, each, 1, width), of_scale))
    out = pl.pallas_call(
        lambda *refs: _kernel(*refs, tile=tile, contracted=0 if turned else 1),
        out_shape=jax.ShapeDtypeStruct((each, padded, outputs), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(ceil_div(outputs, width), visits),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((each, tile, width), lambda n, v, group, place, ends, first: (0, place[v], n)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * each * inputs * outputs,
            bytes_accessed=min(rows, sizes.shape[0]) * each * outputs * inputs * values.dtype.itemsize
            + rows * (inputs + each * outputs) * 2,
            transcendentals=0,
        ),
        interpret=interpret,
        name=name,
    )(*scalars, *arrays)
    return jnp.swapaxes(out[:, :rows], 0, 1)


def _kernel(group: Any, place: Any, ends: Any, first: Any, x: Any, weights: Any, *others: Any, tile: int, contracted: int) -> None:
    """One visit: x [tile, K] times each [width, K] or [K, width], scaled where there are scales, into those rows of [I, tile, width] that
    are the group's.

    Args:
        contracted: the dimension of a matrix that is K.
    """
    *scale, out = others
    visit = pl.program_id(1)
    each, _, width = out.shape
    row = place[visit] * tile + lax.broadcasted_iota(jnp.int32, (tile, width), 0)
    begin = jnp.where(group[visit] > 0, ends[jnp.maximum(group[visit] - 1, 0)], 0)
    mine = (row >= begin) & (row < ends[group[visit]])
    for number in range(each):
        matrix = weights[number].astype(x.dtype)
        found = lax.dot_general(x[...], matrix, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)
        if scale:
            found = found * scale[0][number]
        out[number] = jnp.where(mine, found, out[number].astype(jnp.float32)).astype(out.dtype)


def _width(each: int, outputs: int, inputs: int) -> int:
    """Outputs of a block: all of them, or else whole lanes, by which they can be divided if that leaves blocks at least half as large."""
    most = GROUPED_BLOCK // (each * inputs)  # there are two of a block on the chip
    if outputs <= most:
        return outputs
    widths = range(LANES, most + 1, LANES)
    even = max((width for width in widths if outputs % width == 0), default=0)
    return even if 2 * even >= widths[-1] else round_up(ceil_div(outputs, ceil_div(outputs, widths[-1])), LANES)


def _tile(rows: int, inputs: int) -> int:
    """Rows of a tile: as many as there are, at most `_ROWS`, fewer where they are long."""
    tile = min(_ROWS, round_up(rows, _FEWEST_ROWS))
    while tile > _FEWEST_ROWS and tile * inputs > _TILE:
        tile = round_up(tile // 2, _FEWEST_ROWS)
    return tile


def _visits(sizes: jax.Array, tile: int, tiles: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The group and the tile of every visit, in the order of both, where each group ends, and how many visits there are; at least one.

    By sums over all pairs: each is one operation, where a running sum is several and a look-up two.
    """
    groups = sizes.shape[0]
    numbers = jnp.arange(tiles + groups - 1, dtype=jnp.int32)[:, None]
    ends = _running_sum(sizes)
    begins = ends - sizes
    visited = jnp.where(sizes > 0, ceil_div(ends, tile) - begins // tile, 0)
    done = _running_sum(visited)
    mine = (numbers >= (done - visited)[None]) & (numbers < done[None])  # [visits, groups]; of one group, or of none behind the last

    def chosen(of_groups: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mine, of_groups[None], 0), axis=1, dtype=jnp.int32)

    place = chosen(begins // tile - (done - visited)) + numbers[:, 0]
    return chosen(jnp.arange(groups)), jnp.clip(place, 0, tiles - 1), ends, jnp.maximum(jnp.sum(visited, dtype=jnp.int32), 1)


def _running_sum(x: jax.Array) -> jax.Array:
    upto = jnp.arange(x.shape[0])
    return jnp.sum(jnp.where(upto[:, None] >= upto[None], x[None], 0), axis=1, dtype=jnp.int32)
