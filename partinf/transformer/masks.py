"""Which tokens a row may choose: one bit per entry of the vocabulary, split over the devices as the logits are, so nothing is exchanged.

The host knows a row's mask once it has seen the row's last token. It lays the masks of a step out by slot (`laid_out`), each device's
part in whole words of its own, because parts of the vocabulary need not end at a word's end, and they take the place of those of the step
before. Only rows that the batch calls constrained read them.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from partinf.foundation.rounding import ceil_div
from partinf.partition.sharding import sharding
from partinf.plans import Plan

_WORD = 32


def abstract_masks(plan: Plan, mesh: Mesh | AbstractMesh) -> jax.ShapeDtypeStruct:
    """uint32 [slots, words.ef]: the masks of all slots."""
    return jax.ShapeDtypeStruct(_shape(plan), jnp.uint32, sharding=sharding(plan, mesh, ".W"))


def laid_out(masks: Mapping[int, bytes], plan: Plan) -> np.ndarray:
    """The masks of some slots as `abstract_masks` describes them; 0 elsewhere.

    Args:
        masks: by slot, as `partinf.engine.step.DecodeRow.mask` has them: bit i modulo 8 of byte i // 8 is entry i of the vocabulary.
    """
    words = np.zeros(_shape(plan), np.uint32)
    parts, size = plan.ways(plan.layout.weight_axes), plan.model.padded_vocab_size // plan.ways(plan.layout.weight_axes)
    for slot, mask in masks.items():
        words[slot] = (_parts_of_bytes if size % 8 == 0 else _parts_of_bits)(mask, plan.model.vocab_size, parts, size)
    return words


def _parts_of_bytes(mask: bytes, vocab: int, parts: int, size: int) -> np.ndarray:
    """The words of one mask whose parts of so many entries are whole bytes."""
    held, rest = divmod(vocab, 8)
    given = bytearray(mask[: held + (rest > 0)])
    if rest and len(given) > held:
        given[held] &= (1 << rest) - 1
    given.extend(bytes(parts * size // 8 - len(given)))
    words = np.zeros((parts, ceil_div(size, _WORD) * 4), np.uint8)
    words[:, : size // 8] = np.frombuffer(given, np.uint8).reshape(parts, -1)
    return words.reshape(-1).view("<u4")


def _parts_of_bits(mask: bytes, vocab: int, parts: int, size: int) -> np.ndarray:
    """The same of any size, bit by bit."""
    bits = np.zeros(parts * size, np.uint8)
    given = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:vocab]
    bits[: len(given)] = given
    words = np.zeros((parts, ceil_div(size, _WORD) * _WORD), np.uint8)
    words[:, :size] = bits.reshape(parts, -1)
    return np.packbits(words, bitorder="little").view("<u4")


def restrict(logits: jax.Array, masks: jax.Array, slot: jax.Array, constrained: jax.Array) -> jax.Array:
    """Logits [R, V.ef], -inf where the mask of the row's slot has no bit, in the rows that are constrained.

    Args:
        masks: [slots, words.ef]. slot, constrained: [R].
    """
    rows = constrained == 1

    def changed(logits: jax.Array) -> jax.Array:
        words = masks.at[slot].get(mode="clip")  # [R, words.ef]
        bits = (words[:, :, None] >> jnp.arange(_WORD, dtype=jnp.uint32)[None, None, :]) & 1
        allowed = bits.reshape(words.shape[0], -1)[:, : logits.shape[1]] == 1
        return jnp.where(allowed | ~rows[:, None], logits, -jnp.inf)

    return lax.cond(jnp.any(rows), changed, lambda x: x, logits)


def restrict_plain(logits: np.ndarray, mask: bytes) -> np.ndarray:
    """The twin of `restrict` for one row of whole logits [V]."""
    allowed = [bool(mask[entry // 8] >> entry % 8 & 1) if entry // 8 < len(mask) else False for entry in range(len(logits))]
    return np.where(allowed, logits, -np.inf)


def _shape(plan: Plan) -> tuple[int, int]:
    parts = plan.ways(plan.layout.weight_axes)
    return plan.cache.num_slots, parts * ceil_div(plan.model.padded_vocab_size // parts, _WORD)
