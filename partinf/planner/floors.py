"""What a step takes at least over some roles, in some microseconds and before anything of it is priced: what orders a search, and ends it.

    products    FLOPs spread over all devices; the weights read once, of experts those that are hit
    gathers     the weights of all layers over the gathered axes
    E           for every sublayer an all-reduce of its outputs over F's axes; a reduce-scatter and an all-gather move as much
    F, heads    between the two products of a sublayer a reduce-scatter and an all-gather over E's axes

    core        attention spread as evenly as roles allow it; and the small operations of all layers, whatever the roles

Collectives wait for products. Where layers are compiled one by one they do not wait for weights to be read: such a step takes at least the
longer of what its products and collectives take together, and of what reading takes. Norms and the ends of the model are left out. Rates
that were measured by types and shapes say nothing of products and collectives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from partinf.cost.items import SMALL
from partinf.cost.ledger import Op, Part
from partinf.cost.routing import routed
from partinf.foundation.rounding import ceil_div
from partinf.layout import ExpertRole, Role
from partinf.model.weights import multiplied_params
from partinf.planner.candidates import AxisTable, ExpertRoles, Gather, HeadSplits, PhaseOption, Storage, Stored, gathers
from partinf.planner.evaluate import Evaluator

Dense = tuple[bool, ...]  # of all axes, whether dense weights are gathered over them


class _Products(NamedTuple):
    """Seconds of products alone, and together with reading their weights."""

    core: float
    read: float


class Floors:
    """Floors for the roles of one mesh."""

    def __init__(self, table: AxisTable, heads: HeadSplits, evaluator: Evaluator) -> None:
        self._table, self._heads, self._evaluator = table, heads, evaluator
        self._network = evaluator.pricing.network
        model, program = evaluator.model, evaluator.pricing.program
        of = model.experts
        self._experts = 0 if of is None else model.expert_layers * model.embed_dim * of.each.width * (3 if of.each.gated else 2)
        self._dense = multiplied_params(model) - self._experts * (0 if of is None else of.per_token)
        keys = 2 * model.num_layers * model.embed_dim * model.num_kv_heads * model.head_dim  # may be copied where others are split
        self._gathers = self._dense - keys
        alone = 0 if model.block.parallel or (of is not None and of.shared) else model.expert_layers  # experts and nothing else
        self._sublayers = model.num_layers * (1 if model.block.parallel else 2) - alone
        self._inner = [(size, count) for of, count in model.feed_forwards for size in ((2 if of.gated else 1) * of.width, of.width)]
        self._inner += [(model.num_heads * model.head_dim, 2 * model.num_layers)]
        self._moves = not program.looped and evaluator.pricing.calibration.rates is None  # loops hide what is moved
        self._small = sum(entry.seconds * entry.count for entry in evaluator.pricing.small(SMALL, Part.ATTENTION, model.num_layers))
        self._known: dict[object, float] = {}  # by what it is: roles of both kinds are equal words

    def soonest(self, storage: Storage, label: str) -> float:
        """A phase's step without its attention core, with experts split as is best for it, whatever is gathered."""
        key = ("soonest", label, storage)
        if key not in self._known:
            products = self._products(storage, label, self._hit(label))
            every = gathers(self._table, Stored(storage))
            self._known[key] = min(self._floor(storage, one.dense, label, products, self._small) for one in every)
        return self._known[key]

    def estimate(self, storage: Storage, label: str) -> float:
        """A quick estimate of the same, as if nothing overlapped but gathers with products. It tells roles apart whose floors
        are level because weights are read meanwhile; no answer depends on it but through a budget."""
        products, every = self._products(storage, label, self._hit(label)), gathers(self._table, Stored(storage))
        return min(sum(self._parts(storage, one.dense, label, products.read)) for one in every)

    def step(self, storage: Storage, dense: Dense, label: str) -> float:
        """A step of a model without experts when weights are gathered over these axes."""
        attending = self._small + self.attending(storage, label)
        return self._floor(storage, dense, label, self._products(storage, label, None), attending)

    def attending(self, storage: Storage, label: str) -> float:
        """The attention core of a step, under the roles that are best for it."""
        table = self._table
        key = ("attending", label, *((role is Role.STAGE) - (role is Role.FFN) for role in storage))  # what it depends on
        if key not in self._known:
            *_, alone = table.attentions
            option = PhaseOption(Gather((False,) * len(storage)), alone)
            split = self._evaluator.split(table.layout(Stored(storage), option, option), label, 0)
            every = ((one, self._heads.of(storage, one.heads)[1]) for one in table.attentions_of(storage))
            self._known[key] = min(self._evaluator.least_core(split, label, *one) for one in every)
        return self._known[key]

    def experts(self, roles: ExpertRoles, label: str) -> float:
        """The products of experts under these roles for them, in a phase's step."""
        key = ("experts", label, roles)
        if key not in self._known:
            evaluator, of = self._evaluator, self._evaluator.model.experts
            assert of is not None
            flops = 2.0 * evaluator.tokens(label) * self._experts * of.per_token / evaluator.pricing.slice.num_devices
            num_bytes = self._experts * self._hit(label, roles) * evaluator.workload.weights.num_bytes
            self._known[key] = evaluator.least_seconds(flops, num_bytes)
        return self._known[key]

    def without_experts(self, storage: Storage, dense: Dense, label: str) -> float:
        """Everything that is added to the time of the experts. Where layers are compiled one by one, products count with what they
        compute alone, since their weights may be read meanwhile."""
        key = ("without experts", label, storage, dense)
        if key not in self._known:
            products = self._products(storage, label, None)
            if self._unrolled(storage):
                products = products._replace(read=0.0)
            self._known[key] = self._floor(storage, dense, label, products, self._small + self.attending(storage, label))
        return self._known[key]

    def _floor(self, storage: Storage, dense: Dense, label: str, products: _Products, others: float) -> float:
        """With what is gathered and moved, and with others that wait for all of it."""
        if self._unrolled(storage):
            return max(sum(self._parts(storage, dense, label, products.core + others)), products.read)
        return sum(self._parts(storage, dense, label, products.read + others))

    def _parts(self, storage: Storage, dense: Dense, label: str, work: float) -> tuple[float, float]:
        """Work together with the gathers, and what is moved."""
        left = tuple(Role.REPLICA if used else role for role, used in zip(storage, dense, strict=True))
        moved = self._moved(left, label) if self._moves else 0.0
        gathered = self._gathered(storage, dense)
        return max(work, gathered) if self._evaluator.gathers_hide else work + gathered, moved

    def _products(self, storage: Storage, label: str, hit: float | None) -> _Products:
        """Of all layers.

        Args:
            hit: of each layer's experts, how many a device reads at least; None for a step without experts.
        """
        evaluator = self._evaluator
        with_experts = self._experts and hit is not None
        of = evaluator.model.experts
        entries = self._dense + (self._experts * of.per_token if with_experts and of is not None else 0)
        flops = 2.0 * evaluator.tokens(label) * entries / evaluator.pricing.slice.num_devices
        read = self._dense / self._ways(storage, Role.EMBED, Role.FFN) + (self._experts * hit if with_experts and hit is not None else 0.0)
        seconds = evaluator.least_seconds
        return _Products(seconds(flops, 0.0), seconds(flops, read * evaluator.workload.weights.num_bytes))

    def _hit(self, label: str, roles: ExpertRoles | None = None) -> float:
        """Of one layer's experts that some token of a step hits, how many a device reads at least; under the best roles unless given."""
        evaluator = self._evaluator
        of, tokens, skew = evaluator.model.experts, evaluator.tokens(label), evaluator.pricing.skew
        if of is None:
            return 0.0
        if roles is None:
            return routed(of.count, of.per_token, tokens, 1, 1, skew).hit / evaluator.pricing.slice.num_devices
        ways = {role: math.prod(size for size, has in zip(self._table.sizes, roles, strict=True) if has is role) for role in ExpertRole}
        rows = ceil_div(tokens, ways[ExpertRole.REPLICA] * ways[ExpertRole.STAGE])
        hit = routed(of.count, of.per_token, rows, ways[ExpertRole.EXPERT], 1, skew).hit
        return hit / (ways[ExpertRole.FFN] * ways[ExpertRole.EMBED])

    def _gathered(self, storage: Storage, dense: Dense) -> float:
        """Seconds that all layers' weights but those of keys and values take over the gathered axes, one stage after another."""
        if not any(dense):
            return 0.0
        axes = self._table.named(dense)
        wider = math.prod(size for size, used in zip(self._table.sizes, dense, strict=True) if used)
        size = self._gathers / self._ways(storage, Role.EMBED, Role.FFN) * wider * self._evaluator.workload.weights.num_bytes
        return self._network.seconds(Op.ALL_GATHER, axes, size)

    def _moved(self, left: Storage, label: str) -> float:
        """Seconds that activations take.

        Args:
            left: the roles, with gathered axes as copies.
        """
        key = ("moved", label, left)
        if key in self._known:
            return self._known[key]
        embed, ffn = self._axes(left, Role.EMBED), self._axes(left, Role.FFN)
        rows = self._evaluator.tokens(label) / self._ways(left, Role.STAGE, Role.REPLICA)
        passed, moved = rows * self._evaluator.workload.weights.activations.num_bytes, 0.0
        if ffn:
            outputs = passed * self._evaluator.model.embed_dim / self._ways(left, Role.EMBED)
            moved += self._sublayers * self._network.seconds(Op.ALL_REDUCE, ffn, outputs)
        if embed:
            each = passed / self._ways(left, Role.FFN)
            moved += sum(count * self._network.seconds(Op.ALL_GATHER, embed, each * size) for size, count in self._inner)
        self._known[key] = moved
        return moved

    def _unrolled(self, storage: Storage) -> bool:
        """Whether layers are compiled one by one."""
        return self._evaluator.one_by_one(self._ways(storage, Role.STAGE))

    def _axes(self, storage: Storage, role: Role) -> tuple[str, ...]:
        table = self._table
        return tuple(name for name, size, one in zip(table.names, table.sizes, storage, strict=True) if one is role and size > 1)

    def _ways(self, storage: Storage, *roles: Role) -> int:
        total = 1
        for role, size in zip(storage, self._table.sizes, strict=True):
            if role in roles:
                total *= size
        return total
