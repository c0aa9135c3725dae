"""The ledger: every piece of work of one step as an entry of its own, with useful work and padding apart.

Figures of an entry are per device and for one occurrence; `count` says how often it occurs in the step (mostly once per layer). Sums
over a ledger are per device and step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from partinf.cost.items import Item
from partinf.cost.routing import Routed


class EntryKind(StrEnum):
    """MATMUL: products with weights. ATTENTION: the core, products with keys and values. MEMORY: traffic without a product.
    COLLECTIVE: between devices."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    MEMORY = "memory"
    COLLECTIVE = "collective"


class Part(StrEnum):
    """The part of a step that an entry belongs to."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    FFN = "ffn"
    LOGITS = "logits"
    SAMPLING = "sampling"
    STAGES = "stages"


class Op(StrEnum):
    """The collectives of a step."""

    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_REDUCE = "all-reduce"
    ALL_TO_ALL = "all-to-all"
    PERMUTE = "collective-permute"


class Entry(NamedTuple):
    """One piece of work (a named tuple, because a search makes some hundred thousand of them).

    Attributes:
        item: what it is.
        count: how often it occurs in the step.
        flops, padding_flops: of dot products; useful ones, and those spent on padded rows, heads, or keys that are masked.
        weight_bytes, kv_bytes, activation_bytes: HBM traffic.
        op, axes, bytes, dtype: of a collective: what, over which mesh axes, and the bytes of the output of an all-gather or of the
            input of the others.
        padding_bytes: the part of `bytes` that carries padding.
        seconds: time of one occurrence. overlapped: the part of it that is hidden behind other entries.
        ahead: the part that may run behind whatever the layer before computes; `partinf.cost.overlap` works out how much does.
        early: the part that waits for HBM alone, and may pass while others leave HBM alone. free: the part that leaves HBM alone. Both are
            0 in a program whose layers are not compiled one by one.
        shape: on one device, so that it can be timed alone: of a product with weights rows, inputs and outputs; of a core sequences, their
            tokens, query heads, key-value heads, and positions of each sequence in the cache; else empty.
        routed: of what experts do, what their devices are expected to get. FLOPs and bytes are those of the padded shapes all the same, and
            all weights of a device; `seconds` are of what is expected where there is most of it.
    """

    item: Item
    part: Part
    kind: EntryKind
    count: int = 1  # type: ignore[assignment]  # tuple.count is not used
    flops: float = 0.0
    padding_flops: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    activation_bytes: float = 0.0
    op: Op | None = None
    axes: tuple[str, ...] = ()
    bytes: int = 0
    dtype: str = ""
    padding_bytes: float = 0.0
    seconds: float = 0.0
    overlapped: float = 0.0
    ahead: float = 0.0
    early: float = 0.0
    free: float = 0.0
    shape: tuple[int, ...] = ()
    routed: Routed | None = None

    @property
    def name(self) -> str:
        """What it is, for the reader."""
        return self.item.name

    @property
    def exposed_seconds(self) -> float:
        """Time that all occurrences add to the step."""
        return (self.seconds - self.overlapped) * self.count


class Collective(NamedTuple):
    """One line of a ledger's collectives: equal kind, axes and dtype summed over the step.

    Attributes:
        bytes: per device and step. count: ops per step. seconds: exposed time per step.
    """

    op: Op
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    count: int  # type: ignore[assignment]  # tuple.count is not used
    seconds: float


@dataclass(frozen=True)
class Ledger:
    """The entries of one step on one device."""

    entries: tuple[Entry, ...]

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(self.entries + other.entries)

    def times(self, count: int) -> Ledger:
        """The ledger of `count` such steps."""
        if count == 1:
            return self
        return replace(self, entries=tuple(entry._replace(count=entry.count * count) for entry in self.entries))

    def of(self, *, part: Part | None = None, kind: EntryKind | None = None) -> Ledger:
        """The entries of one part, of one kind, or both."""
        chosen = (e for e in self.entries if (part is None or e.part is part) and (kind is None or e.kind is kind))
        return Ledger(tuple(chosen))

    @cached_property
    def seconds(self) -> float:
        """Time of the step: all that is not hidden."""
        return sum(entry.exposed_seconds for entry in self.entries)

    @property
    def flops(self) -> float:
        """Useful FLOPs of dot products."""
        return sum(entry.flops * entry.count for entry in self.entries)

    @property
    def padding_flops(self) -> float:
        return sum(entry.padding_flops * entry.count for entry in self.entries)

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights read from HBM."""
        return sum(entry.weight_bytes * entry.count for entry in self.entries)

    @property
    def kv_bytes(self) -> float:
        return sum(entry.kv_bytes * entry.count for entry in self.entries)

    @property
    def activation_bytes(self) -> float:
        return sum(entry.activation_bytes * entry.count for entry in self.entries)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives by op, axes and dtype, the dearest first."""
        found: dict[tuple[Op, tuple[str, ...], str], tuple[int, int, float]] = {}
        for entry in self.entries:
            if entry.op is not None:
                key, count = (entry.op, entry.axes, entry.dtype), entry.count
                num_bytes, times, seconds = found.get(key, (0, 0, 0.0))
                found[key] = num_bytes + entry.bytes * count, times + count, seconds + (entry.seconds - entry.overlapped) * count
        return tuple(sorted((Collective(*key, *sums) for key, sums in found.items()), key=lambda line: -line.seconds))

    def dearest(self) -> tuple[Entry, ...]:
        """The entries by exposed time, largest first."""
        return tuple(sorted(self.entries, key=lambda entry: -entry.exposed_seconds))


def total_seconds(entries: Iterable[Entry]) -> float:
    """Exposed time of these entries."""
    return sum((entry.seconds - entry.overlapped) * entry.count for entry in entries)
