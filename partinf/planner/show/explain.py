"""A layout as one reads it in the paper: numbered lines of shapes and collectives, each with its bytes and time.

The lines follow the ledger: every entry of the step stands on exactly one line, with the shape of the tensor that it leaves behind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from partinf.axes import ShardedShape
from partinf.cost import items
from partinf.cost.experts import expert_axes
from partinf.cost.items import Item, Side
from partinf.cost.ledger import Entry, Ledger, Op, Part
from partinf.cost.movement import Axes, Split
from partinf.cost.split import StepSplit

_TITLES = {
    Part.EMBEDDING: "Embedding",
    Part.ATTENTION: "Attention, in every layer",
    Part.FFN: "FFN, in every layer",
    Part.LOGITS: "Logits of the rows that are sampled",
    Part.SAMPLING: "Choice of tokens",
    Part.STAGES: "Between pipeline stages",
}


@dataclass(frozen=True)
class Line:
    """One entry of the ledger and the shape that it leaves behind, whole and on one device (empty where there is nothing to say)."""

    entry: Entry
    shape: str = ""
    local: str = ""

    @property
    def what(self) -> str:
        """`all-gather(yz) F`, or the entry's name."""
        return f"{self.entry.op}({''.join(self.entry.axes)}) {self.entry.name}" if self.entry.op else self.entry.name


@dataclass(frozen=True)
class Section:
    """The lines of one part of a step, after the shape that it starts from; `per_layer` if they run in every layer."""

    title: str
    start: str
    lines: tuple[Line, ...]
    per_layer: bool


@dataclass(frozen=True)
class _Tensor:
    """How a tensor is written: rows and columns take the axes of a `Split`, the other letters are whole."""

    letters: tuple[str, ...]
    rows: str
    cols: str
    source: Split
    target: Split


def explain(split: StepSplit, ledger: Ledger) -> list[Section]:
    """One step as sections of lines, in the order in which it runs."""
    tensors = _tensors(split)
    sections = []
    for part, title in _TITLES.items():
        entries = sorted(ledger.of(part=part).entries, key=lambda e: part is Part.ATTENTION and e.item.side is Side.OUT)
        current: dict[Item, Split] = {}
        lines = tuple(_line(split, entry, tensors.get(entry.item), current) for entry in entries)
        start = _shape(split, tensors[items.BEFORE], Split(split.t, split.between))[0] if part in (Part.ATTENTION, Part.FFN) else ""
        if lines:
            sections.append(Section(title, start, lines, part in (Part.ATTENTION, Part.FFN)))
    return sections


def _tensors(split: StepSplit) -> dict[Item, _Tensor]:
    """The tensor that each entry moves or makes, by the entry's item."""
    stored, used = split.w_stored, Split(split.t, split.between)
    whole_e, partial_e = Split(split.t, split.e), Split(split.t, split.e, split.f)
    hidden, partial = Split(split.t, split.f + split.e), Split(split.t, split.f, split.e)
    table_of_v = tuple(axis for axis in stored if axis not in split.logit_cols)
    logits = Split(split.replica, table_of_v, split.logit_cols)
    tokens, rows, routed = _token_letters(split), ("B",), expert_axes(split)

    def of(letters: tuple[str, ...], cols: str, source: Split, target: Split | None = None) -> _Tensor:
        return _Tensor(letters, letters[0], cols, source, source if target is None else target)

    table = {
        items.BEFORE: of((*tokens, "E"), "E", used, whole_e),
        items.W_Q.product: of((*tokens, "H", "Q"), "H", partial),
        items.HEADS_AFTER_Q: of((*tokens, "H", "Q"), "H", partial, hidden),
        items.HEADS_BEFORE_O: of((*tokens, "H", "Q"), "H", hidden, Split(split.t, split.f)),
        items.W_KV.product: of((*tokens, "K", "Q"), "K", split.kv_projected),
        items.W_O.product: of((*tokens, "E"), "E", partial_e),
        items.AFTER: of((*tokens, "E"), "E", partial_e, used),
        items.W_IN.product: of((*tokens, "F"), "F", partial),
        items.F_AFTER_IN: of((*tokens, "F"), "F", partial, hidden),
        items.F_BEFORE_OUT: of((*tokens, "F"), "F", hidden, Split(split.t, split.f)),
        items.W_OUT.product: of((*tokens, "E"), "E", partial_e),
        items.ROWS_TO_EXPERTS: of((*tokens, "E"), "E", used, Split(routed.rows)),
        items.FROM_EXPERTS: of((*tokens, "E"), "E", Split(routed.rows, routed.embed, routed.reduced), used),
        items.ROWS_TO_LOGITS: of((*rows, "E"), "E", used, Split(split.replica, split.logit_cols)),
        items.LAST_TO_LOGITS: of((*rows, "E"), "E", Split((), stored if split.logit_cols else split.between), Split((), split.logit_cols)),
        items.LOGITS: of((*rows, "V"), "V", logits),
        items.LOGITS_INTO_V: of((*rows, "V"), "V", logits, Split(split.replica, table_of_v + split.logit_cols)),
        items.NEXT_STAGE: of((*tokens, "E"), "E", Split(split.replica, stored)),
    }
    for its, group in ((items.DECODE, split.decode), (items.PREFILL, split.prefill)):
        spread, parts = Split(group.batch, group.heads), Split(group.batch, group.heads, group.sequence)
        table |= {
            its.embedded: of((*tokens, "E"), "E", Split(split.replica, stored), used),
            its.leaving: of((*tokens, "E"), "E", used, Split(split.replica, stored)),
            its.queries: of((*tokens, "H", "Q"), "H", split.q_projected, spread),
            its.keys: of((*tokens, "K", "Q"), "K", split.kv_projected, Split(group.batch, group.kv)),
            its.core: of((*tokens, "H", "Q"), "H", parts),
            its.mass: of((*tokens, "H"), "H", spread),
            its.back: of((*tokens, "H", "Q"), "H", parts, split.heads_wanted),
        }
    shared = tuple(axis for axis in split.decode.batch if axis in split.prefill.batch)
    here, cached = Split(split.prefill.batch, split.prefill.kv), Split(shared, split.decode.kv)
    table[items.NEW_TO_CACHE] = of((*tokens, "K", "Q"), "K", here, cached)
    for matrix, letters, out, before, after in (
        (items.W_Q, ("H", "Q", "E"), "H", split.f_stored, split.f),
        (items.W_KV, ("K", "Q", "E"), "K", split.kv_stored, split.kv),
        (items.W_O, ("E", "H", "Q"), "H", split.f_stored, split.f),
        (items.W_IN, ("F", "E"), "F", split.f_stored, split.f),
        (items.W_OUT, ("E", "F"), "F", split.f_stored, split.f),
    ):
        table[matrix.weights] = _Tensor(letters, out, "E", Split(before, split.e_stored), Split(after, split.e))
    return table


