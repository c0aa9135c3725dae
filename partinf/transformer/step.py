"""The compiled step: `step(params, state, batches) → (state, out)`, one program per bucket.

The state (KV pages, the last token of every slot, in extended plans its counts and biases, in constrained ones its mask of tokens) is
donated and updated in place; a sampled token is fed to the next step on the device unless the host sends another.
A step is one tick of the pipeline (`transformer.stages`): it takes one batch per stage and gives the tokens of the last stage's. With
one stage that is the batch that it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from partinf.foundation.errors import raise_offences
from partinf.foundation.limits import TOP_LOGPROBS
from partinf.partition.collectives import Split, move
from partinf.partition.sharding import WHOLE, platform_of, sharding, spec, whole
from partinf.plans import Bucket, Plan
from partinf.transformer import stages
from partinf.transformer.batch import Batch, empty_batch, pack, stacked, unpack
from partinf.transformer.cache import abstract_cache
from partinf.transformer.forward import hidden, prompt_scores, sampled_logits, vocabulary_ids
from partinf.transformer.linear import native_rows
from partinf.transformer.masks import abstract_masks, restrict
from partinf.transformer.params import Params, abstract_params
from partinf.transformer.routes import Routes
from partinf.transformer.sampling import choose, log_normalizer, logit_of, most_likely
from partinf.transformer.slots import Slots, abstract_slots, adjust_logits, count_fed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What stays on the devices between steps.

    Attributes:
        kv: the paged cache. last_token: [slots] the last token sampled for each slot.
        slots: for penalties and biases, in extended plans alone. carried: activations that the next tick's stages begin with, if there are
            several. masks: the tokens that constrained rows may choose, in constrained plans alone (`transformer.masks`).
    """

    kv: Any
    last_token: jax.Array
    slots: Slots | None = None
    carried: jax.Array | None = None
    masks: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Out:
    """What a step returns, equal on all devices.

    Attributes:
        tokens, logprobs: [D + S], decode lanes first; log-probabilities are those of the model, before temperature and penalties. Token
            -1 stands for a row whose logits are not finite.
        logits: [D + S, V.ef] float32, or None unless it was requested.
        top_tokens, top_logprobs: [D + S, ≤ TOP_LOGPROBS] the most likely tokens of each row, in extended buckets; meaningless in a step
            whose rows want none. prompt_logprobs: [T] of the targets, in extended buckets with prompt tokens; prompt_top_tokens,
            prompt_top_logprobs: [T] the likeliest tokens in their places.
    """

    tokens: jax.Array
    logprobs: jax.Array
    logits: jax.Array | None = None
    top_tokens: jax.Array | None = None
    top_logprobs: jax.Array | None = None
    prompt_logprobs: jax.Array | None = None
    prompt_top_tokens: jax.Array | None = None
    prompt_top_logprobs: jax.Array | None = None


Step = Callable[[Params, State, Batch], tuple[State, Out]]


def abstract_state(plan: Plan, mesh: Mesh | AbstractMesh, unrolled: bool) -> State:
    """The state as `jax.ShapeDtypeStruct`s with shardings."""
    last = jax.ShapeDtypeStruct((plan.cache.num_slots,), jnp.int32, sharding=sharding(plan, mesh, "."))
    slots = abstract_slots(plan, mesh) if plan.extended else None
    masks = abstract_masks(plan, mesh) if plan.constrained else None
    return State(abstract_cache(plan, mesh, unrolled), last, slots, stages.abstract_carried(plan, mesh), masks)


