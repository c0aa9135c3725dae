"""One forward pass inside `shard_map`: tokens → embed → blocks → norm → logits at the sampled positions.

A worked example: 2×2×2 devices, axes x, y, z; storage x: embed, y, z: ffn (E_x F_yz); no gather; decode attends over batch on all axes,
prefill over heads. E 64, F 192, H 8, K 2, Q 8, V 256; a step of 8 decode lanes and 16 prompt tokens. Local shapes of one device:

    1. embedding table [256, E.xyz = 8]; lookup of all 24 tokens                x [24, E.xyz = 8]
    2. norm (squares of all parts), all-gather(yz)                              h [24, E.x = 32]
    3. h · W_Q [H.yz 2, 8, E.x 32]                                              q [24, H.yz = 2, 8] {x unreduced}
    4. decode lanes: reduce-scatter(x) onto lanes, all-to-all(yz)               q [8/8 = 1, H = 8, 8]
       prompt tokens: reduce-scatter(x) onto heads                              q [16, H.yzx = 1, 8]
    5. h · W_KV, stored K.y = 1 (2 kv heads divide over y, not over yz)         kv [24, 2, K.y = 1, 8] {x unreduced}
       decode lanes: slice(z), reduce-scatter(x) onto lanes, all-to-all(y)      kv [1, 2, K = 2, 8]: the lane's owner writes its page
       prompt tokens: all-reduce(x)                                             kv [16, 2, K.y = 1, 8] for attention over heads;
       then all-gather(y) of the heads                                          kv [16, 2, K = 2, 8]: each owner keeps its own
    6. attention; back by all-to-all(yz) and all-gather(x)                      o [24, H.yz = 2, 8]
    7. o · W_O [E.x 32, H.yz 2, 8], reduce-scatter(y), reduce-scatter(z)        x [24, E.xyz = 8]
    8. norm, all-gather(yz), · W_in [2, F.yz 48, E.x 32]                        [24, 2, F.yz = 48] {x unreduced}
    9. reduce-scatter(x), silu · mul, all-gather(x), · W_out [E.x 32, F.yz 48]  [24, E.x = 32] {yz unreduced}
    10. reduce-scatter(y), reduce-scatter(z)                                    x [24, E.xyz = 8]
    11. rows to sample from: 8 lanes, last tokens of the prompts; logits        [rows, V = 256] {xyz unreduced}
        reduce-scatter(x), (y), (z)                                             [rows, V.xyz = 32]
        with a table of their own [V.xyz = 32, 64]: all-gather(xyz) of rows     [rows, 64], and logits of these [rows, V.xyz = 32]
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from partinf.hardware.platform import LANES
from partinf.model.config import Position
from partinf.model.kinds import Run
from partinf.partition.collectives import Axes, Split, move, take_split
from partinf.transformer import stages
from partinf.transformer.attention import rotations_of
from partinf.transformer.batch import Batch
from partinf.transformer.block import block
from partinf.transformer.experts import left_stacked
from partinf.transformer.linear import ENTERING, LEAVING, capped, dot, gather_weights, live_rows, live_tokens, made_for, norm
from partinf.transformer.params import OneOf, Params, Stacks
from partinf.transformer.routes import Group, Routes
from partinf.transformer.sampling import likeliest, log_normalizer, logit_of

_SCORED_ROWS = 128  # rows of logits of given tokens that exist at once
_MULTIPLIED_TOKENS = 512  # as many cost half of what laying a table of 258,048 rows out anew does, by the TPU compiler's estimate


def hidden(
    params: Params, kv: Any, batch: Batch, decode_tokens: jax.Array, routes: Routes, carried: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """The last layer's output [T.t, E.w] for all tokens of the step, decode lanes first, and the cache with their keys and values.

    Args:
        decode_tokens: [D] tokens to feed, already resolved from the last sampled ones.
        carried: what the stage before this one sent; the last layer is then that of this stage.
    """
    x = stages.enter(embedded(params, batch, decode_tokens, routes), carried, routes)
    return _layers(params["layers"], _spread(x, routes), kv, batch, replace(routes, live=live_tokens(batch, routes)))


def embedded(params: Params, batch: Batch, decode_tokens: jax.Array, routes: Routes) -> jax.Array:
    """The embeddings [T.r, E.ef] of all tokens of the step, decode lanes first."""
    parts = []
    if routes.bucket.decode_rows:
        parts.append(_embed(params, decode_tokens, jnp.asarray(batch.decode.position), routes.decode, routes))
    if routes.bucket.prefill_tokens:
        prefill = batch.prefill
        parts.append(_embed(params, jnp.asarray(prefill.token), jnp.asarray(prefill.position), routes.prefill, routes))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _embed(params: Params, tokens: jax.Array, positions: jax.Array, group: Group, routes: Routes) -> jax.Array:
    tokens = take_split(tokens, 0, group.order, routes.replica, routes.sizes)  # [T.r]
    x = _looked_up(params["embed"], tokens, routes)  # [T.r, E.ef]
    if routes.plan.model.embedding_scale != 1.0:
        x = x * jnp.asarray(routes.plan.model.embedding_scale, x.dtype)
    if routes.plan.model.position is Position.LEARNED:
        x = x + params["positions"].at[take_split(positions, 0, group.order, routes.replica, routes.sizes)].get(mode="clip")
    return x


def _looked_up(table: jax.Array, tokens: jax.Array, routes: Routes) -> jax.Array:
    """Rows [T, E] of the table [V, E].

    Where a device's columns fill no whole lanes, a TPU keeps the table column by column and lays all of it out anew for a look-up. A
    product with rows of the identity reads it once, as the logits do, and is as exact. What is no number in the table would reach every
    token there, as 0 · NaN; it goes through the product as the largest number, and is NaN behind it.
    """
    by_columns = routes.plan.slice.chip.platform.multiplied_look_up and table.dtype == jnp.bfloat16 and table.shape[1] % LANES
    if routes.plain or not by_columns or tokens.shape[0] > _MULTIPLIED_TOKENS:
        return table[tokens]
    rows = (tokens[:, None] == jnp.arange(table.shape[0])[None, :]).astype(table.dtype)
    most = jnp.finfo(table.dtype).max
    found = dot("tv,ve->te", rows, jnp.where(jnp.abs(table) < most, table, most))
    return jnp.where(found < most, found, jnp.nan)


def _spread(x: jax.Array, routes: Routes) -> jax.Array:
    """[T.r, E.ef] → [T.t, E.w], as the layers of this phase take it."""
    lanes = routes.bucket.decode_rows // routes.ways(routes.replica)
    parts = []
    for part, group in ((x[:lanes], routes.decode), (x[lanes:], routes.prefill)):
        if part.shape[0]:
            frame = routes.frame(group.order, routes.weight_stored)
            parts.append(move(part, frame, Split(routes.replica, routes.weight_stored), Split(routes.tokens, routes.between)))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _layers(layers: Any, x: jax.Array, kv: Any, batch: Batch, routes: Routes) -> tuple[jax.Array, Any]:
    """All layers of a stage: unrolled over a tuple of per-layer trees, or scans over the runs of stacked ones with the whole cache as their
    carry. What repeats in a run is its kinds one after the other.

    Where weights are gathered ahead, the first products' weights of a layer come with the carry: gathered once before the first scan, in
    every layer for the next one, and not in the last, which follows the last scan. Each is gathered once per layer, as without.
    """
    rotations, model = rotations_of(batch, routes), routes.plan.model

    def one(weights: Params, entering: Params, x: jax.Array, kv: Any, index: Any, kind: int) -> tuple[jax.Array, Any]:
        return block({**weights, **entering}, x, kv, index, batch, routes, kind, rotations[kind])

    def entering(weights: Params) -> Params:
        return gather_weights(weights, ENTERING, routes)

    if isinstance(layers, tuple):
        # All layers of a kind are the same function of their own weights and cache, which is traced and lowered once.
        alike = [jax.jit(functools.partial(one, index=0, kind=kind)) for kind in range(len(model.layer_kinds))]
        caches = [list(held) for held in kv]
        for weights, place, kind in zip(layers, routes.places, model.kind_of_layers, strict=True):
            held = caches[routes.groups[kind]]
            x, (held[place],) = alike[kind](weights, entering(weights), x, (held[place],))
        return x, tuple(map(tuple, caches))
    in_pieces = (*(LEAVING if routes.phase.loop and not routes.phase.gather else ()), *left_stacked(routes))
    stacks = Stacks(layers, model.of_stage(routes.ways(routes.stages)))

    def layer(index: Any, kind: int) -> Params:
        stack, place = stacks.layer(index, kind)
        slice_of = lambda leaf: lax.dynamic_index_in_dim(leaf, place, keepdims=False)  # noqa: E731
        return {name: OneOf(leaf, place) if name in in_pieces else jax.tree.map(slice_of, leaf) for name, leaf in stack.items()}

    def stacked(weights: Params, entering: Params, x: jax.Array, kv: Any, index: Any, kind: int) -> tuple[jax.Array, Any]:
        group = routes.groups[kind]
        place = index if len(kv) == 1 else jnp.asarray(routes.places)[index]
        x, held = one(weights, entering, x, kv[group], place, kind)
        return x, (*kv[:group], held, *kv[group + 1 :])

    def plainly(carry: tuple[jax.Array, Any], index: Any, kind: int, following: int) -> tuple[jax.Array, Any]:
        return stacked(layer(index, kind), entering(layer(index, kind)), *carry, index, kind)

    if not routes.phase.ahead:
        carry = (x, kv)
        for run in routes.runs:
            carry = repeated(run, plainly, carry)
        return carry

    def before_next(carry: tuple[jax.Array, Any, Params], index: Any, kind: int, following: int) -> tuple[jax.Array, Any, Params]:
        x, kv, ready = carry
        ready_next = entering(layer(index + 1, following))
        return (*stacked(layer(index, kind), ready, x, kv, index, kind), ready_next)

    runs = routes.runs if stacks.num_groups == 1 else tuple(itertools.chain.from_iterable(map(_last_apart, routes.runs)))
    *before, end = runs
    last = end.first + end.num_layers - 1
    ahead = (x, kv, entering(layer(0, runs[0].kinds[0])))
    for run, then in itertools.pairwise(runs):
        ahead = repeated(run, before_next, ahead, then.kinds[0])
    ahead = repeated(replace(end, repeats=end.repeats - 1), before_next, ahead)
    ahead = repeated(Run(last + 1 - len(end.kinds), end.kinds[:-1], 1), before_next, ahead, end.kinds[-1])
    x, kv, ready = ahead
    return stacked(layer(last, end.kinds[-1]), ready, x, kv, last, end.kinds[-1])


def _last_apart(run: Run) -> tuple[Run, ...]:
    """A run as two, of which the second is the last repeat: the layer after that may have other weights than the first of the run."""
    if run.repeats == 1:
        return (run,)
    return replace(run, repeats=run.repeats - 1), Run(run.first + run.num_layers - len(run.kinds), run.kinds, 1)


def repeated(run: Run, layer: Callable[[Any, Any, int, int], Any], carry: Any, then: int | None = None) -> Any:
    """The layers of a run: what repeats is compiled once.

    Args:
        layer: (what the layer before left, the layer's number, its kind, the kind of the next one) → what it leaves.
        then: the kind of the layer after the run, if that is not its first one. A run that repeats needs one with the same weights.
    """
    following = (*run.kinds, *(run.kinds[:1] if then is None else (then,)))[1:]

    def period(carry: Any, first: Any) -> Any:
        for place, (kind, following_kind) in enumerate(zip(run.kinds, following, strict=True)):
            carry = layer(carry, first + place if place else first, kind, following_kind)
        return carry

    if run.num_layers == len(run.kinds):
        return period(carry, run.first)
    if not run.num_layers:
        return carry
    firsts = jnp.arange(run.first, run.first + run.num_layers, len(run.kinds))
    return lax.scan(lambda carry, first: (period(carry, first), None), carry, firsts)[0]


def sampled_logits(params: Params, x: jax.Array, batch: Batch, routes: Routes) -> jax.Array:
    """Logits of the rows of `hidden` from which tokens are sampled.

    Returns:
        float32 [D.r + S, V.ef]: decode lanes split over the replica axes r, then all prefill slots; padding of V is -inf.
    """
    return logits(params, _sampled_rows(x, batch, routes), routes, live_rows(batch, routes))


def _sampled_rows(x: jax.Array, batch: Batch, routes: Routes) -> jax.Array:
    """The rows from which tokens are sampled, with E as the table of logits has it: [D.r + S, E.c]."""
    lanes = routes.bucket.decode_rows // routes.ways(routes.tokens)
    parts = []
    if routes.bucket.decode_rows:
        frame = routes.frame(routes.decode.order, routes.weight_stored)
        target = Split(routes.replica, routes.logit_cols)
        parts.append(move(x[:lanes], frame, Split(routes.tokens, routes.between), target))
    if routes.bucket.prefill_slots:
        order = routes.prefill.order
        here = take_split(jnp.arange(routes.bucket.prefill_tokens), 0, order, routes.tokens, routes.sizes)
        picked = jnp.asarray(batch.prefill.last)[:, None] == here[None, :]
        last = _picked(picked, x[lanes:])  # [S, E.w] {t unreduced}
        frame = routes.frame((), routes.weight_stored)
        last = move(last, frame, Split(cols=routes.between, unreduced=routes.tokens), Split(cols=routes.between))
        parts.append(move(last, frame, Split(cols=routes.between), Split(cols=routes.logit_cols)))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _picked(picked: jax.Array, x: jax.Array) -> jax.Array:
    """Rows [S, E] of x [T, E], at most one per row of `picked` [S, T]: a product with ones and zeros, exact because it has one term.

    Rows that hold anything but numbers are kept out of it, for 0 · NaN would reach all others.
    """
    numbers = jnp.all(jnp.isfinite(x), axis=1)  # [T]
    found = picked.astype(x.dtype) @ jnp.where(numbers[:, None], x, 0.0)
    return jnp.where(jnp.any(picked & ~numbers[None, :], axis=1)[:, None], jnp.nan, found)


def logits(params: Params, rows: jax.Array, routes: Routes, live: jax.Array | None = None) -> jax.Array:
    """Logits [R, V.ef] of rows [R, E.c], float32; padding of V is -inf. c: all weight axes, or none (`Routes.logit_cols`). Rows that
    are not live may have any."""
    axes, cols, model = routes.weight_stored, routes.logit_cols, routes.plan.model
    rows = norm(rows, params, "final_norm", cols, routes) if model.final_norm else rows
    table = params.get("unembed", params["embed"])  # [V, E.ef], or [V.ef, E]
    found = dot("re,ve->rv", rows, table, jnp.float32, made_for(routes), live)  # [R, V] {ef unreduced}, or [R, V.ef]
    source = Split(cols=tuple(axis for axis in axes if axis not in cols), unreduced=cols)
    found = move(found, routes.frame((), axes), source, Split(cols=axes))  # [R, V.ef]
    if model.output_bias:
        found = found + take_split(params["unembed_bias"], 0, axes, axes, routes.sizes).astype(jnp.float32)[None]
    found = capped(found * model.logit_scale if model.logit_scale != 1.0 else found, model.logit_cap)
    if model.padded_vocab_size == model.vocab_size:
        return found
    return jnp.where(vocabulary_ids(routes)[None, :] < model.vocab_size, found, -jnp.inf)


def token_logprobs(params: Params, x: jax.Array, targets: jax.Array, routes: Routes) -> jax.Array:
    """Log-probabilities [T] of one token `targets` [T] after each prompt token, whose last layer's output is x [T.t, E.w]."""

    def score(found: jax.Array, ids: jax.Array, targets: jax.Array, axes: Axes) -> jax.Array:
        return logit_of(found, ids, targets, axes) - log_normalizer(found, axes)

    return _scored(params, x, targets, routes, score)


def prompt_scores(params: Params, x: jax.Array, targets: jax.Array, routes: Routes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `token_logprobs`, and the likeliest token after each prompt token with its log-probability: [T] each."""

    def score(found: jax.Array, ids: jax.Array, targets: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array, jax.Array]:
        normalizer = log_normalizer(found, axes)
        tokens, tops = likeliest(found, ids, axes)
        return logit_of(found, ids, targets, axes) - normalizer, tokens, tops - normalizer

    return _scored(params, x, targets, routes, score)


def _scored(params: Params, x: jax.Array, targets: jax.Array, routes: Routes, score: Callable[..., Any]) -> Any:
    """What `score` (logits, vocabulary ids, targets, axes that split them) finds for every prompt token, as arrays [T].

    Logits are made for a chunk of rows at a time, so nothing of size tokens × vocabulary exists, on any device.
    """
    order = routes.prefill.order
    rows = routes.frame(order, routes.weight_stored)
    x = move(x, rows, Split(routes.tokens, routes.between), Split(routes.replica, routes.logit_cols))  # [T.r, E.c]
    targets = take_split(targets, 0, order, routes.replica, routes.sizes)  # [T.r]
    axes = tuple(axis for axis in routes.weight_stored if routes.sizes[axis] > 1)
    ids = vocabulary_ids(routes)
    size = max(count for count in range(1, _SCORED_ROWS + 1) if x.shape[0] % count == 0)

    def chunk(part: tuple[jax.Array, jax.Array]) -> Any:
        return score(logits(params, part[0], routes), ids, part[1], axes)

    found = lax.map(chunk, (x.reshape(-1, size, x.shape[1]), targets.reshape(-1, size)))
    whole = lambda part: move(part.reshape(-1), routes.frame(order, ()), Split(routes.replica), Split())  # noqa: E731  # [T.r] → [T]
    return jax.tree.map(whole, found)


def vocabulary_ids(routes: Routes) -> jax.Array:
    """The vocabulary entries whose logits this device holds, [V.ef]."""
    axes = routes.weight_stored
    return take_split(jnp.arange(routes.plan.model.padded_vocab_size), 0, axes, axes, routes.sizes)
