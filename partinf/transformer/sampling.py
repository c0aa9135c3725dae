"""Choosing tokens from logits whose vocabulary is split over devices, [R, V.a].

Nothing is gathered but the few most likely entries of each device, where alternatives are requested. Greedy selection is a maximum over
devices. Top-k and top-p find their threshold bit by bit: a float's bits, read as an ordered integer, are built from the highest down by
asking 32 times how many entries (how much mass) lie at or above a candidate. That is exact; entries equal to the threshold are all kept.
Min-p is a threshold below the largest. Sampling adds Gumbel noise keyed by (seed, sample, position, vocabulary entry), so a row's choice
depends neither on the batch nor on the mesh. `keep_plain` is the sorted twin of the thresholds.

Logits are taken relative to the largest of their row before they are divided by the temperature, which therefore overflows for none: the
largest stays 0, whatever the temperature, and is always kept, also where `top_p` is too small for a float32. The order of entries is that
of the logits themselves, which a high temperature would make equal.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from partinf.partition.collectives import Axes
from partinf.transformer.batch import SamplingBatch
from partinf.transformer.kernels import cpu

Combine = Callable[[jax.Array], jax.Array]

_LEAST_TEMPERATURE = 2.0**-126  # what smaller ones, which are 0 to a device and so greedy, are divided by
_LEAST_MASS = 1e-30  # far below 1, and far above what a float32 rounds to 0


def choose(logits: jax.Array, ids: jax.Array, how: SamplingBatch, axes: Axes, random: jax.Array | None, native: bool = False) -> jax.Array:
    """One token per row, [R].

    Args:
        logits: float32 [R, V.a]; -inf where an entry must not be chosen. ids: [V.a], the vocabulary entries held here.
        how: one entry per row.
        axes: a, the axes of size > 1 that split the vocabulary.
        random: whether any row of the step samples, on whatever device; None compiles greedy selection alone.
        native: the kernel for CPUs reads the rows, here and below.
    """
    total: Combine = lambda x: lax.psum(x, axes) if axes else x  # noqa: E731
    tokens = likeliest(logits, ids, axes, native)[0]
    if random is None:
        return tokens
    sampled = lambda: jnp.where(how.temperature > 0, _sample(logits, ids, how, axes, total), tokens)  # noqa: E731
    return lax.cond(random, sampled, lambda: tokens)


def log_normalizer(logits: jax.Array, axes: Axes, native: bool = False) -> jax.Array:
    """What to subtract from the logits [R, V.a] of a row for log-probabilities: [R]."""
    if native:
        own, _, mass = cpu.logit_ends(logits)
        top = _max(own, axes)
        mass = mass * jnp.exp(own - top) if axes else mass
        return jnp.log(lax.psum(mass, axes) if axes else mass) + top
    top = _max(jnp.max(logits, axis=-1), axes)
    mass = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
    return jnp.log(lax.psum(mass, axes) if axes else mass) + top


def logit_of(logits: jax.Array, ids: jax.Array, tokens: jax.Array, axes: Axes, native: bool = False) -> jax.Array:
    """The logit [R] of one token per row, 0 where it is none; arguments as in `choose`."""
    if native and not axes:  # the whole vocabulary is here, in order
        return jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="fill", fill_value=0.0)[:, 0]
    chosen = jnp.sum(jnp.where(ids[None, :] == tokens[:, None], logits, 0.0), axis=-1)
    return lax.psum(chosen, axes) if axes else chosen


def most_likely(logits: jax.Array, ids: jax.Array, axes: Axes, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest logits of every row, largest first, the lowest entry first among equals: entries and logits [R, ≤ count]."""
    logits = jnp.where(logits == 0, 0.0, logits)  # both zeros are one number
    values, places = lax.top_k(logits, min(count, logits.shape[-1]))  # of equals, the lowest place first
    entries = ids[places]
    if axes:
        values, entries = (lax.all_gather(x, axes, axis=1, tiled=True) for x in (values, entries))
    descending, entries = lax.sort((-values, entries), dimension=1, num_keys=2)
    return entries[:, :count], -descending[:, :count]


