"""The compiled step that scores given text: prefill alone, and the log-probability of every next token.

Logits are made for a chunk of rows at a time, so nothing of size tokens × vocabulary exists, on any device.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from partinf.collectives import Split, move, take_split
from partinf.plans import Bucket, Plan
from partinf.transformer.batch import Batch, empty_batch
from partinf.transformer.forward import hidden, logits, vocabulary_ids
from partinf.transformer.params import Params, abstract_params
from partinf.transformer.routes import Routes
from partinf.transformer.sampling import logprobs
from partinf.transformer.step import State, abstract_state, check_bucket

_ROWS = 128  # rows of logits that exist at once

ScoreStep = Callable[[Params, State, Batch, jax.Array], tuple[State, jax.Array]]


def compile_score_step(plan: Plan, mesh: Mesh, bucket: Bucket, unrolled: bool) -> ScoreStep:
    """`step(params, state, batch, targets [T]) → (state, log-probabilities [T])` for a bucket without decode rows; donates the state.

    `targets` holds, for every prompt token, the token that follows it.
    """
    check_bucket(plan, bucket)
    routes = Routes(plan, bucket)
    parameters, state = abstract_params(plan, mesh, unrolled), abstract_state(plan, mesh, unrolled)
    specs = lambda tree: jax.tree.map(lambda leaf: leaf.sharding.spec, tree)  # noqa: E731
    batch = empty_batch(bucket)

    def local_step(params: Params, state: State, batch: Batch, targets: jax.Array) -> tuple[State, jax.Array]:
        x, kv = hidden(params, state.kv, batch, jnp.zeros(0, jnp.int32), routes)  # [T.t, E.w]
        return State(kv, state.last_token), _score(params, x, targets, routes)

    in_specs = (specs(parameters), specs(state), jax.tree.map(lambda _: P(), batch), P())
    mapped = jax.shard_map(local_step, mesh=mesh, in_specs=in_specs, out_specs=(specs(state), P()), check_vma=False)
    whole = NamedSharding(mesh, P())
    arrays = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), batch)
    targets = jax.ShapeDtypeStruct((bucket.prefill_tokens,), jnp.int32, sharding=whole)
    return jax.jit(mapped, donate_argnums=1).lower(parameters, state, arrays, targets).compile()


def _score(params: Params, x: jax.Array, targets: jax.Array, routes: Routes) -> jax.Array:
    order = routes.prefill.order
    rows = routes.frame(order, routes.weight_stored)
    x = move(x, rows, Split(routes.tokens, routes.weight), Split(routes.replica, routes.weight_stored))  # [T.r, E.ef]
    targets = take_split(targets, 0, order, routes.replica, routes.sizes)  # [T.r]
    axes = tuple(axis for axis in routes.weight_stored if routes.sizes[axis] > 1)
    ids = vocabulary_ids(routes)
    size = max(count for count in range(1, _ROWS + 1) if x.shape[0] % count == 0)

    def chunk(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return logprobs(logits(params, part[0], routes), ids, part[1], axes)

    scores = lax.map(chunk, (x.reshape(-1, size, x.shape[1]), targets.reshape(-1, size))).reshape(-1)  # [T.r]
    return move(scores, routes.frame(order, ()), Split(routes.replica), Split())  # [T]
