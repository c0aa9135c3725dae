"""What an entry of the ledger is: its identity as a value, of which the name is only the display.

Code that needs to know what an entry does (prices, pictures, probes of single entries, `explain`) compares these values and never a
name, so that an entry can be renamed without a figure changing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class What(StrEnum):
    """PRODUCT: with a matrix of a layer. TABLE: with the table of logits. CORE: with keys and values. WEIGHTS: matrices gathered.
    SCALES: those of int8 matrices gathered. NORM: sums for a norm. MOVE: activations brought to another split. CHOICE: the selection of
    tokens. OTHER: anything else."""

    PRODUCT = "product"
    TABLE = "table"
    CORE = "core"
    WEIGHTS = "weights"
    SCALES = "scales"
    NORM = "norm"
    MOVE = "move"
    CHOICE = "choice"
    OTHER = "other"


class Side(StrEnum):
    """On which side of a sublayer's core or activation an entry stands."""

    IN = "in"
    OUT = "out"


class Item(NamedTuple):
    """One kind of entry.

    Attributes:
        name: for the reader, in the paper's notation where that says more than a word.
        tensor: the weight (as `partinf.model.weights` names it) or activation that it is about; empty where the name says all.
        side: of a sublayer, for what a loop around a product can hide; None elsewhere.
        group: the token group, `decode` or `prefill`, of what is one group's alone.
    """

    what: What
    name: str
    tensor: str = ""
    side: Side | None = None
    group: str = ""


class Matrix(NamedTuple):
    """The entries of one matrix of a layer: its product, and the gathers of its stored parts and their scales."""

    product: Item
    weights: Item
    scales: Item


def matrix(tensor: str, name: str, side: Side) -> Matrix:
    """The entries of a matrix, by the name of the weight and the one that the reader knows it by."""
    return Matrix(
        Item(What.PRODUCT, f"× {name}", tensor, side),
        Item(What.WEIGHTS, f"weights {name}", tensor),
        Item(What.SCALES, f"scales of {name}", tensor),
    )


W_Q, W_KV, W_O = matrix("wq", "W_Q", Side.IN), matrix("wkv", "W_KV", Side.IN), matrix("wo", "W_O", Side.OUT)
W_IN, W_OUT = matrix("w_in", "W_in", Side.IN), matrix("w_out", "W_out", Side.OUT)


def _experts_matrix(tensor: str, name: str) -> Matrix:
    """The entries of all experts' matrices of one name. No loop goes around their products, so they have no side."""
    return Matrix(
        Item(What.PRODUCT, f"× {name} of experts", tensor),
        Item(What.WEIGHTS, f"weights {name} of experts", tensor),
        Item(What.SCALES, f"scales of {name} of experts", tensor),
    )


WX_IN, WX_OUT = _experts_matrix("wx_in", "W_in"), _experts_matrix("wx_out", "W_out")
BIASES_IN = Item(What.WEIGHTS, "biases of W_in of experts", "bx_in")
BIASES_OUT = Item(What.WEIGHTS, "biases of W_out of experts", "bx_out")
ROUTER = Item(What.PRODUCT, "× router", "router")
SHARED_GATE = Item(What.MOVE, "gate of the shared experts", "shared_gate")
ROUTING = Item(What.OTHER, "choice and sorting")
ROWS_TO_EXPERTS = Item(What.MOVE, "rows to the experts", "E")
CHOSEN_EXPERTS = Item(What.MOVE, "chosen experts", "X")
ROWS_SENT = Item(What.MOVE, "rows to their experts", "E")
ROWS_PACKED = Item(What.OTHER, "rows packed for the exchange", "E")
ROWS_SORTED = Item(What.OTHER, "rows by expert", "E")
EXPERTS_ACTIVATED = Item(What.OTHER, "activation of experts", "F")
EXPERTS_AFTER_IN = Item(What.MOVE, "F of experts after W_in", "F")
EXPERTS_BEFORE_OUT = Item(What.MOVE, "F of experts before W_out", "F")
OUTPUTS_ADDED = Item(What.OTHER, "outputs by token", "E")
OUTPUTS_SENT = Item(What.MOVE, "outputs to their tokens", "E")
FROM_EXPERTS = Item(What.MOVE, "E after the experts", "E")

