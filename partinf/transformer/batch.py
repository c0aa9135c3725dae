"""What the host sends with every step: small integer arrays, equal on all devices, in the padded shapes of a bucket.

A step takes as many batches as its plan has pipeline stages, one for each, in arrays with a leading stage dimension (`stacked`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import numpy as np
from jax import lax

from partinf.plans import Bucket, CacheGroup, Plan

Array: TypeAlias = jax.Array | np.ndarray

ADJUSTED, ENDS_LATER = 1, 2  # values of `ExtendedBatch.adjusted`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tables:
    """Page tables of lanes or slots in one group of the cache.

    Attributes:
        pages: [rows, pages] global page ids in the order of positions, -1 for none.
        begin: [rows] the position with which the first of them begins; None for 0, where the group keeps all positions.
    """

    pages: Array
    begin: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeBatch:
    """One row per decode lane, lanes in equal blocks per shard of decode's batch axes. Empty lanes have position -1.

    Attributes:
        token: [D] token to feed; -1 takes the last one sampled for the slot. slot: [D] place of that last token, -1 for none.
        position: [D] index of that token in its sequence.
        tables: of every group of the cache.
    """

    token: Array
    slot: Array
    position: Array
    tables: tuple[Tables, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillBatch:
    """Flat prompt tokens, and the slots (prompts or chunks) that they belong to; both in equal blocks per shard of prefill's batch axes.

    Attributes:
        token: [T] tokens. owner: [T] index of the token's prefill slot, -1 for padding. position: [T] index in its sequence.
        page: of every group, [T] global id of the page that receives the token's keys and values, -1 for padding.
        start: [S] positions of the slot's sequence that are already in the cache. tables: of every group, their pages.
        last: [S] flat index of the token from which the slot samples, -1 if it does not. slot: [S] place of the sampled token, or -1.
    """

    token: Array
    owner: Array
    position: Array
    page: tuple[Array, ...]
    start: Array
    tables: tuple[Tables, ...]
    last: Array
    slot: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingBatch:
    """How each sampled row chooses its token: [D + S], decode lanes first.

    Attributes:
        temperature: 0 is greedy. top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
        seed, sample, position: the key of the row's random bits; position is that of the token to be chosen.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    seed: Array
    sample: Array
    position: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExtendedBatch:
    """Extended sampling: only in the batches of extended buckets.

    Attributes:
        adjusted: [D + S] ADJUSTED where penalties and biases of the row's slot apply, ENDS_LATER where also the tokens that end its text
            must not be chosen yet. presence, frequency, repetition: [D + S] its penalties.
        alternatives: [D + S] how many of the most likely tokens are wanted.
        counted: [D] 1 where the token that is fed was sampled, and is not in its slot's counts yet.
        target: [T] the token whose log-probability after this prompt token is wanted, -1 for none.
    """

    adjusted: Array
    presence: Array
    frequency: Array
    repetition: Array
    alternatives: Array
    counted: Array
    target: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """All of it.

    Attributes:
        constrained: [D + S] 1 where the mask of the row's slot applies; in the batches of constrained buckets alone.
    """

    decode: DecodeBatch
    prefill: PrefillBatch
    sampling: SamplingBatch
    extended: ExtendedBatch | None = None
    constrained: Array | None = None


def empty_batch(bucket: Bucket, plan: Plan) -> Batch:
    """A batch of the bucket's shapes in which every lane, token and slot is padding (numpy, to be filled in)."""
    lanes, tokens, slots = bucket.decode_rows, bucket.prefill_tokens, bucket.prefill_slots
    rows, groups = lanes + slots, plan.cache_groups

    def fill(value: int, *shape: int) -> np.ndarray:
        return np.full(shape, value, np.int32)

    def floats(value: float) -> np.ndarray:
        return np.full(rows, value, np.float32)

    def tables(group: CacheGroup, rows: int, pages: int) -> Tables:
        return Tables(fill(-1, rows, pages), fill(0, rows) if group.window else None)

    read = tuple(tables(group, lanes, group.columns(bucket.decode_pages, plan)) for group in groups)
    earlier = tuple(tables(group, slots, group.earlier_columns(bucket.prefill_pages, plan)) for group in groups)
    extended = ExtendedBatch(fill(0, rows), floats(0), floats(0), floats(1), fill(0, rows), fill(0, lanes), fill(-1, tokens))
    return Batch(
        DecodeBatch(fill(0, lanes), fill(-1, lanes), fill(-1, lanes), read),
        PrefillBatch(
            fill(0, tokens), fill(-1, tokens), fill(-1, tokens), tuple(fill(-1, tokens) for _ in groups),
            fill(0, slots), earlier, fill(-1, slots), fill(-1, slots),
        ),
        SamplingBatch(floats(0), fill(0, rows), floats(1), floats(0), np.zeros(rows, np.uint32), fill(0, rows), fill(0, rows)),
        extended if bucket.extended else None,
        fill(0, rows) if bucket.constrained else None,
    )  # fmt: skip


def stacked(bucket: Bucket, plan: Plan) -> Batch:
    """Empty batches for all stages: every array with a leading stage dimension."""
    return jax.tree.map(lambda leaf: np.stack([leaf] * plan.num_stages), empty_batch(bucket, plan))


def at_stage(batches: Batch, stage: jax.Array | int) -> Batch:
    """The batch of one stage."""
    return jax.tree.map(lambda leaf: leaf[stage], batches)


def pack(batches: Sequence[Batch]) -> np.ndarray:
    """All arrays of the stages' batches as int32 vectors [stages, ..]: one transfer per step instead of one per array and device."""
    flat = [[np.ascontiguousarray(leaf).view(np.int32).reshape(-1) for leaf in jax.tree.leaves(batch)] for batch in batches]
    return np.stack([np.concatenate(leaves) for leaves in flat])


class Blank:
    """Makes empty batches of one bucket whose arrays are all parts of one vector, the one of `pack`, so that there is nothing to pack."""

    def __init__(self, bucket: Bucket, plan: Plan) -> None:
        leaves, self._tree = jax.tree.flatten(empty_batch(bucket, plan))
        ends = np.cumsum([leaf.nbytes for leaf in leaves]).tolist()
        self._parts = [(leaf.shape, leaf.dtype, end - leaf.nbytes) for end, leaf in zip(ends, leaves, strict=True)]
        self._vector = pack([jax.tree.unflatten(self._tree, leaves)])[0]

    def copy(self) -> tuple[np.ndarray, Batch]:
        """A vector, and the batch that it holds."""
        vector = self._vector.copy()
        leaves = [np.ndarray(shape, dtype, vector, offset) for shape, dtype, offset in self._parts]
        return vector, jax.tree.unflatten(self._tree, leaves)


def unpack(packed: jax.Array, bucket: Bucket, plan: Plan) -> Batch:
    """The inverse of `pack`, inside the program: arrays with a leading stage dimension."""
    leaves, tree = jax.tree.flatten(empty_batch(bucket, plan))
    ends = np.cumsum([leaf.size for leaf in leaves]).tolist()
    parts = [packed[:, end - leaf.size : end].reshape(packed.shape[0], *leaf.shape) for end, leaf in zip(ends, leaves, strict=True)]
    return jax.tree.unflatten(tree, [lax.bitcast_convert_type(part, leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)])