def _token_letters(split: StepSplit) -> tuple[str, ...]:
    """`B L` where whole sequences are split, `T` where the tokens of one are."""
    shape = split.shape
    owners = max(split.ways(split.t), split.ways(split.replica), split.ways(split.decode.batch), split.ways(split.prefill.batch))
    sequences = shape.prefill_slots or shape.decode_rows
    mixed = shape.prefill_tokens and shape.decode_rows
    return ("T",) if mixed or sequences % owners else ("B", "L")


def _line(split: StepSplit, entry: Entry, tensor: _Tensor | None, current: dict[Item, Split]) -> Line:
    if tensor is None:
        return Line(entry)
    now = current.get(entry.item, tensor.source)
    if entry.op is not None:
        now = current[entry.item] = _after(entry.op, entry.axes, now, tensor.target)
    shape, local = _shape(split, tensor, now)
    return Line(entry, shape, local)


def _after(op: Op, axes: Axes, now: Split, target: Split) -> Split:
    """The split after one collective on the way to `target`; what is sliced for free goes with the first one."""
    held = now.rows + now.cols + now.unreduced
    rows = tuple(a for a in target.rows if a in now.rows or a not in held)
    cols = tuple(a for a in target.cols if a in now.cols or a not in held)
    rows += tuple(a for a in now.rows if a not in rows)
    cols += tuple(a for a in now.cols if a not in cols)
    unreduced = tuple(a for a in now.unreduced if a not in axes)
    if op is Op.ALL_GATHER:
        rows, cols = (tuple(a for a in dim if a not in axes) for dim in (rows, cols))
    elif op in (Op.REDUCE_SCATTER, Op.ALL_TO_ALL):
        rows, cols = (tuple(a for a in dim if a not in axes) for dim in (rows, cols))
        rows += tuple(a for a in axes if a in target.rows)
        cols += tuple(a for a in axes if a in target.cols)
    return Split(_in_order(rows, target.rows), _in_order(cols, target.cols), unreduced)


def _in_order(axes: Axes, digits: Axes) -> Axes:
    """Axes in the digit order of the dimension that they are to split; others stay behind."""
    return tuple(axis for axis in digits if axis in axes) + tuple(axis for axis in axes if axis not in digits)


def _shape(split: StepSplit, tensor: _Tensor, now: Split) -> tuple[str, str]:
    """The shape in the paper's notation, and its sizes on one device."""
    axes = {tensor.rows: now.rows, tensor.cols: now.cols}
    shape = ShardedShape(tuple((letter, axes.get(letter, ())) for letter in tensor.letters), now.unreduced)
    model, step = split.model, split.shape
    sequences = step.prefill_slots or step.decode_rows
    sizes = {
        "T": step.num_tokens,
        "B": sequences,
        "L": math.ceil(step.num_tokens / max(sequences, 1)),
        "E": model.embed_dim,
        "F": max((of.width for of, _ in model.feed_forwards), default=0),
        "H": model.num_heads,
        "K": model.num_kv_heads,
        "Q": model.head_dim,
        "V": model.padded_vocab_size,
    }
    local = [math.ceil(sizes[letter] / split.ways(axes.get(letter, ()))) for letter in tensor.letters]
    return str(shape), "×".join(map(str, local))
