"""Prefill and decode over one storage, as each is priced together with the other.

The two share the axes that split heads, so that one may have to be priced anew because of the other, and prefill pays for the layout of
decode's cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from partinf.cost.ledger import Ledger
from partinf.cost.memory import MemoryBudget
from partinf.cost.split import StepShape
from partinf.layout import Role
from partinf.planner.candidates import Stored
from partinf.planner.evaluate import Priced
from partinf.planner.options import Choice, Space


class Pair(NamedTuple):
    """Prefill and decode over one storage, as priced together; `coupling` is what prefill pays for decode's cache."""

    prefill: Choice
    decode: Choice
    prefill_priced: Priced
    decode_priced: Priced
    coupling: Ledger
    padded_heads: int
    memory: MemoryBudget
    fits: bool
    seconds: float


class Pairing:
    """Finds the prefill option that is best with a decode option."""

    def __init__(self, space: Space) -> None:
        self._table, self._heads, self._evaluator = space.table, space.heads, space.evaluator
        self._prefills, self._decodes = space.evaluator.workload.counted_prefills, space.evaluator.workload.output_len
        self._repriced: dict[object, Priced] = {}
        self._couplings: dict[object, Ledger] = {}
        self._helds: dict[object, MemoryBudget] = {}

    def best_with(self, storage: Stored, decode: Choice, prefills: Iterable[Choice]) -> Pair | None:
        """The prefill option that is best with a decode option; None when none goes with it.

        Args:
            prefills: in order of their own time, which is a bound from below for the pair, as decode's own memory is for the pair's.
        """
        held = self._held(storage, decode, decode, decode.padded_heads, decode.kv)
        room = held.usable - held.total
        best = None if decode.priced.activations > room else self._first(storage, decode, prefills, room)
        return best or self._first(storage, decode, prefills, None)

    def _first(self, storage: Stored, decode: Choice, prefills: Iterable[Choice], room: int | None) -> Pair | None:
        """The first prefill option that no later one can beat: among those that fit, or without `room` among all."""
        decodes = self._decodes * decode.priced.seconds
        tried = set()  # of options that attend alike the first is the best: the pair's heads and coupling are the same
        best: Pair | None = None
        for prefill in prefills:
            if best is not None and self._prefills * prefill.priced.seconds + decodes >= best.seconds:
                break
            kind = prefill.option.attention.number, prefill.priced.shape.prefill_tokens
            if kind in tried or (room is not None and prefill.priced.activations > room):
                continue
            pair = self._pair(storage, prefill, decode)
            if pair is None or not (pair.fits or room is None):
                continue
            if pair.prefill_priced is prefill.priced:
                tried.add(kind)
            if best is None or pair.seconds < best.seconds:
                best = pair
        return best

    def _pair(self, storage: Stored, prefill: Choice, decode: Choice) -> Pair | None:
        """Prefill and decode side by side; None when their heads do not split together."""
        parts, kv = self._heads.of(storage.roles, prefill.option.attention.heads | decode.option.attention.heads)
        padded = self._evaluator.padded_heads(parts)
        if padded is None:
            return None
        first, then = prefill.priced, decode.priced
        if padded != prefill.padded_heads or kv != prefill.kv:  # its heads are split otherwise because of the other phase
            first = self._priced_anew(storage, "prefill", prefill, decode, padded, kv)
        if padded != decode.padded_heads or kv != decode.kv:
            then = self._priced_anew(storage, "decode", prefill, decode, padded, kv)
        held = self._held(storage, prefill, decode, padded, kv)
        memory = held._replace(activations=max(first.activations, then.activations))
        coupling = self._coupling(storage, prefill, decode, first.shape, padded, kv)
        seconds = self._prefills * (first.seconds + coupling.seconds) + self._decodes * then.seconds
        return Pair(prefill, decode, first, then, coupling, padded, memory, memory.fits, seconds)

    def _coupling(self, storage: Stored, prefill: Choice, decode: Choice, shape: StepShape, padded: int, kv: tuple[bool, ...]) -> Ledger:
        stages = tuple(role is Role.STAGE for role in storage.roles) if Role.STAGE in storage.roles else ()
        numbers = prefill.option.attention.number, decode.option.attention.number
        key = (numbers, kv, shape.prefill_tokens, shape.prefill_slots, stages, padded)
        found = self._couplings.get(key)
        if found is None:
            layout = self._table.layout(storage, prefill.option, decode.option)
            found = self._couplings[key] = self._evaluator.coupling(layout, padded)
        return found

    def _held(self, storage: Stored, prefill: Choice, decode: Choice, padded: int, kv: tuple[bool, ...]) -> MemoryBudget:
        """Weights and cache alone; both are the same for all prefill options that leave the heads split alike."""
        key = (storage, decode.option.attention.number, kv, padded)
        found = self._helds.get(key)
        if found is None:
            layout = self._table.layout(storage, prefill.option, decode.option)
            found = self._helds[key] = self._evaluator.memory(layout, [], padded)
        return found

    def _priced_anew(self, storage: Stored, label: str, prefill: Choice, decode: Choice, padded: int, kv: tuple[bool, ...]) -> Priced:
        option = (prefill if label == "prefill" else decode).option
        key = (storage, option.gather, option.attention.number, label, padded, kv)
        found = self._repriced.get(key)
        if found is None:
            layout = self._table.layout(storage, prefill.option, decode.option)
            found = self._repriced[key] = self._evaluator.cheapest(layout, label, padded)
        return found
