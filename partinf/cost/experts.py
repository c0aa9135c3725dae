"""Entries of a mixture of experts, written once for every role assignment.

With t the axes that split tokens in the dense layers, X, f and e those that still split the experts, F and E of their matrices after
gathering, and τ all that split none of these (nor layers):

    [T.t, E.between] → [T.τ, E]; · router in float32, the same along X, f and e
    rows by expert, T.τ · min(per token, X.X) places [R, E.e]; · W_in → [R, F.f] {e unreduced}; reduce-scatter over e; activation;
    all-gather over e; · W_out, times the weights, added up by token → [T.τ, E.e] {Xf unreduced} → [T.t, E.between]

Rows may be exchanged instead along the axes of X that split tokens: these then split the rows that are routed too, all devices along them
learn of all choices, and every row goes to the devices that hold one of its experts, and its outputs come back.

FLOPs and bytes are those of the padded shapes. Time is that of what is expected on the device with most of it (`partinf.cost.routing`): it
reads the experts that are hit and multiplies the rows that chose them, each expert's filled up to what passing its weights into the matrix
unit takes anyway.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from partinf.cost import items
from partinf.cost.items import Item, Matrix
from partinf.cost.ledger import Entry, Op, Part
from partinf.cost.linear import movement
from partinf.cost.movement import Axes, Split
from partinf.cost.program import PLAIN
from partinf.cost.routing import Routed, expected_sent, routed
from partinf.cost.split import StepSplit
from partinf.foundation.rounding import ceil_div
from partinf.layout import Dispatch, ExpertRole, Layout, Phase
from partinf.model.kinds import Block, Experts
from partinf.workload import DType

_PART = Part.FFN
_F32 = 4
# Dozens of small operations: scores, choice, weights, sorting, sizes of groups, activation, outputs by token.
_ROUTING = 1.0
_ROLES = (ExpertRole.EXPERT, ExpertRole.FFN, ExpertRole.EMBED)


class ExpertAxes(NamedTuple):
    """What splits the experts' matrices and the rows that they multiply, without axes of size 1.

    Attributes:
        rows: that split the rows which are routed. sent: of these, those along which rows are exchanged.
        experts, ffn, embed: X, f and e. stored: the same three in the stored matrices.
    """

    rows: Axes
    sent: Axes
    experts: Axes
    ffn: Axes
    embed: Axes
    stored: tuple[Axes, Axes, Axes]

    @property
    def used(self) -> tuple[Axes, Axes, Axes]:
        """The axes that split each of them in the products; `stored` are those that split the stored weights."""
        return self.experts, self.ffn, self.embed

    @property
    def reduced(self) -> Axes:
        """Over which outputs are still to be summed when they are back with their tokens."""
        return tuple(axis for axis in self.experts if axis not in self.sent) + self.ffn

    @property
    def tokens(self) -> Axes:
        """That split the rows which are multiplied."""
        return tuple(axis for axis in self.rows if axis not in self.sent)


def expert_axes(split: StepSplit) -> ExpertAxes:
    """The roles of the layout for experts in this step."""
    layout, phase, sizes = split.layout, split.phase, split.sizes
    known, key = split.pricing.known_roles, (layout.experts or layout.storage, phase.gather_experts, phase.dispatch, split.t)
    if key not in known:
        known[key] = _expert_axes(layout, phase, sizes, split.t)
    return known[key]


def _expert_axes(layout: Layout, phase: Phase, sizes: Mapping[str, int], tokens: Axes) -> ExpertAxes:
    def _nontrivial(axes: Axes) -> Axes:
        return tuple(axis for axis in axes if sizes[axis] > 1)

    experts, ffn, embed = (_nontrivial(layout.expert_splits(phase, role)) for role in _ROLES)
    sent = tuple(axis for axis in experts if axis in tokens) if phase.dispatch is Dispatch.EXCHANGE else ()
    rows = _nontrivial(layout.expert_token_axes(phase)) + sent
    first, second, third = (_nontrivial(layout.expert_axes(role)) for role in _ROLES)
    return ExpertAxes(rows, sent, experts, ffn, embed, (first, second, third))


def expert_entries(split: StepSplit) -> list[Entry]:
    """The experts of all layers that have such; none where the model has none."""
    return [entry for _, make in expert_pieces(split) for entry in make()]


def expert_pieces(split: StepSplit) -> list[tuple[object, Callable[[], list[Entry]]]]:
    """The entries in three pieces, each with all that it depends on besides model, slice and types: rows on their way to the experts, what
    experts do with them, and outputs on their way back. Of the roles that dense weights have only the ways know."""
    of = split.model.experts
    if of is None or not split.model.expert_layers:
        return []
    axes, shape, loop = expert_axes(split), split.shape, split.phase.loop

    @functools.cache
    def mixture() -> _Mixture:
        return _Mixture(split, of)

    dense = (split.t, split.between, split.e, split.f, split.num_stages, loop, shape)
    order = (axes.stored[2], split.w_stored) if axes.embed else ()
    return [
        (("to", axes.rows, dense), lambda: mixture().arriving()),
        (mixture_key(split), lambda: mixture().mixing()),
        (("from", axes.rows, axes.embed, axes.reduced, order, dense), lambda: mixture().leaving()),
    ]


def mixture_key(split: StepSplit) -> object:
    """All that what experts do with their rows depends on, besides model, slice and types; their working set too."""
    return expert_axes(split), split.shape, split.num_stages


def expert_bytes(split: StepSplit) -> int:
    """The largest working set of a layer's experts on one device: rows, sorted rows and what is between the products, receive buffers at
    their worst, and gathered matrices."""
    of = split.model.experts
    return 0 if of is None or not split.model.expert_layers else _Mixture(split, of).working_set()


class _Mixture:
    """The experts of one step.

    Attributes:
        count: of layers. tokens: rows of one device that are routed; places: of its rows sorted by expert.
        inner: input matrices stored together. embed, ffn: E and F of one device.
    """

    def __init__(self, split: StepSplit, of: Experts) -> None:
        self.split, self.of, self.axes = split, of, expert_axes(split)
        self.count, ways = split.model.expert_layers, split.ways
        self.held = of.count // ways(self.axes.experts)
        self.tokens = ceil_div(split.shape.num_tokens, ways(self.axes.rows))
        self.together = self.tokens * ways(self.axes.sent)  # rows of all devices along which rows are exchanged
        self.places = self.together * min(of.per_token, self.held)
        self.inner = 2 if of.each.gated else 1
        self.embed, self.ffn = split.model.embed_dim // ways(self.axes.embed), of.each.width // ways(self.axes.ffn)
        self.gathered = self.axes.used != self.axes.stored

    def arriving(self) -> list[Entry]:
        """Rows on their way to the experts."""
        split = self.split
        if self._shares_gather:
            return []
        elements, source = split.shape.num_tokens * split.model.embed_dim, Split(split.t, split.between)
        target, useful = Split(self.axes.rows), split.shape.useful
        return movement(split, _PART, items.ROWS_TO_EXPERTS, elements, source, target, useful, count=self.count)

    def mixing(self) -> list[Entry]:
        """What is the same whatever axes do to dense weights."""
        split, axes, count, load = self.split, self.axes, self.count, self.load
        entries = [*self._gathers(), self._router(), *split.pricing.small(items.ROUTING, _PART, count, _ROUTING)]
        if axes.sent:
            entries += self._exchange()
        entries.append(split.pricing.traffic(items.ROWS_SORTED, _PART, count, 2 * self.places * self.embed * split.act_bytes))
        entries.append(self._product(items.WX_IN, load, self.embed, self.inner * self.ffn))
        entries += self._between_products()
        entries.append(
            split.pricing.traffic(items.EXPERTS_ACTIVATED, _PART, count, (self.inner + 1) * self.places * self.ffn * split.act_bytes)
        )
        entries.append(self._product(items.WX_OUT, load, self.ffn, self.embed))
        added = self.together * (self.of.per_token + 1) * self.embed * split.act_bytes
        entries.append(split.pricing.traffic(items.OUTPUTS_ADDED, _PART, count, added))
        if axes.sent:
            entries.append(self._sent(items.OUTPUTS_SENT, self.together))
        return entries

    def leaving(self) -> list[Entry]:
        """Outputs on their way back to their tokens."""
        return self._reduced(self.split.shape.num_tokens * self.split.model.embed_dim) + self._shared_gate()

    @functools.cached_property
    def load(self) -> Routed:
        """What is expected on the devices; rows that are exchanged too."""
        split, of, axes = self.split, self.of, self.axes
        shards, groups = split.ways(axes.experts), split.ways(axes.tokens)
        found = routed(of.count, of.per_token, self.together, shards, groups, split.pricing.skew)
        return found._replace(sent=self.rows_sent) if axes.sent else found

    @property
    def rows_sent(self) -> float:
        """Rows that a device sends along the axes of an exchange, those that stay among them."""
        ways = self.split.ways(self.axes.sent)
        return ways * expected_sent(self.of.count, self.of.per_token, self.tokens, ways) if ways > 1 else 0.0

    def working_set(self) -> int:
        split, act = self.split, self.split.act_bytes
        rows, hidden = self.places * self.embed, self.places * self.ffn
        whole = self.tokens * split.model.embed_dim + (self.together * self.embed if self.axes.sent else 0)
        logits = self.tokens * self.of.count * _F32
        matrix_in, matrix_out = (self._bytes(self.axes.used, out) if self.gathered else 0 for out in (self.inner, 1))
        sorting = whole * act + max(logits, rows * act)
        first, second = rows + self.inner * hidden, hidden + rows
        return max(sorting, first * act + matrix_in, second * act + matrix_out, (rows + self.together * self.embed) * act)

    def _bytes(self, split_by: tuple[Axes, Axes, Axes], matrices: int) -> int:
        """Of the experts' matrices of one name that a device has when these axes split X, F and E."""
        of, ways = self.of, self.split.ways
        experts, ffn, embed = split_by
        each = of.each.width // ways(ffn) * (self.split.model.embed_dim // ways(embed))
        return of.count // ways(experts) * matrices * each * self.split.weight_bytes

    def _gathers(self) -> list[Entry]:
        """Experts' matrices brought together over the phase's axes, each dimension by itself: d_ff, d_model, experts; and what belongs to
        them: int8 scales, and biases."""
        if not self.gathered:
            return []
        of, embed = self.of, self.split.model.embed_dim
        width, act = of.each.width, self.split.act_dtype
        entries = []
        for matrix, bias, sizes, channels, bias_item in (
            (items.WX_IN, "w_in", (self.inner * width, embed), (self.inner * width, 0), items.BIASES_IN),
            (items.WX_OUT, "w_out", (width, embed), (0, embed), items.BIASES_OUT),
        ):
            entries += self._gather(matrix.weights, sizes, self.split.weight_dtype)
            if self.split.weight_dtype is DType.INT8:
                entries += self._gather(matrix.scales, channels, DType.F32)
            if bias in of.each.biases:
                entries += self._gather(bias_item, channels, act)
        return [entry._replace(ahead=entry.seconds) for entry in entries] if self.split.looped else entries

    def _gather(self, item: Item, sizes: tuple[int, int], dtype: DType) -> list[Entry]:
        """An array of every expert [X, F, E], of which F or E is missing where its size is 0."""
        (experts, ffn, embed), in_products = self.axes.stored, self.axes.used
        dims = (ffn if sizes[0] else (), embed if sizes[1] else (), experts)
        elements = self.of.count * math.prod(size for size in sizes if size) // self.split.ways(dims[0] + dims[1] + dims[2])
        entries = []
        for stored, used in zip(dims, (in_products[1], in_products[2], in_products[0]), strict=True):
            gone = tuple(axis for axis in stored if axis not in used)
            if gone:
                elements *= self.split.ways(gone)
                size = elements * dtype.num_bytes
                entries.append(self.split.pricing.collective(item, _PART, self.count, Op.ALL_GATHER, gone, size, dtype.value))
        return entries

    def _router(self) -> Entry:
        split, embed, of = self.split, self.split.model.embed_dim, self.of
        flops, weights = 2.0 * self.tokens * embed * of.count, of.count * embed * split.act_bytes
        passed, shape = self.tokens * (embed * split.act_bytes + of.count * _F32), (self.tokens, embed, of.count)
        useful = split.shape.useful * split.shares.embed
        return split.pricing.product(items.ROUTER, _PART, self.count, flops, useful, weights, activation_bytes=passed, shape=shape)

    def _exchange(self) -> list[Entry]:
        """The choices of all rows to all devices along which rows are exchanged, and the rows."""
        split, axes = self.split, self.axes.sent
        size = self.together * 2 * self.of.per_token * _F32  # experts, and the bits of weights next to them
        chosen = split.pricing.collective(items.CHOSEN_EXPERTS, _PART, self.count, Op.ALL_GATHER, axes, size, "int32", split.shape.useful)
        places = self.tokens * min(self.of.per_token, split.ways(axes)) if self._ragged else self.together
        entries = [chosen, self._sent(items.ROWS_SENT, places)]
        if self._ragged:  # rows and outputs are packed, each in whole tiles of its own, and unpacked
            packed = 2 * 2 * (places + self.together) * self.embed * split.act_bytes
            entries.append(split.pricing.traffic(items.ROWS_PACKED, _PART, self.count, packed))
        return entries

    @property
    def _ragged(self) -> bool:
        """Whether wanted rows travel alone; otherwise places for all do, as in the plain program."""
        pricing = self.split.pricing
        return pricing.program is not PLAIN and pricing.slice.chip.platform.ragged_exchange

    def _sent(self, item: Item, places: int) -> Entry:
        """An exchange of so many places, of which the wanted rows are filled, and take time where they travel alone."""
        pricing, size = self.split.pricing, places * self.embed * self.split.act_bytes
        filled = min(1.0, self.rows_sent / places)
        entry = pricing.collective(item, _PART, self.count, Op.ALL_TO_ALL, self.axes.sent, size, self.split.act_dtype.value, filled)
        if not self._ragged:
            return entry._replace(routed=self.load)
        fullest = size * min(1.0, filled * self.load.most_rows / self.load.rows)  # as much more than the mean as it multiplies
        wanted = pricing.network.seconds(Op.ALL_TO_ALL, self.axes.sent, int(fullest))
        return entry._replace(seconds=wanted, free=min(entry.free, wanted), routed=self.load)

    def _product(self, matrix: Matrix, load: Routed, inputs: int, outputs: int) -> Entry:
        """A product of the rows with their experts' matrices, each once per layer; gathered matrices are written to HBM and read again."""
        split, pricing = self.split, self.split.pricing
        matrices = self.inner if matrix is items.WX_IN else 1
        stored, used = (self._bytes(axes, matrices) for axes in (self.axes.stored, self.axes.used))
        read = used * load.most_hit / self.held * (1.0 if self.gathered else self._filled_up(matrix))
        passed = used + read if self.gathered else 0.0
        computed = load.most_rows + load.most_hit * max(pricing.calibration.least_rows - 1.0, 0.0)
        timed = pricing.product(
            matrix.product,
            _PART,
            self.count,
            2.0 * computed * inputs * outputs,
            1.0,
            stored if self.gathered else read,
            activation_bytes=load.most_rows * (inputs + outputs) * split.act_bytes + passed,
            shape=(max(1, round(computed / max(load.most_hit, 1.0))), inputs, outputs),
        )
        flops, useful = 2.0 * self.places * inputs * outputs, self.split.shape.useful * load.rows / self.places
        return timed._replace(
            flops=flops * useful,
            padding_flops=flops * (1 - useful),
            weight_bytes=float(stored),
            activation_bytes=self.places * (inputs + outputs) * split.act_bytes + (2.0 * used if self.gathered else 0.0),
            early=0.0,  # which experts will be hit is not known in advance
            shape=(self.places, inputs, outputs),
            routed=load,
        )

    def _filled_up(self, matrix: Matrix) -> float:
        """What a device's matrices take in memory, of their entries: they are read in whole tiles."""
        sizes = (self.inner, self.ffn, self.embed) if matrix is items.WX_IN else (1, self.embed, self.ffn)
        return self.split.pricing.slice.chip.platform.held_entries(*sizes) / math.prod(sizes)

    def _between_products(self) -> list[Entry]:
        """What reduces F over e in the middle."""
        split, axes = self.split, self.axes
        elements, useful = self.places * self.of.each.width, split.shape.useful * self.load.rows / self.places
        partial, scattered, whole = Split((), axes.ffn, axes.embed), Split((), axes.ffn + axes.embed), Split((), axes.ffn)
        after = movement(split, _PART, items.EXPERTS_AFTER_IN, self.inner * elements, partial, scattered, useful, count=self.count)
        return after + movement(split, _PART, items.EXPERTS_BEFORE_OUT, elements, scattered, whole, useful, count=self.count)

    def _reduced(self, elements: int) -> list[Entry]:
        """[T.τ, E.e] {Xf unreduced} → [T.t, E.between]; nothing where it joins the sums of the matrices next to it."""
        split, axes = self.split, self.axes
        source, target = Split(axes.rows, axes.embed, axes.reduced), Split(split.t, split.between)
        if self._next_to_dense and self._alike(source, Split(split.t, split.e, split.f)) and self._in_order:
            return []
        ways = [(source, target)] if self._in_order else [(source, Split(split.t)), (Split(split.t), target)]
        return [
            entry for one, other in ways for entry in movement(split, _PART, items.FROM_EXPERTS, elements, one, other, count=self.count)
        ]

    def _shared_gate(self) -> list[Entry]:
        """The gate's product of a token whose E is split, in float32."""
        split = self.split
        if not (self.of.shared_gate and split.between):
            return []
        size, useful = split.local_tokens * _F32, split.shape.useful
        return [split.pricing.collective(items.SHARED_GATE, _PART, self.count, Op.ALL_REDUCE, split.between, size, "f32", useful)]

    @property
    def _next_to_dense(self) -> bool:
        """Whether dense matrices stand next to the experts, with whose collectives theirs can go: no loop goes around those."""
        return (self.split.parallel or self.of.shared > 0) and self.split.phase.loop is None

    @property
    def _shares_gather(self) -> bool:
        """Whether the experts read what is gathered for the dense matrices next to them."""
        split = self.split
        own = split.model.block is Block.PARALLEL_TWO_NORMS
        return self._next_to_dense and not own and self._alike(Split(self.axes.rows), Split(split.t, split.e))

    @property
    def _in_order(self) -> bool:
        """Whether E of what experts add up is split in the order of E between sublayers, so that one movement brings it there."""
        dense, stored = self.split.w_stored, self.axes.stored[2]
        digits = stored + tuple(axis for axis in dense if axis not in stored) if self.axes.embed else dense
        return digits == dense + tuple(axis for axis in digits if axis not in dense)

    def _alike(self, one: Split, other: Split) -> bool:
        return all(set(mine) == set(others) for mine, others in zip(one, other, strict=True))
