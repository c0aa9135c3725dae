"""The step as the compiler partitions it: the same forward on whole arrays, with shardings declared and no collective written.

A check of the partitioned step, and the baseline that it has to beat. Parameters, cache and what lies between two layers are split as the
plan says; everything else is the compiler's choice (GSPMD). The forward is the one that runs for a plan of a single device, where every
`move` does nothing, and takes the plain twin of attention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from partinf.foundation.errors import InvalidInput
from partinf.foundation.limits import NEVER
from partinf.hardware.slices import make_slice
from partinf.layout.files import make_layout
from partinf.partition.sharding import dimensions
from partinf.plans import Bucket, Plan
from partinf.transformer.attention import rotations_of
from partinf.transformer.batch import Batch, at_stage, empty_batch, pack, unpack
from partinf.transformer.block import block
from partinf.transformer.cache import by_heads, not_by_heads
from partinf.transformer.forward import embedded, repeated, sampled_logits
from partinf.transformer.params import Params, Stacks, abstract_params
from partinf.transformer.routes import Routes
from partinf.transformer.step import Out, State, abstract_state, choose_tokens, compiler_options


def on_one_device(plan: Plan) -> Plan:
    """The plan of a single device with the same model and a cache of the same size in all."""
    chip = plan.slice.chip
    first, *others = (group.pages_per_shard * plan.num_shards for group in plan.cache_groups)
    cache = replace(plan.cache, pages_per_shard=first, other_pages=tuple(others))
    slice_ = make_slice(chip, (1,) * len(plan.slice.shape))
    names = [axis.name for axis in slice_.axes]
    layout = make_layout(dict.fromkeys(names, "replica"), dict.fromkeys(names, "none"))
    return replace(plan, slice=slice_, layout=layout, cache=cache, prefill_from_tokens=NEVER)


def compile_partitioned(plan: Plan, mesh: Mesh, bucket: Bucket, unrolled: bool, with_logits: bool = False) -> Any:
    """The step of one bucket as `partinf.transformer.step.compile_step` gives it, partitioned by the compiler."""
    if plan.num_stages > 1:
        raise InvalidInput(f"{plan.num_stages} stages: what each does in a tick is written by hand; the compiler's own way has one program")
    routes = Routes(on_one_device(plan), bucket, plain=True)
    real = Routes(plan, bucket)
    between = dimensions(mesh, real.tokens, real.between)
    constrain = lambda x: lax.with_sharding_constraint(x, between)  # noqa: E731

    def step(params: Params, state: State, packed: jax.Array) -> tuple[State, Out]:
        batch: Batch = at_stage(unpack(packed, bucket, plan), 0)
        fed = jnp.asarray(batch.decode.token)
        fed = jnp.where(fed >= 0, fed, state.last_token.at[batch.decode.slot].get(mode="clip"))
        rotations = rotations_of(batch, routes)
        x, kv = constrain(embedded(params, batch, fed, routes)), state.kv

        def one(weights: Params, carry: tuple[jax.Array, Any], index: Any, kind: int) -> tuple[jax.Array, Any]:
            (x, kv), group = carry, routes.groups[kind]
            x, held = block(weights, x, kv[group], jnp.asarray(routes.places)[index], batch, routes, kind, rotations[kind])
            return constrain(x), (*kv[:group], held, *kv[group + 1 :])

        if isinstance(params["layers"], tuple):
            caches = [list(held) for held in kv]
            for weights, place, kind in zip(params["layers"], routes.places, plan.model.kind_of_layers, strict=True):
                held = caches[routes.groups[kind]]
                x, (held[place],) = block(weights, x, (held[place],), 0, batch, routes, kind, rotations[kind])
                x = constrain(x)
            kv = tuple(map(tuple, caches))
        else:
            stacks = Stacks(params["layers"], plan.model)

            def stacked(carry: tuple[jax.Array, Any], index: Any, kind: int, following: int) -> tuple[jax.Array, Any]:
                stack, place = stacks.layer(index, kind)
                slice_of = lambda leaf: lax.dynamic_index_in_dim(leaf, place, keepdims=False)  # noqa: E731
                return one(jax.tree.map(slice_of, stack), carry, index, kind)

            carry = (x, tuple(map(by_heads, kv)))
            for run in plan.model.runs:
                carry = repeated(run, stacked, carry)
            x, kv = carry[0], tuple(map(not_by_heads, carry[1]))
        logits = sampled_logits(params, x, batch, routes)
        slots = jnp.concatenate([jnp.asarray(batch.decode.slot), jnp.asarray(batch.prefill.slot)])
        out = choose_tokens(logits, State(kv, state.last_token), slots, batch, routes)
        slots = jnp.where(slots >= 0, slots, plan.cache.num_slots)
        last = state.last_token.at[slots].set(jnp.maximum(out.tokens, 0), mode="drop")
        return State(kv, last), replace(out, logits=logits if with_logits else None)

    packed = jax.ShapeDtypeStruct(pack([empty_batch(bucket, plan)]).shape, np.int32, sharding=dimensions(mesh, ()))
    arguments = abstract_params(plan, mesh, unrolled), abstract_state(plan, mesh, unrolled), packed
    held = jax.tree.map(lambda leaf: leaf.sharding, arguments[1])
    lowered = jax.jit(step, donate_argnums=1, out_shardings=(held, None)).lower(*arguments)
    return lowered.compile(compiler_options(mesh))
