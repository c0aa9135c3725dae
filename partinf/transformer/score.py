"""The compiled step that scores given text: prefill alone, and the log-probability of every next token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from partinf.partition.sharding import WHOLE, whole
from partinf.plans import Bucket, Plan
from partinf.transformer.batch import Batch, empty_batch
from partinf.transformer.forward import hidden, token_logprobs
from partinf.transformer.params import Params, abstract_params
from partinf.transformer.routes import Routes
from partinf.transformer.step import State, abstract_state, check_bucket, compiler_options

ScoreStep = Callable[[Params, State, Batch, jax.Array], tuple[State, jax.Array]]


def compile_score_step(plan: Plan, mesh: Mesh, bucket: Bucket, unrolled: bool) -> ScoreStep:
    """`step(params, state, batch, targets [T]) → (state, log-probabilities [T])` for a bucket without decode rows; donates the state.

    `targets` holds, for every prompt token, the token that follows it.
    """
    check_bucket(plan, bucket)
    routes = Routes(plan, bucket)
    parameters, state = abstract_params(plan, mesh, unrolled), abstract_state(plan, mesh, unrolled)
    specs = lambda tree: jax.tree.map(lambda leaf: leaf.sharding.spec, tree)  # noqa: E731
    batch = empty_batch(bucket, plan)

    def local_step(params: Params, state: State, batch: Batch, targets: jax.Array) -> tuple[State, jax.Array]:
        x, kv = hidden(params, state.kv, batch, jnp.zeros(0, jnp.int32), routes)  # [T.t, E.w]
        return replace(state, kv=kv), token_logprobs(params, x, targets, routes)

    in_specs = (specs(parameters), specs(state), jax.tree.map(lambda _: WHOLE, batch), WHOLE)
    mapped = jax.shard_map(local_step, mesh=mesh, in_specs=in_specs, out_specs=(specs(state), WHOLE), check_vma=False)
    everywhere = whole(mesh)
    arrays = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), batch)
    targets = jax.ShapeDtypeStruct((bucket.prefill_tokens,), jnp.int32, sharding=everywhere)
    lowered = jax.jit(mapped, donate_argnums=1).lower(parameters, state, arrays, targets)
    return lowered.compile(compiler_options(mesh))
