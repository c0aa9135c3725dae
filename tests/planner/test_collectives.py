"""Times of collectives: the formulas by hand, and properties that any network model has."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partinf.cost.collectives import BandwidthModel, Network
from partinf.cost.ledger import Op
from partinf.hardware.slices import parse_slice

MB = 1e6
W = 90e9  # one v4 torus axis, both ways


def test_ring_of_four() -> None:
    network = Network(parse_slice("v4:4x4x4"))
    assert network.seconds(Op.ALL_GATHER, ("x",), 100 * MB) == pytest.approx(100 * MB * 3 / 4 / W)
    assert network.seconds(Op.REDUCE_SCATTER, ("x",), 100 * MB) == network.seconds(Op.ALL_GATHER, ("x",), 100 * MB)
    assert network.seconds(Op.ALL_REDUCE, ("x",), 100 * MB) == 2 * network.seconds(Op.ALL_GATHER, ("x",), 100 * MB)


def test_axes_together_use_all_their_links() -> None:
    network = Network(parse_slice("v4:4x4x4"))
    assert network.seconds(Op.ALL_GATHER, ("x", "y", "z"), 100 * MB) == pytest.approx(100 * MB * 63 / 64 / (3 * W))


def test_no_wraparound_takes_double() -> None:
    """v5e has wraparound on axes of 16 only."""
    ring, line = Network(parse_slice("v5e:16x16")), Network(parse_slice("v5e:8x8"))
    share = (15 / 16) / (7 / 8)
    assert line.seconds(Op.ALL_GATHER, ("x",), 100 * MB) == pytest.approx(2 / share * ring.seconds(Op.ALL_GATHER, ("x",), 100 * MB))


def test_all_to_all_on_a_ring() -> None:
    """V·max(axis)/(4·N·W) with V the global bytes (scaling book)."""
    assert Network(parse_slice("v4:4x4x4")).seconds(Op.ALL_TO_ALL, ("x", "y"), 100 * MB) == pytest.approx(100 * MB * 4 / (4 * W))


def test_hops_bound_small_collectives() -> None:
    assert Network(parse_slice("v4:4x4x8")).seconds(Op.ALL_GATHER, ("x", "y", "z"), 64) == pytest.approx(8e-6)
    assert Network(parse_slice("v4:4x4x4"), hop_seconds=3e-6).seconds(Op.ALL_GATHER, ("x",), 0) == pytest.approx(6e-6)


def test_an_all_to_all_waits_once_whatever_joins_the_devices() -> None:
    """On a torus it passes on no data and waits for the chip's own latency; through a switch it is one step like any other collective."""
    torus = Network(parse_slice("v4:4x4x4"), hop_seconds=5e-6)
    assert torus.seconds(Op.ALL_TO_ALL, ("x",), 0) == pytest.approx(2e-6)
    assert torus.seconds(Op.ALL_GATHER, ("x",), 0) == pytest.approx(10e-6)
    switch = Network(parse_slice("h200:8"), hop_seconds=1e-5)
    assert switch.seconds(Op.ALL_TO_ALL, ("x",), 0) == switch.seconds(Op.ALL_GATHER, ("x",), 0) == pytest.approx(1e-5)


@pytest.mark.parametrize(("name", "axis", "inside"), [("v5p:4x4x4*2", "dcn", "x"), ("h100:8*2", "dcn", "x"), ("h100:16", "x", "")])
def test_a_hop_between_hosts_is_none_between_chips(name: str, axis: str, inside: str) -> None:
    """Whatever a hop of the torus or of a node's switch takes, a message to another host passes two adapters and takes 10 µs."""
    slice_ = parse_slice(name)
    within = {hop: Network(slice_, hop_seconds=hop).seconds(Op.ALL_GATHER, (inside,), 0) if inside else hop for hop in (8e-7, 5e-6)}
    for hop, chips in within.items():
        network = Network(slice_, hop_seconds=hop)
        between = 1e-5 + (0.0 if inside else chips)
        assert network.seconds(Op.ALL_GATHER, (axis,), 0) == pytest.approx(between)
        assert network.seconds(Op.ALL_TO_ALL, (axis,), 0) == pytest.approx(between)
        assert network.seconds(Op.PERMUTE, (axis,), 0) == pytest.approx(1e-5)
        if inside:
            assert network.seconds(Op.ALL_REDUCE, (inside, axis), 0) == pytest.approx(2 * (chips + 1e-5))


