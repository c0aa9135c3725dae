"""Pipeline stages inside `shard_map`: one call of a step is one tick, in which every stage runs its own layers for a batch of its own.

    tick t       stage 0: batch t       stage 1: batch t - 1       ...       stage n - 1: batch t - n + 1

Activations move on by one ppermute at the end of a tick. They wait between two ticks, split over copies and weight axes as the embedded
tokens are, in rows that are the same in every bucket (`Plan.carried_rows`), so that a tick may run another bucket, or other FFN roles,
than the one before.

Embedding, final norm, logits and the choice of tokens are the same program everywhere, with tables that every stage has: the embeddings
of the first stage and the tokens of the last are the ones that count. It costs each stage a table in memory and, in a tick, no time that
the one stage would not take alone. The chosen tokens go to all stages by one all-reduce: the first one feeds them on.
"""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from partinf.partition.collectives import Split, move
from partinf.partition.sharding import sharding
from partinf.plans import Plan
from partinf.transformer.batch import Batch, at_stage
from partinf.transformer.params import activation_dtype
from partinf.transformer.routes import Routes

_T = TypeVar("_T")


def abstract_carried(plan: Plan, mesh: Mesh | AbstractMesh) -> jax.ShapeDtypeStruct | None:
    """Activations on their way to the next stage, [stages, rows, E]: decode rows of every copy, then prompt tokens; None for one stage."""
    if plan.num_stages == 1:
        return None
    shape = (plan.num_stages, sum(plan.carried_rows), plan.model.embed_dim)
    return jax.ShapeDtypeStruct(shape, activation_dtype(plan), sharding=sharding(plan, mesh, "NRD"))


def of_this_stage(batches: Batch, routes: Routes) -> Batch:
    """The batch of this stage."""
    return at_stage(batches, lax.axis_index(routes.stages) if routes.stages else 0)


def last(batches: Batch) -> Batch:
    """The batch whose tokens are chosen in this tick."""
    return at_stage(batches, -1)


def enter(x: jax.Array, carried: jax.Array | None, routes: Routes) -> jax.Array:
    """What this stage's first layer reads, [T.r, E.ef]: the embedded tokens `x` on the first stage, what the one before sent elsewhere."""
    if carried is None:
        return x
    first, count = _rows(routes)
    return jnp.where(lax.axis_index(routes.stages) == 0, x, carried[0, first : first + count])


def leave(x: jax.Array, carried: jax.Array | None, routes: Routes) -> jax.Array | None:
    """This stage's output [T.t, E.w] to the next stage: what is carried to the next tick."""
    if carried is None:
        return None
    lanes = routes.bucket.decode_rows // routes.ways(routes.tokens)
    parts = []
    for part, group in ((x[:lanes], routes.decode), (x[lanes:], routes.prefill)):
        if part.shape[0]:
            frame = routes.frame(group.order, routes.weight_stored)
            parts.append(move(part, frame, Split(routes.tokens, routes.between), Split(routes.replica, routes.weight_stored)))
    sent = jnp.concatenate(parts) if len(parts) > 1 else parts[0]  # [T.r, E.ef]
    steps = [(stage, stage + 1) for stage in range(routes.ways(routes.stages) - 1)]
    received = lax.ppermute(sent, routes.stages, steps)  # [T.r, E.ef] of the stage before
    first, count = _rows(routes)
    return carried.at[0, first : first + count].set(received)


def from_last(values: _T, routes: Routes) -> _T:
    """Arrays of 32-bit numbers as the last stage has them, on all stages: one all-reduce of their bits, to which the others add nothing."""
    if not routes.stages:
        return values
    leaves, tree = jax.tree.flatten(values)
    bits = jnp.concatenate([lax.bitcast_convert_type(leaf, jnp.int32).reshape(-1) for leaf in leaves])
    is_last = lax.axis_index(routes.stages) == routes.ways(routes.stages) - 1
    bits = lax.psum(jnp.where(is_last, bits, 0), routes.stages)
    found, start = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        found.append(lax.bitcast_convert_type(bits[start : start + size].reshape(leaf.shape), leaf.dtype))
        start += size
    return jax.tree.unflatten(tree, found)


def _rows(routes: Routes) -> tuple[int, int]:
    """Where this bucket's rows begin among those that are carried, and how many there are, on one copy of the weights."""
    copies = routes.ways(routes.replica)
    before = 0 if routes.bucket.decode_rows else routes.plan.carried_rows[0]
    return before // copies, routes.bucket.num_tokens // copies
