"""The compiled step: `step(params, state, batch) → (state, out)`, one program per bucket.

The state (KV pages and the last token of every slot) is donated and updated in place; a sampled token is fed to the next step on the
device unless the host sends another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from partinf.collectives import Split, move
from partinf.errors import raise_offences
from partinf.plans import Bucket, Plan
from partinf.sharding import sharding
from partinf.transformer.batch import Batch, empty_batch, pack, unpack
from partinf.transformer.cache import abstract_cache
from partinf.transformer.forward import forward, vocabulary_ids
from partinf.transformer.params import Params, abstract_params
from partinf.transformer.routes import Routes
from partinf.transformer.sampling import choose


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What stays on the devices between steps.

    Attributes:
        kv: the paged cache. last_token: [slots] the last token sampled for each slot.
    """

    kv: Any
    last_token: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Out:
    """What a step returns, equal on all devices.

    Attributes:
        tokens, logprobs: [D + S], decode lanes first. logits: [D + S, V.ef] float32, or None unless it was asked for.
    """

    tokens: jax.Array
    logprobs: jax.Array
    logits: jax.Array | None


Step = Callable[[Params, State, Batch], tuple[State, Out]]


def abstract_state(plan: Plan, mesh: Mesh | AbstractMesh, unrolled: bool) -> State:
    """The state as `jax.ShapeDtypeStruct`s with shardings."""
    last = jax.ShapeDtypeStruct((plan.cache.num_slots,), jnp.int32, sharding=sharding(plan, mesh, "."))
    return State(abstract_cache(plan, mesh, unrolled), last)


def empty_state(plan: Plan, mesh: Mesh, unrolled: bool) -> State:
    """A state without any page in use, on the devices."""
    abstract = abstract_state(plan, mesh, unrolled)
    make = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)  # noqa: E731
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def check_bucket(plan: Plan, bucket: Bucket) -> None:
    """Raise `InvalidInput` with every reason why this plan cannot run this bucket."""
    offences = []
    multiples = (
        ("decode rows", bucket.decode_rows, plan.decode_row_multiple()),
        ("prefill tokens", bucket.prefill_tokens, plan.prefill_token_multiple()),
        ("prefill slots", bucket.prefill_slots, plan.prefill_slot_multiple()),
    )
    for label, size, multiple in multiples:
        if size % multiple:
            offences.append(f"bucket {bucket}: {size} {label} on this plan; a multiple of {multiple} is needed")
    if bucket.num_tokens == 0:
        offences.append(f"bucket {bucket}: no tokens")
    if bool(bucket.prefill_tokens) != bool(bucket.prefill_slots):
        offences.append(f"bucket {bucket}: prefill tokens and prefill slots go together")
    raise_offences(offences)


def build_step(
    plan: Plan, mesh: Mesh | AbstractMesh, bucket: Bucket, unrolled: bool, with_logits: bool = False, plain: bool = False
) -> Step:
    """The step of one bucket, to be jitted by the caller (`compile_step`) or traced; `plain` takes the plain twin of attention."""
    check_bucket(plan, bucket)
    routes = Routes(plan, bucket, plain)
    specs = lambda tree: jax.tree.map(lambda leaf: leaf.sharding.spec, tree)  # noqa: E731
    params_specs, state_specs = specs(abstract_params(plan, mesh, unrolled)), specs(abstract_state(plan, mesh, unrolled))
    batch_specs = jax.tree.map(lambda _: P(), empty_batch(bucket))
    vocabulary = P(None, routes.weight_stored or None)
    out_specs = Out(P(), P(), vocabulary if with_logits else None)

    def local_step(params: Params, state: State, batch: Batch) -> tuple[State, Out]:
        fed = jnp.asarray(batch.decode.token)
        fed = jnp.where(fed >= 0, fed, state.last_token.at[batch.decode.slot].get(mode="clip"))
        logits, kv = forward(params, state.kv, batch, fed, routes)
        tokens, logprobs = _choose(logits, batch, routes)
        slots = jnp.concatenate([jnp.asarray(batch.decode.slot), jnp.asarray(batch.prefill.slot)])
        slots = jnp.where(slots >= 0, slots, plan.cache.num_slots)  # out of range: dropped
        last = state.last_token.at[slots].set(tokens, mode="drop")
        whole = _whole_lanes(logits, routes) if with_logits else None
        return State(kv, last), Out(tokens, logprobs, whole)

    in_specs = (params_specs, state_specs, batch_specs)
    return jax.shard_map(local_step, mesh=mesh, in_specs=in_specs, out_specs=(state_specs, out_specs), check_vma=False)


def compile_step(plan: Plan, mesh: Mesh, bucket: Bucket, unrolled: bool, with_logits: bool = False) -> Any:
    """The step of one bucket, lowered and compiled for the mesh; it takes `pack(batch)`, and donates the state."""
    step = build_step(plan, mesh, bucket, unrolled, with_logits)

    def packed_step(params: Params, state: State, packed: jax.Array) -> tuple[State, Out]:
        return step(params, state, unpack(packed, bucket))

    packed = jax.ShapeDtypeStruct(pack(empty_batch(bucket)).shape, jnp.int32, sharding=NamedSharding(mesh, P()))
    arguments = abstract_params(plan, mesh, unrolled), abstract_state(plan, mesh, unrolled), packed
    return jax.jit(packed_step, donate_argnums=1).lower(*arguments).compile()


def _choose(logits: jax.Array, batch: Batch, routes: Routes) -> tuple[jax.Array, jax.Array]:
    """Tokens and log-probabilities of all rows on every device: [D + S]."""
    axes = tuple(axis for axis in routes.weight_stored if routes.sizes[axis] > 1)
    lanes = routes.bucket.decode_rows
    frame = routes.frame(routes.decode.order, ())

    def local(values: Any) -> jax.Array:
        values = jnp.asarray(values)
        return jnp.concatenate([move(values[:lanes], frame, Split(), Split(routes.replica)), values[lanes:]])

    how = jax.tree.map(local, batch.sampling)
    tokens, logprobs = choose(logits, vocabulary_ids(routes), how, axes, routes.bucket.random)
    return _whole_lanes(tokens, routes), _whole_lanes(logprobs, routes)


def _whole_lanes(values: jax.Array, routes: Routes) -> jax.Array:
    """Gather the decode lanes, the leading rows, over the replica axes."""
    if not routes.bucket.decode_rows:
        return values
    mine = routes.bucket.decode_rows // routes.ways(routes.replica)
    lanes = move(values[:mine], routes.frame(routes.decode.order, ()), Split(routes.replica), Split())
    return jnp.concatenate([lanes, values[mine:]])