def empty_state(plan: Plan, mesh: Mesh, unrolled: bool) -> State:
    """A state without any page in use, on the devices."""
    abstract = abstract_state(plan, mesh, unrolled)
    make = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)  # noqa: E731
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def check_bucket(plan: Plan, bucket: Bucket) -> None:
    """Raise `InvalidInput` with every reason why this plan cannot run this bucket."""
    offences = []
    multiples = (
        ("decode rows", bucket.decode_rows, plan.decode_row_multiple(plan.ffn_phase(bucket.num_tokens))),
        ("prefill tokens", bucket.prefill_tokens, plan.prefill_token_multiple()),
        ("prefill slots", bucket.prefill_slots, plan.prefill_slot_multiple()),
        ("decode pages", bucket.decode_pages, plan.num_sequence_shards),
        ("prefill pages", bucket.prefill_pages, plan.prefill_page_multiple()),
    )
    for label, size, multiple in multiples:
        if size % multiple:
            offences.append(f"bucket {bucket}: {size} {label} on this plan; a multiple of {multiple} is needed")
    uneven = [group.pages_per_shard for group in plan.cache_groups if group.pages_per_shard % plan.num_sequence_shards]
    for count in uneven:
        held = f"cache: {count} pages per shard"
        offences.append(
            f"{held}, which sequence axes split {plan.num_sequence_shards} ways; a multiple of {plan.num_sequence_shards} is needed"
        )
    if bucket.num_tokens == 0:
        offences.append(f"bucket {bucket}: no tokens")
    if bool(bucket.prefill_tokens) != bool(bucket.prefill_slots):
        offences.append(f"bucket {bucket}: prefill tokens and prefill slots go together")
    if bucket.extended and not plan.extended:
        offences.append(f"bucket {bucket}: the plan has no extended bucket, so its slots keep no counts")
    if bucket.constrained and not plan.constrained:
        offences.append(f"bucket {bucket}: the plan has no constrained bucket, so its slots keep no masks")
    carried = zip((bucket.decode_rows, bucket.prefill_tokens), plan.carried_rows, strict=True)
    if plan.num_stages > 1 and any(rows not in (0, kept) for rows, kept in carried):
        offences.append(
            f"bucket {bucket}: it is none of the plan's, whose stages pass on {plan.carried_rows} decode rows and prompt tokens"
        )
    raise_offences(offences)


def build_step(
    plan: Plan, mesh: Mesh | AbstractMesh, bucket: Bucket, unrolled: bool, with_logits: bool = False, plain: bool = False
) -> Step:
    """The step of one bucket, to be jitted by the caller (`compile_step`) or traced; `plain` takes the plain twin of attention."""
    check_bucket(plan, bucket)
    routes = Routes(plan, bucket, plain)
    specs = lambda tree: jax.tree.map(lambda leaf: leaf.sharding.spec, tree)  # noqa: E731
    params_specs, state_specs = specs(abstract_params(plan, mesh, unrolled)), specs(abstract_state(plan, mesh, unrolled))
    batch_specs = jax.tree.map(lambda _: WHOLE, stacked(bucket, plan))
    extended = WHOLE if bucket.extended else None
    out_specs = Out(
        WHOLE, WHOLE, spec(plan, ".W") if with_logits else None, extended, extended, *[extended if bucket.prefill_tokens else None] * 3
    )

    def local_step(params: Params, state: State, batches: Batch) -> tuple[State, Out]:
        mine, batch = stages.of_this_stage(batches, routes), stages.last(batches)
        x, kv = hidden(params, state.kv, mine, _fed(mine, state), routes, state.carried)
        carried = stages.leave(x, state.carried, routes)
        kept = state.slots
        if bucket.extended:
            # A slot's counts change where they are used, so that steps in stages before have not touched them.
            kept = count_fed(
                kept, jnp.asarray(batch.decode.slot), _fed(batch, state), jnp.asarray(batch.extended.counted), vocabulary_ids(routes)
            )
        logits = sampled_logits(params, x, batch, routes)
        slots = jnp.concatenate([jnp.asarray(batch.decode.slot), jnp.asarray(batch.prefill.slot)])
        out = choose_tokens(logits, replace(state, slots=kept), slots, batch, routes)
        if bucket.extended and bucket.prefill_tokens:
            logprobs, top_tokens, top_logprobs = _prompt_scores(params, x, batch, routes)
            out = replace(out, prompt_logprobs=logprobs, prompt_top_tokens=top_tokens, prompt_top_logprobs=top_logprobs)
        out = stages.from_last(replace(out, logits=_whole_lanes(logits, routes) if with_logits else None), routes)
        slots = jnp.where(slots >= 0, slots, plan.cache.num_slots)  # out of range: dropped
        last = state.last_token.at[slots].set(jnp.maximum(out.tokens, 0), mode="drop")
        return State(kv, last, kept, carried, state.masks), out

    in_specs = (params_specs, state_specs, batch_specs)
    return jax.shard_map(local_step, mesh=mesh, in_specs=in_specs, out_specs=(state_specs, out_specs), check_vma=False)


def compile_step(plan: Plan, mesh: Mesh, bucket: Bucket, unrolled: bool, with_logits: bool = False) -> Any:
    """The step of one bucket, lowered and compiled for the mesh; it takes `pack(batches)`, and donates the state."""
    step = build_step(plan, mesh, bucket, unrolled, with_logits)

    def packed_step(params: Params, state: State, packed: jax.Array) -> tuple[State, Out]:
        return step(params, state, unpack(packed, bucket, plan))

    packed = jax.ShapeDtypeStruct(pack([empty_batch(bucket, plan)] * plan.num_stages).shape, jnp.int32, sharding=whole(mesh))
    arguments = abstract_params(plan, mesh, unrolled), abstract_state(plan, mesh, unrolled), packed
    return jax.jit(packed_step, donate_argnums=1).lower(*arguments).compile(compiler_options(mesh))


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What is set for the devices' compiler beyond its defaults, by everything that runs a step."""
    return dict(platform_of(mesh).compiler_options) or None


