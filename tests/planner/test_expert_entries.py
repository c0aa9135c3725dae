"""The ledger of mixtures of experts: the worked example of `Layout` by hand, kinds of layers by their count, and what time is made of."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from partinf.cost import items
from partinf.cost.ledger import Entry, EntryKind, Op
from partinf.cost.memory import linear_set, weight_bytes
from partinf.cost.pricing import Pricing
from partinf.cost.program import PLAIN, TILED
from partinf.cost.split import Shares, StepShape, StepSplit
from partinf.cost.step import dense_part, expert_part, linear_part, step_ledger
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.config import Activation, ModelConfig
from partinf.model.kinds import Experts, FeedForward, Kind
from partinf.model.weights import multiplied_params, num_params
from partinf.workload import DType

EACH = FeedForward(32, True, Activation.SILU, ())
MODEL = ModelConfig("mixed", 3, 64, 0, 8, 8, 16, 512, experts=Experts(8, 2, EACH))
DENSE_FIRST: dict[str, Any] = {
    "ffn_dim": 128,
    "kinds": (Kind("dense", experts=False), Kind("mixed")),
    "prefix": ("dense",),
    "pattern": ("mixed",),
}
SHAPE = StepShape(decode_rows=16, decode_context=64)


def layout_with(experts: str, dense: str = "ref", **other: Any) -> Layout:
    """Roles of x, y and z by their first letters: replica, embed, ffn, and x for experts."""
    role = {"r": "replica", "e": "embed", "f": "ffn", "x": "expert"}
    storage = {axis: role[letter] for axis, letter in zip("xyz", dense, strict=True)}
    attention = {axis: "batch" if kind == "replica" else "none" for axis, kind in storage.items()}
    return make_layout(storage, attention, experts={axis: role[letter] for axis, letter in zip("xyz", experts, strict=True)}, **other)


def split_with(
    layout: Layout,
    model: ModelConfig = MODEL,
    shape: StepShape = SHAPE,
    weights: DType = DType.BF16,
    slice_: str = "v4:2x2x2",
    **priced: Any,
) -> StepSplit:
    where = parse_slice(slice_)
    return StepSplit(model, layout, layout.decode, shape, Pricing(where, **({"program": PLAIN} | priced)), weights, DType.BF16, Shares())


def sent(entries: tuple[Entry, ...]) -> Counter[tuple[Op, tuple[str, ...], int]]:
    """Collectives of one layer with the experts' roles."""
    return Counter((entry.op, entry.axes, entry.bytes) for entry in entries if entry.op is not None)


def flops(entries: tuple[Entry, ...]) -> dict[str, float]:
    return {entry.item.tensor: entry.flops + entry.padding_flops for entry in entries if entry.kind is EntryKind.MATMUL}


def test_the_worked_example() -> None:
    """Copies over x, d_model over y, d_ff over z; experts over x and y, their d_ff over z; 16 tokens of 64, 8 experts of 32."""
    entries = expert_part(split_with(layout_with("xxf")))
    bf16 = 2
    assert sent(entries) == {
        (Op.ALL_GATHER, ("x",), bf16 * 16 * 16): 1,
        (Op.ALL_GATHER, ("y", "z"), bf16 * 16 * 64): 1,
        (Op.REDUCE_SCATTER, ("x",), bf16 * 16 * 64): 1,
        (Op.REDUCE_SCATTER, ("y",), bf16 * 8 * 64): 1,
        (Op.REDUCE_SCATTER, ("z",), bf16 * 8 * 32): 1,
    }
    assert flops(entries) == {"router": 2 * 16 * 64 * 8, "wx_in": 2 * 32 * 64 * 2 * 16, "wx_out": 2 * 32 * 16 * 64}
    assert {entry.count for entry in entries} == {3}


def test_d_model_of_experts_is_reduced_between_their_products() -> None:
    entries = expert_part(split_with(layout_with("xef")))
    places = 16 * 2
    middle = [entry for entry in entries if entry.item in (items.EXPERTS_AFTER_IN, items.EXPERTS_BEFORE_OUT)]
    assert sent(tuple(middle)) == {
        (Op.REDUCE_SCATTER, ("y",), 2 * places * 2 * 16): 1,
        (Op.ALL_GATHER, ("y",), 2 * places * 16): 1,
    }
    assert flops(entries)["wx_in"] == 2 * places * 32 * 2 * 16


def test_gathered_matrices_travel_in_int8_with_their_scales_and_biases() -> None:
    each = dataclasses.replace(EACH, biases=("w_in", "w_out"))
    model = dataclasses.replace(MODEL, experts=Experts(8, 2, each))
    layout = layout_with("xrr", "rrr", decode_gather_experts="x")
    entries = expert_part(split_with(layout, model, weights=DType.INT8))
    gathered = [entry for entry in entries if entry.op is Op.ALL_GATHER]
    assert [(entry.item, entry.bytes, entry.dtype) for entry in gathered] == [
        (items.WX_IN.weights, 8 * 2 * 32 * 64, "int8"),
        (items.WX_IN.scales, 8 * 2 * 32 * 4, "f32"),
        (items.BIASES_IN, 8 * 2 * 32 * 2, "bf16"),
        (items.WX_OUT.weights, 8 * 64 * 32, "int8"),
        (items.WX_OUT.scales, 8 * 64 * 4, "f32"),
        (items.BIASES_OUT, 8 * 64 * 2, "bf16"),
    ]
    assert not [entry for entry in entries if entry.op not in (None, Op.ALL_GATHER)]