DISPATCH = Item(What.OTHER, "dispatch")
LOOKUP = Item(What.OTHER, "lookup", "embed")
SMALL = Item(What.OTHER, "small operations")
NORM = Item(What.NORM, "norm: parts over E")
HEADS_NORM = Item(What.NORM, "norm of Q, K: parts over heads")
BEFORE = Item(What.MOVE, "E before the sublayer", "E", Side.IN)
AFTER = Item(What.MOVE, "E after the sublayer", "E", Side.OUT)
F_AFTER_IN = Item(What.MOVE, "F after W_in", "F", Side.IN)
F_BEFORE_OUT = Item(What.MOVE, "F before W_out", "F", Side.OUT)
HEADS_AFTER_Q = Item(What.MOVE, "heads after W_Q", "H", Side.IN)
HEADS_BEFORE_O = Item(What.MOVE, "heads before W_O", "H", Side.OUT)
NEW_TO_CACHE = Item(What.MOVE, "new K, V to the cache", "K")
EARLIER = Item(What.MOVE, "earlier K, V", "K")


class GroupItems(NamedTuple):
    """The entries of one token group: its embedded tokens, what passes over its queries, keys and values, the way to its core and back,
    new keys and values into the cache, and its way out of a pipeline stage."""

    embedded: Item
    passes: Item
    queries: Item
    keys: Item
    core: Item
    mass: Item
    back: Item
    write: Item
    leaving: Item


def _group(label: str) -> GroupItems:
    return GroupItems(
        Item(What.MOVE, f"embedded {label} tokens", "E", group=label),
        Item(What.OTHER, f"{label}: small operations on Q, K, V", "H", group=label),
        Item(What.MOVE, f"{label}: Q to its attention split", "H", group=label),
        Item(What.MOVE, f"{label}: new K, V to their split", "K", group=label),
        Item(What.CORE, f"{label} core", "H", group=label),
        Item(What.MOVE, f"{label}: mass of each part", "H", group=label),
        Item(What.MOVE, f"{label}: output back", "H", group=label),
        Item(What.OTHER, f"{label}: write K, V", "K", group=label),
        Item(What.MOVE, f"{label} tokens that leave the stage", "E", group=label),
    )


DECODE, PREFILL = _group("decode"), _group("prefill")

PICK = Item(What.OTHER, "pick last tokens")
LAST_TOKENS = Item(What.MOVE, "last tokens", "E")
LAST_TO_LOGITS = Item(What.MOVE, "last tokens to the logits", "E")
ROWS_TO_LOGITS = Item(What.MOVE, "decode rows to the logits", "E")
PROMPT_TO_LOGITS = Item(What.MOVE, "prompt to the logits", "E")
LOGITS = Item(What.TABLE, "logits", "unembed")
LOGITS_INTO_V = Item(What.MOVE, "logits into V", "V")
READ_LOGITS = Item(What.CHOICE, "read logits")
CHOOSE, CHOSEN = Item(What.CHOICE, "choose"), Item(What.CHOICE, "chosen")
COUNTS = Item(What.CHOICE, "read counts and biases")
MASKS = Item(What.CHOICE, "read masks")
ALTERNATIVES = Item(What.CHOICE, "alternatives")
SCORE, SCORES = Item(What.CHOICE, "score"), Item(What.CHOICE, "scores")
NEXT_STAGE = Item(What.MOVE, "to the next stage", "E")
CHOSEN_TO_STAGES = Item(What.CHOICE, "chosen tokens to all stages")
