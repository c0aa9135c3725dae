"""A quick estimate of what a step takes over a storage: it says what to look at first, and no answer depends on it but through a budget.

    products    FLOPs spread over all devices, or the weights read once, whichever takes longer
    gathers     the weights of all layers over the gathered axes
    E           an all-gather and a reduce-scatter of activations over F's axes for every sublayer
    F, heads    a reduce-scatter and an all-gather over E's axes between the two products of a sublayer

in some microseconds; attention cores, norms and the ends of the model are left out.
"""

from __future__ import annotations

import math

from partinf.cost.ledger import Op
from partinf.layout import Role
from partinf.planner.candidates import AxisTable, Gather, Storage, Stored, gathers
from partinf.planner.evaluate import Evaluator


class Estimate:
    """Estimates for the storages of one mesh."""

    def __init__(self, table: AxisTable, evaluator: Evaluator) -> None:
        self._table, self._evaluator = table, evaluator
        self._network = evaluator.pricing.network
        model, size = evaluator.model, evaluator.workload.weights.activations.num_bytes
        self._sublayers = 1 if model.block.parallel else 2
        self._layers, self._embed = model.num_layers, model.embed_dim * size
        widths = sum((3 if of.gated else 2) * of.width * count for of, count in model.feed_forwards) // model.num_layers
        inner = widths + 2 * model.num_heads * model.head_dim
        self._inner = inner * size // 2  # half of it for a reduce-scatter and an all-gather each

    def step(self, storage: Storage, label: str) -> float:
        """Seconds of a phase's step, whatever is best to gather."""
        stored, evaluator = self._ways(storage, (Role.EMBED, Role.FFN)), self._evaluator
        products = evaluator.floor(label, stored)
        tokens = evaluator.tokens(label) / self._ways(storage, (Role.STAGE,))
        return min(self._with(storage, gather, products, tokens, stored) for gather in gathers(self._table, Stored(storage)))

    def _with(self, storage: Storage, gather: Gather, products: float, tokens: float, stored: int) -> float:
        left = tuple(Role.REPLICA if used else role for role, used in zip(storage, gather.dense, strict=True))
        rows = tokens / self._ways(left, (Role.REPLICA,))
        e_axes, f_axes = (self._axes(left, role) for role in (Role.EMBED, Role.FFN))
        moved = self._sublayers * self._seconds(f_axes, rows * self._embed / self._ways(left, (Role.EMBED,)))
        moved += self._seconds(e_axes, rows * self._inner / self._ways(left, (Role.FFN,)))
        axes = self._table.named(gather.dense)
        moving = self._evaluator.gather_floor(stored, axes)
        work = max(products, moving) if self._evaluator.gathers_hide else products + moving
        return work + 2 * self._layers * moved

    def _seconds(self, axes: tuple[str, ...], num_bytes: float) -> float:
        return self._network.seconds(Op.ALL_GATHER, axes, num_bytes) if axes else 0.0

    def _axes(self, storage: Storage, role: Role) -> tuple[str, ...]:
        return tuple(
            name for name, size, one in zip(self._table.names, self._table.sizes, storage, strict=True) if one is role and size > 1
        )

    def _ways(self, storage: Storage, roles: tuple[Role, ...]) -> int:
        return math.prod(size for size, one in zip(self._table.sizes, storage, strict=True) if one in roles)