def test_rows_that_are_exchanged_have_places_for_all_and_take_the_time_of_the_wanted() -> None:
    one, other = (
        expert_part(split_with(layout_with("xrr", "rrr", decode_dispatch=dispatch), shape=StepShape(decode_rows=512)))
        for dispatch in ("gather", "exchange")
    )
    assert {entry.item for entry in one if entry.op} == {items.ROWS_TO_EXPERTS, items.FROM_EXPERTS}
    exchanged = {entry.item: entry for entry in other if entry.op}
    assert set(exchanged) == {items.CHOSEN_EXPERTS, items.ROWS_SENT, items.OUTPUTS_SENT}
    rows = exchanged[items.ROWS_SENT]
    assert (rows.op, rows.axes, rows.bytes) == (Op.ALL_TO_ALL, ("x",), 2 * 128 * 64)
    wanted = 128 * (1 - (4 * 3) / (8 * 7))
    assert rows.routed is not None
    assert rows.routed.sent == pytest.approx(wanted)
    assert rows.bytes - rows.padding_bytes >= 2 * 64 * wanted * (1 - 1e-9)


def test_layers_are_counted_by_kind() -> None:
    """A dense layer first, a feed-forward next to the experts of the others; what is useful is what tokens meet, over all devices."""
    model = dataclasses.replace(MODEL, experts=Experts(8, 2, EACH, shared=64), **DENSE_FIRST)
    entries = linear_part(split_with(layout_with("xxf", "fff"), model, dataclasses.replace(SHAPE, decode_rows=64)))
    of = {entry.item: entry.count for entry in entries if entry.kind is EntryKind.MATMUL}
    widths = [(entry.count, entry.shape[2]) for entry in entries if entry.item == items.W_IN.product]
    assert widths == [(1, 2 * 128 // 8), (2, 2 * 64 // 8)]
    assert of[items.WX_IN.product] == of[items.ROUTER] == 2
    assert of[items.W_Q.product] == 3
    router = 2 * 2.0 * 64 * 64 * 8  # the same on every device
    layers = sum(e.flops * e.count for e in entries if e.kind is EntryKind.MATMUL and e.item not in (items.LOGITS, items.ROUTER))
    assert 8 * layers + router == pytest.approx(2.0 * 64 * multiplied_params(model))


def test_weights_are_read_as_they_are_held() -> None:
    model = dataclasses.replace(MODEL, tied_embeddings=False)
    layout = layout_with("xxx", "fff")
    split = split_with(layout, model, StepShape(decode_rows=8, decode_context=64))
    read = sum(entry.weight_bytes * entry.count for entry in linear_part(split))
    table, vectors = 512 * 64 // 8, (2 * 3 + 1) * 64
    assert weight_bytes(split) == read + 2 * (table + vectors)
    assert 8 * (weight_bytes(split) - 2 * vectors) == 2 * (num_params(model) - vectors) + 2 * 7 * 3 * 64 * 8  # a router on every device


def test_few_rows_read_the_experts_that_they_hit() -> None:
    big = dataclasses.replace(MODEL, embed_dim=1024, experts=Experts(128, 4, dataclasses.replace(EACH, width=1024)))
    times = {}
    for rows in (1, 16, 512):
        split = split_with(layout_with("fff", "fff"), big, StepShape(decode_rows=rows, decode_context=64), program=TILED)
        product = next(entry for entry in expert_part(split) if entry.item == items.WX_IN.product)
        assert product.weight_bytes == 2 * 128 * 2 * 1024 * 1024 / 8
        assert product.routed is not None
        times[rows] = product.seconds
        hit = 128 * (1 - (1 - 4 / 128) ** rows)
        assert product.routed.hit == pytest.approx(hit)
        assert product.seconds >= hit * 2 * 2 * 1024 * 1024 / 8 / (split.pricing.slice.chip.hbm_bandwidth)
    assert times[1] < 0.05 * times[512]
    assert times[16] < 0.5 * times[512]


def test_the_fullest_device_counts_and_skew_fills_it_more() -> None:
    big = dataclasses.replace(MODEL, embed_dim=1024, experts=Experts(128, 4, dataclasses.replace(EACH, width=1024)))
    shape = StepShape(decode_rows=1 << 14, decode_context=64)
    seconds, split = {}, split_with(layout_with("xxx", "fff"), big, shape)
    for skew in (0.0, 1.01, 1.2):
        entries = expert_part(split_with(split.layout, big, shape, skew=skew))
        seconds[skew] = next(entry.seconds for entry in entries if entry.item == items.WX_IN.product)
    even = split.pricing.compute_seconds(2.0 * shape.decode_rows * 4 / 8 * 1024 * 2048, 0.0)
    assert even < seconds[0.0] < 1.2 * even
    assert seconds[0.0] < seconds[1.01] < seconds[1.2]


def test_activations_hold_sorted_rows_at_their_worst_and_gathered_matrices() -> None:
    shape = StepShape(prefill_tokens=4096, prefill_slots=8)
    few, more, gathered = (
        linear_set(split_with(layout, shape=shape)).largest
        for layout in (layout_with("xxx", "rrr"), layout_with("xxr", "rrr"), layout_with("xxx", "rrr", decode_gather_experts="xyz"))
    )
    assert few == 2 * 4096 * (64 + 2 * 32)  # one expert on a device, which all tokens may choose
    assert more == 2 * 2048 * 2 * (64 + 2 * 32)  # half of the tokens, and two experts for each
    assert gathered == 2 * (512 * 2 * (64 + 2 * 32) + 8 * 64 * 2 * 32)


def test_a_model_without_experts_has_no_entries_for_them() -> None:
    dense = dataclasses.replace(MODEL, experts=None, ffn_dim=128)
    split = split_with(make_layout(dict.fromkeys("xyz", "ffn"), dict.fromkeys("xyz", "none")), dense)
    assert expert_part(split) == ()
    assert linear_part(split) == dense_part(split)
    assert not [entry for entry in step_ledger(split).entries if entry.routed is not None]
