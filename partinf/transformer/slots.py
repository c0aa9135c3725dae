"""Penalties, logit biases and least lengths: what each slot remembers of its sequence on the devices, and how it changes logits.

Every slot of an extended plan keeps, for every entry of the vocabulary, how often the sequence generated it, whether its prompt holds it,
whether it ends the text, and its bias; all split over the vocabulary as the logits are, so nothing is exchanged. A slot is started, from
what the host knows, whenever a sequence with adjusted logits becomes resident in it (`compile_start`): when it begins, after preemption,
from a shared prefix, back from host memory. From then on each sampled token is counted on the device when it is fed, which the host may not
have seen yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from partinf.foundation.limits import MAX_BIASES, MAX_ENDS
from partinf.partition.collectives import take_split
from partinf.partition.sharding import WHOLE, sharding, whole
from partinf.plans import Plan
from partinf.transformer.batch import ENDS_LATER, ExtendedBatch

PROMPTED, ENDS = 1, 2  # bits of `Slots.marks`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What penalties and biases need.

    Attributes:
        generated: int32 [slots, V.ef] how often the sequence generated an entry.
        marks: uint8 [slots, V.ef] PROMPTED where its prompt holds an entry, ENDS where it ends the text: bits.
        bias: float32 [slots, V.ef].
    """

    generated: jax.Array
    marks: jax.Array
    bias: jax.Array


def abstract_slots(plan: Plan, mesh: Mesh | AbstractMesh) -> Slots:
    """The slots as `jax.ShapeDtypeStruct`s with shardings."""
    shape, split = (plan.cache.num_slots, plan.model.padded_vocab_size), sharding(plan, mesh, ".W")
    return Slots(*(jax.ShapeDtypeStruct(shape, dtype, sharding=split) for dtype in (jnp.int32, jnp.uint8, jnp.float32)))


def count_fed(slots: Slots, slot: jax.Array, tokens: jax.Array, counted: jax.Array, ids: jax.Array) -> Slots:
    """Count the tokens [D] that decode lanes feed for their slots [D], where `counted` [D] says so."""
    places = _places(jnp.where(counted == 1, tokens, -1), ids)
    return Slots(slots.generated.at[slot, places].add(1, mode="drop"), slots.marks, slots.bias)


def adjust_logits(logits: jax.Array, slots: Slots, slot: jax.Array, how: ExtendedBatch) -> jax.Array:
    """Logits [R, V.ef] after bias, repetition, frequency and presence penalty, in this order, for the rows with `adjusted` set.

    Frequency and presence count generated tokens alone, as OpenAI's do; repetition divides positive logits and multiplies the others
    for every token of prompt and output, as Hugging Face's does.
    """
    adjusted = jnp.asarray(how.adjusted) > 0
    ends_later = jnp.asarray(how.adjusted) == ENDS_LATER

    def changed(logits: jax.Array) -> jax.Array:
        at = lambda array: array.at[slot].get(mode="clip")  # noqa: E731  # [R, V.ef]
        generated, marks = at(slots.generated), at(slots.marks)
        x = logits + at(slots.bias)
        repetition = jnp.asarray(how.repetition)[:, None]
        x = jnp.where((marks & PROMPTED > 0) | (generated > 0), jnp.where(x > 0, x / repetition, x * repetition), x)
        x -= jnp.asarray(how.frequency)[:, None] * generated.astype(jnp.float32)
        x -= jnp.asarray(how.presence)[:, None] * (generated > 0).astype(jnp.float32)
        x = jnp.where((marks & ENDS > 0) & ends_later[:, None], -jnp.inf, x)
        return jnp.where(adjusted[:, None], x, logits)

    return lax.cond(jnp.any(adjusted), changed, lambda x: x, logits)


def adjust_logits_plain(
    logits: np.ndarray,
    prompt: Sequence[int],
    generated: Sequence[int],
    bias: dict[int, float],
    penalties: tuple[float, float, float] = (0.0, 0.0, 1.0),
    ends: Sequence[int] = (),
) -> np.ndarray:
    """The twin of `adjust_logits` for one row of whole logits [V], from the tokens themselves; penalties: presence, frequency, repetition;
    ends: tokens that must not be chosen yet."""
    presence, frequency, repetition = penalties
    x = np.array(logits, np.float64)
    for token, value in bias.items():
        x[token] += value
    for token in {*prompt, *generated}:
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(generated):
        x[token] -= frequency * list(generated).count(token) + presence
    x[list(ends)] = -np.inf
    return x


def pack_start(
    slot: int, prompt: Sequence[int], generated: Sequence[int], bias: Sequence[tuple[int, float]], ends: Sequence[int], max_len: int
) -> np.ndarray:
    """The argument of the program that starts a slot: slot, length of the prompt, all tokens known, those that end the text, entries and
    values of the biases."""
    packed = np.full(_start_size(max_len), -1, np.int32)
    known = [*prompt, *generated]
    packed[:2], packed[2 : 2 + len(known)] = (slot, len(prompt)), known
    packed[2 + max_len : 2 + max_len + len(ends)] = ends
    entries, values = np.split(packed[2 + max_len + MAX_ENDS :], 2)
    values = values.view(np.float32)
    entries[: len(bias)], values[: len(bias)] = [token for token, _ in bias], [value for _, value in bias]
    return packed


def compile_start(plan: Plan, mesh: Mesh) -> Callable[[Slots, Any], Slots]:
    """`start(slots, packed) → slots`: one slot made anew from a `pack_start`ed vector; donates the slots."""
    slots, axes, sizes = abstract_slots(plan, mesh), plan.layout.weight_axes, plan.axis_sizes
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, slots)

    def local_start(slots: Slots, packed: jax.Array) -> Slots:
        ids = take_split(jnp.arange(plan.model.padded_vocab_size), 0, axes, axes, sizes)
        slot, num_prompt = packed[0], packed[1]
        parts = (plan.max_len, plan.max_len + MAX_ENDS, plan.max_len + MAX_ENDS + MAX_BIASES)
        tokens, ends, entries, values = jnp.split(packed[2:], parts)
        in_prompt = jnp.arange(plan.max_len) < num_prompt
        empty = Slots(*(jnp.zeros(ids.shape, leaf.dtype) for leaf in jax.tree.leaves(slots)))
        prompted = empty.marks.at[_places(jnp.where(in_prompt, tokens, -1), ids)].set(PROMPTED, mode="drop")
        new = Slots(
            empty.generated.at[_places(jnp.where(in_prompt, -1, tokens), ids)].add(1, mode="drop"),
            prompted | empty.marks.at[_places(ends, ids)].set(ENDS, mode="drop"),
            empty.bias.at[_places(entries, ids)].set(lax.bitcast_convert_type(values, jnp.float32), mode="drop"),
        )
        return jax.tree.map(lambda all_slots, one: all_slots.at[slot].set(one), slots, new)

    mapped = jax.shard_map(local_start, mesh=mesh, in_specs=(specs, WHOLE), out_specs=specs, check_vma=False)
    packed = jax.ShapeDtypeStruct((_start_size(plan.max_len),), jnp.int32, sharding=whole(mesh))
    return jax.jit(mapped, donate_argnums=0).lower(slots, packed).compile()


def _start_size(max_len: int) -> int:
    return 2 + max_len + MAX_ENDS + 2 * MAX_BIASES


def _places(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """Where tokens stand among the consecutive entries `ids`; out of range, and so dropped, for those that are not there."""
    places = tokens - ids[0]
    return jnp.where((tokens >= 0) & (places >= 0) & (places < ids.shape[0]), places, ids.shape[0])
