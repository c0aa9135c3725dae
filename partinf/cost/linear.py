"""Entries that every linear layer shares: the norm before it, gathered weights, and the collectives around a sublayer."""

from __future__ import annotations

from partinf.cost.items import AFTER, BEFORE, NORM, Item, Matrix
from partinf.cost.ledger import Entry, Op, Part
from partinf.cost.movement import Axes, Split
from partinf.cost.split import StepSplit
from partinf.foundation.rounding import ceil_div, round_up
from partinf.hardware.platform import gathers_norm
from partinf.workload import DType

_F32 = 4


def norm(split: StepSplit, part: Part, rows: int, axes: Axes, count: int, useful: float) -> list[Entry]:
    """What norms gather over a split E: the squares of every part, and where the mean is subtracted its mean, in float32.

    Args:
        axes: that split E. A looped program gathers first what it does not loop over: it sums over E's own axes, or the longest of F's.
    """
    if split.looped:
        axes = tuple(a for a in axes if a in split.e_stored) or tuple(sorted(axes, key=lambda a: -split.sizes[a])[:1])
    if not axes:
        return []
    return [norm_collective(split, NORM, part, count, axes, rows, useful)]


def norm_after(split: StepSplit, part: Part) -> list[Entry]:
    """The norm of what a sublayer adds to the residual, where the layers have such."""
    model = split.model
    return norm(split, part, split.local_tokens, split.between, model.num_layers, split.shape.useful) if model.norms.after else []


def norm_collective(split: StepSplit, item: Item, part: Part, count: int, axes: Axes, rows: int, useful: float) -> Entry:
    """What the norms of so many rows send over the axes that split them: of few what every part has found, in whole lanes; else sums, of
    values and then of squared deviations where there is a mean."""
    numbers, ways = (2 if split.model.norm.centred else 1), split.ways(axes)
    if split.pricing.program.norm_sums:
        return split.pricing.collective(item, part, count, Op.ALL_REDUCE, axes, numbers * _F32 * rows, "f32", useful)
    if not gathers_norm(numbers * rows * ways):
        return split.pricing.collective(item, part, numbers * count, Op.ALL_REDUCE, axes, _F32 * rows, "f32", useful)
    filled = round_up(rows, split.pricing.slice.chip.platform.lanes)
    return split.pricing.collective(item, part, count, Op.ALL_GATHER, axes, numbers * _F32 * filled * ways, "f32", useful)


def gather_embed(split: StepSplit, part: Part, count: int | None = None) -> list[Entry]:
    """[T.t, E.between] → [T.t, E.e] before a sublayer's first product."""
    elements = split.shape.num_tokens * split.model.embed_dim
    return movement(split, part, BEFORE, elements, Split(split.t, split.between), Split(split.t, split.e), count=count)


def scatter_embed(split: StepSplit, part: Part, count: int | None = None) -> list[Entry]:
    """[T.t, E.e] {f unreduced} → [T.t, E.between] after a sublayer's last product."""
    elements = split.shape.num_tokens * split.model.embed_dim
    source, target = Split(split.t, split.e, split.f), Split(split.t, split.between)
    return movement(split, part, AFTER, elements, source, target, dtype=split.wide_dtype, count=count)


def movement(
    split: StepSplit,
    part: Part,
    item: Item,
    elements: int,
    source: Split,
    target: Split,
    useful: float | None = None,
    dtype: DType | None = None,
    rides: bool = False,
    count: int | None = None,
) -> list[Entry]:
    """The collectives, once per layer, that bring an activation of `elements` from one split to another.

    Args:
        dtype: of the elements; that of activations unless given. rides: as in `Pricing.collective`. count: of layers; all unless given.
    """
    share = split.shape.useful if useful is None else useful
    sent, layers = dtype or split.act_dtype, split.model.num_layers if count is None else count
    return [
        split.pricing.collective(item, part, layers, op, axes, payload * sent.num_bytes, sent.value, share, rides)
        for op, axes, payload in split.moves(elements, source, target)
    ]


def product_seconds(split: StepSplit, matrix: Matrix, tokens: int, inputs: int, outputs: int, width: int = 0) -> float:
    """What a matrix's product takes for so many of the step's tokens, whatever was gathered for it.

    Args:
        inputs, outputs, width: as for `Weight.product`.
    """
    rows = ceil_div(tokens, split.ways(split.t))
    size, flops = float(inputs * outputs * split.weight_bytes), 2.0 * rows * inputs * outputs
    return split.pricing.product(matrix.product, Part.ATTENTION, 1, flops, 1.0, size, shape=(rows, inputs, outputs), width=width).seconds


class Weight:
    """One weight matrix of a layer: its local size as stored and as used, and the gathers between the two."""

    def __init__(
        self, split: StepSplit, matrix: Matrix, out: int, stored: Axes, used: Axes, to_embed: bool = False, count: int | None = None
    ) -> None:
        """
        Args:
            out: entries of the dimension that is not E (heads × Q or F, times the matrices that are stored together).
            stored, used: axes that split it before and after gathering.
            to_embed: E is what comes out (W_O, W_out), so int8 scales run over E; otherwise over the other dimension.
            count: of layers that have it; all unless given.
        """
        self.split, self.matrix = split, matrix
        self.count = split.model.num_layers if count is None else count
        self.elements = out * split.model.embed_dim
        self.source, self.target = Split(stored, split.e_stored), Split(used, split.e)
        self.channels = split.model.embed_dim if to_embed else out
        self.scale_source = Split(cols=split.e_stored) if to_embed else Split(stored)
        self.scale_target = Split(cols=split.e) if to_embed else Split(used)
        self.stored_bytes = self.elements // split.ways(stored + split.e_stored) * split.weight_bytes
        self.used_bytes = self.elements // split.ways(used + split.e) * split.weight_bytes

    def gathers(self, part: Part) -> list[Entry]:
        """All-gathers of this weight, once per layer."""
        split = self.split
        found = []
        for op, axes, elements in split.moves(self.elements, self.source, self.target):
            size, dtype = elements * split.weight_bytes, split.weight_dtype.value
            found.append(split.pricing.collective(self.matrix.weights, part, self.count, op, axes, size, dtype))
        if split.weight_dtype is DType.INT8:
            for op, axes, elements in split.moves(self.channels, self.scale_source, self.scale_target):
                size = elements * _F32
                found.append(split.pricing.collective(self.matrix.scales, part, self.count, op, axes, size, "f32"))
        return [entry._replace(ahead=entry.seconds) for entry in found] if split.gathers_behind else found

    def product(self, part: Part, rows: int, inputs: int, outputs: int, useful: float, width: int = 0) -> Entry:
        """The product with this weight, once per layer; gathered weights are written to HBM once more and read again.

        Args:
            rows, inputs, outputs: on one device, of the activations [rows, inputs] that are read and [rows, outputs] that are written.
            width: of a head, where outputs are heads.
        """
        passed = 2 * self.used_bytes if self.used_bytes > self.stored_bytes else 0
        activation, flops = rows * (inputs + outputs) * self.split.act_bytes + passed, 2.0 * rows * inputs * outputs
        return self.split.pricing.product(
            self.matrix.product,
            part,
            self.count,
            flops,
            useful,
            self.stored_bytes,
            activation_bytes=activation,
            shape=(rows, inputs, outputs),
            width=width,
        )