def test_paper_model_adds_all_links() -> None:
    network = Network(parse_slice("v4:4x4x4"), BandwidthModel.PAPER)
    for axes in (("x",), ("x", "y")):
        parts = 4 ** len(axes)
        assert network.seconds(Op.ALL_GATHER, axes, 100 * MB) == pytest.approx(100 * MB * (parts - 1) / parts / 270e9)


def test_one_axis_is_three_times_slower_than_the_paper_says() -> None:
    slice_ = parse_slice("v4:4x4x4")
    ours, paper = (Network(slice_, model).seconds(Op.ALL_GATHER, ("x",), 100 * MB) for model in BandwidthModel)
    assert ours == pytest.approx(3 * paper)


def test_factors_of_an_axis() -> None:
    """x0 is strided and shares its links with three other rings, x1 is a line; together they are the whole ring."""
    whole = Network(parse_slice("v4:16x4x4")).seconds(Op.ALL_GATHER, ("x",), 100 * MB)
    network = Network(parse_slice("v4:16x4x4", "x0:4,x1:4,y:4,z:4"))
    assert network.seconds(Op.ALL_GATHER, ("x0", "x1"), 100 * MB) == pytest.approx(whole)
    assert network.seconds(Op.ALL_GATHER, ("x1",), 100 * MB) == pytest.approx(100 * MB * 3 / 4 / (W / 2))
    assert network.seconds(Op.ALL_GATHER, ("x0",), 100 * MB) == pytest.approx(100 * MB * 3 / 4 / (W / 4))


def test_beyond_a_node_the_adapter_counts() -> None:
    inside, beyond = Network(parse_slice("a100-80:8")), Network(parse_slice("a100-80:16"))
    assert inside.seconds(Op.ALL_GATHER, ("x",), 800 * MB) == pytest.approx(800 * MB * 7 / 8 / 300e9)
    expected = 800 * MB * 7 / 8 / 300e9 + 100 * MB / 2 / 25e9
    assert beyond.seconds(Op.ALL_GATHER, ("x",), 800 * MB) == pytest.approx(expected)


SLICES = st.sampled_from(["v4:4x4x4", "v4:2x2x4", "v5e:4x8", "v5p:4x4x8*2", "tpu7x:4x4x4", "h200:16", "cpu:2x2x2"])


@settings(max_examples=150, deadline=None)
@given(SLICES, st.sampled_from(list(Op)), st.data(), st.sampled_from(list(BandwidthModel)))
def test_more_bytes_never_take_less_time(name: str, op: Op, data: st.DataObject, model: BandwidthModel) -> None:
    slice_ = parse_slice(name)
    axes = tuple(data.draw(st.lists(st.sampled_from([a.name for a in slice_.axes]), min_size=1, unique=True)))
    low, more = data.draw(st.integers(1, 10**9)), data.draw(st.integers(0, 10**9))
    network = Network(slice_, model)
    first = network.seconds(op, axes, low)
    assert 0 <= first <= network.seconds(op, axes, low + more) < float("inf")


@settings(max_examples=60, deadline=None)
@given(SLICES, st.data())
def test_an_all_reduce_is_a_scatter_and_a_gather(name: str, data: st.DataObject) -> None:
    slice_ = parse_slice(name)
    axes = tuple(data.draw(st.lists(st.sampled_from([a.name for a in slice_.axes]), min_size=1, unique=True)))
    size, network = data.draw(st.integers(1, 10**9)), Network(slice_)
    both = network.seconds(Op.REDUCE_SCATTER, axes, size) + network.seconds(Op.ALL_GATHER, axes, size)
    assert network.seconds(Op.ALL_REDUCE, axes, size) == pytest.approx(both)