def keep(logits: jax.Array, scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, total: Combine) -> jax.Array:
    """Which entries survive: of the top_k largest of a row those with at least min_p of the largest's probability, then the fewest of
    those whose mass reaches top_p of theirs. The largest always does.

    Args:
        logits: [R, V.a], which give the order. scaled: [R, V.a], their distances below the row's largest over its temperature, which give
            the probabilities; 0 for the largest. top_k: [R], 0 for all. top_p, min_p: [R]. total: sum over the devices.
    """
    order = _ordered(logits)
    wanted = jnp.where(top_k > 0, top_k, jnp.iinfo(jnp.int32).max)
    kept = order >= _threshold(order, lambda above: total(jnp.sum(above, axis=-1, dtype=jnp.int32)) >= wanted)[:, None]
    kept &= scaled >= jnp.log(min_p)[:, None]
    mass = jnp.where(kept, jnp.exp(scaled), 0.0)
    # A product that is 0 in float32 would ask for nothing; this much asks for the largest, whose mass is 1.
    enough = jnp.maximum(top_p * total(jnp.sum(mass, axis=-1)), _LEAST_MASS)
    nucleus = _threshold(order, lambda above: total(jnp.sum(jnp.where(above, mass, 0.0), axis=-1)) >= enough)
    return kept & ((order >= nucleus[:, None]) | (top_p >= 1.0)[:, None])


def keep_plain(logits: jax.Array, scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """The twin of `keep` on whole rows: by sorting."""
    size = logits.shape[-1]
    descending = jnp.argsort(-logits, axis=-1)
    at = lambda x, index: jnp.take_along_axis(x, jnp.take_along_axis(descending, index[:, None], axis=-1), axis=-1)  # noqa: E731
    last = jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1
    kept = (logits >= at(logits, last)) & (jnp.exp(scaled) >= min_p[:, None])
    mass = jnp.where(kept, jnp.exp(scaled), 0.0)
    mass = mass / jnp.sum(mass, axis=-1, keepdims=True)
    reached = jnp.cumsum(jnp.take_along_axis(mass, descending, axis=-1), axis=-1)
    needed = jnp.minimum(jnp.sum(reached < top_p[:, None], axis=-1), size - 1)
    nucleus = logits >= at(logits, needed)
    return kept & (nucleus | (top_p >= 1.0)[:, None])


def _sample(logits: jax.Array, ids: jax.Array, how: SamplingBatch, axes: Axes, total: Combine) -> jax.Array:
    top = _max(jnp.max(logits, axis=-1), axes)
    scaled = (logits - top[:, None]) / jnp.maximum(how.temperature, _LEAST_TEMPERATURE)[:, None]
    kept = keep(logits, scaled, jnp.asarray(how.top_k), jnp.asarray(how.top_p), jnp.asarray(how.min_p), total)
    return _argmax(jnp.where(kept, scaled + _gumbel(how, ids), -jnp.inf), ids, axes)


def _gumbel(how: SamplingBatch, ids: jax.Array) -> jax.Array:
    """Gumbel noise [R, V.a] from one counter per (seed, sample, position, vocabulary entry)."""

    def row(seed: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
        return jax.vmap(lambda entry: jax.random.key_data(jax.random.fold_in(key, entry))[1])(ids)

    bits = jax.vmap(row)(jnp.asarray(how.seed), jnp.asarray(how.sample), jnp.asarray(how.position))
    return -jnp.log(-jnp.log(_uniform(bits)))


def _uniform(bits: jax.Array) -> jax.Array:
    """uint32 → float32 in (0, 1), both ends excluded. With one bit more the half of the largest would be rounded up to 1, whose noise is
    infinite: a token at random, once in 2²⁴ entries."""
    return ((bits >> 9).astype(jnp.float32) + 0.5) * 0.5**23


def _ordered(x: jax.Array) -> jax.Array:
    """float32 → uint32 with the same order; both zeros are one number."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order: jax.Array, reaches: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest integer t per row such that the entries at or above t satisfy `reaches`; 0 if none does."""

    def bit(index: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(reaches(order >= candidate[:, None]), candidate, found)

    return lax.fori_loop(0, 32, bit, jnp.zeros(order.shape[0], jnp.uint32))


def _max(x: jax.Array, axes: Axes) -> jax.Array:
    return lax.pmax(x, axes) if axes else x


def likeliest(logits: jax.Array, ids: jax.Array, axes: Axes, native: bool = False) -> tuple[jax.Array, jax.Array]:
    """The vocabulary entry of each row's largest logit, the lowest one among equals, and that logit: [R] each.

    Two plain reductions: XLA on CPU takes longer for one that carries values and places.
    """
    nowhere = jnp.iinfo(jnp.int32).max
    if native:
        own, place, _ = cpu.logit_ends(logits)
        top = _max(own, axes)
        mine = jnp.where(own == top, ids.at[place].get(mode="fill", fill_value=nowhere), nowhere)
    else:
        top = _max(jnp.max(logits, axis=-1), axes)
        mine = jnp.min(jnp.where(logits == top[:, None], ids[None, :], nowhere), axis=-1)
    return lax.pmin(mine, axes) if axes else mine, top


def _argmax(logits: jax.Array, ids: jax.Array, axes: Axes) -> jax.Array:
    return likeliest(logits, ids, axes)[0]