def _fed(batch: Batch, state: State) -> jax.Array:
    """The tokens [D] that decode lanes feed. A slot's last one stays until its own next one is chosen, so every stage finds the same."""
    fed = jnp.asarray(batch.decode.token)
    return jnp.where(fed >= 0, fed, state.last_token.at[batch.decode.slot].get(mode="clip"))


def choose_tokens(logits: jax.Array, state: State, slots: jax.Array, batch: Batch, routes: Routes) -> Out:
    """Tokens and log-probabilities of all rows [D + S] on every device, and the most likely tokens where any row wants them.

    Args:
        state: of which the rows' slots are read. slots: [D + S], of the rows.
    """
    axes = tuple(axis for axis in routes.weight_stored if routes.sizes[axis] > 1)
    lanes = routes.bucket.decode_rows
    frame = routes.frame(routes.decode.order, ())

    def local(values: Any) -> jax.Array:
        values = jnp.asarray(values)
        return jnp.concatenate([move(values[:lanes], frame, Split(), Split(routes.replica)), values[lanes:]])

    ids, how = vocabulary_ids(routes), jax.tree.map(local, batch.sampling)
    random = jnp.any(jnp.asarray(batch.sampling.temperature) > 0) if routes.bucket.random else None
    choices = logits  # what is chosen from; log-probabilities are the model's own
    if routes.bucket.extended:
        rows = replace(batch.extended, counted=None, target=None)
        choices = adjust_logits(choices, state.slots, local(slots), jax.tree.map(local, rows))
    if routes.bucket.constrained:
        choices = restrict(choices, state.masks, local(slots), local(batch.constrained))
    native = native_rows(routes)
    tokens = choose(choices, ids, how, axes, random, native)
    if not routes.bucket.extended:
        logprobs = logit_of(logits, ids, tokens, axes, native) - log_normalizer(logits, axes, native)
        return Out(_whole_lanes(_token_or_none(tokens, logprobs, routes), routes), _whole_lanes(logprobs, routes))
    normalizer = log_normalizer(logits, axes, native)
    logprobs = logit_of(logits, ids, tokens, axes, native) - normalizer

    def alternatives() -> tuple[jax.Array, jax.Array]:
        entries, values = most_likely(logits, ids, axes, TOP_LOGPROBS)
        return _whole_lanes(entries, routes), _whole_lanes(values - normalizer[:, None], routes)

    shapes = jax.eval_shape(alternatives)
    nothing = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # noqa: E731
    tops = lax.cond(jnp.any(jnp.asarray(batch.extended.alternatives) > 0), alternatives, nothing)
    return Out(_whole_lanes(_token_or_none(tokens, logprobs, routes), routes), _whole_lanes(logprobs, routes), None, *tops)


def _token_or_none(tokens: jax.Array, logprobs: jax.Array, routes: Routes) -> jax.Array:
    """The tokens [R], -1 where nothing could be chosen. A logit of NaN or inf, or a row of -inf alone, shows in the sum by which
    log-probabilities are normalised, on every device; a choice among such is no entry of the vocabulary, or any."""
    return jnp.where(jnp.isfinite(logprobs) & (tokens < routes.plan.model.vocab_size), tokens, -1)


def _prompt_scores(params: Params, x: jax.Array, batch: Batch, routes: Routes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the targets and the likeliest tokens in their places with theirs, [T] each, where there are any targets."""
    targets = jnp.asarray(batch.extended.target)
    lanes = routes.bucket.decode_rows // routes.ways(routes.tokens)
    score = lambda: prompt_scores(params, x[lanes:], targets, routes)  # noqa: E731
    nothing = lambda: tuple(jnp.zeros(targets.shape, dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32))  # noqa: E731
    return lax.cond(jnp.any(targets >= 0), score, nothing)


def _whole_lanes(values: jax.Array, routes: Routes) -> jax.Array:
    """Gather the decode lanes, the leading rows, over the replica axes."""
    if not routes.bucket.decode_rows:
        return values
    mine = routes.bucket.decode_rows // routes.ways(routes.replica)
    lanes = move(values[:mine], routes.frame(routes.decode.order, ()), Split(routes.replica), Split())
    return jnp.concatenate([lanes, values[mine:]])
