"""The measuring code on tiny shapes, and the fit on times that are known."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from partinf.api import find_slice
from partinf.buckets import runner_limits
from partinf.cost.ledger import EntryKind, Op
from partinf.experiment.result import ledger_of
from partinf.foundation.errors import InvalidInput
from partinf.hardware.chips import chips
from partinf.hardware.hardware_file import default_path, write_hardware
from partinf.hardware.rates import CollectiveRate, Curve, Rates, TypeRates
from partinf.hardware.slices import make_slice, parse_slice
from partinf.layout.files import make_layout
from partinf.measure.calibrate import ROWS, calibrate, predicted_seconds
from partinf.measure.collectives import collective_call
from partinf.measure.entries import Alone, Entries
from partinf.measure.pace import PaceCalls
from partinf.measure.probes import Probe, Size, fit, price, probes
from partinf.measure.products import product_call
from partinf.measure.steps import Steps, for_buckets, full_step
from partinf.measure.timing import Timing, alternate
from partinf.model.load import load_model_config
from partinf.partition.sharding import device_mesh
from partinf.plans import Bucket, Plan
from partinf.workload import DType

AXES = ("x", "y", "z")
SPLIT = Plan(
    load_model_config("demo"),
    parse_slice("cpu:2x2x2"),
    make_layout({"x": "embed", "y": "ffn", "z": "replica"}, {"x": "heads", "y": "batch", "z": "batch"}),
    weights=DType.F32,
    kv=DType.F32,
)
TRUE = TypeRates(2e9, 5e9, 2e10, 4e9, 1e9, 3e-5, 5e-4)


def known_rates(of_type: TypeRates) -> Rates:
    products = (("f32", Curve((1.0, 8.0, 64.0), (5e9, 2e10, 8e10))),)
    collectives = tuple(CollectiveRate(op.value, 8, 1e-4, 1.0) for op in Op)
    return Rates(products, 2e10, (("f32", of_type),), collectives, 8, "cpu", "2026-01-02", "0", 0.0)


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = alternate(calls, budget=0.0, least=3)
    assert order == list("ab" * 4)  # once untimed
    assert [timing.repeats for timing in timings.values()] == [3, 3]
    late = alternate(calls, budget=60.0, latest=time.perf_counter() - 1.0)
    assert [timing.repeats for timing in late.values()] == [1, 1]
    assert Timing.of([1.0, 2.0, 2.0, 2.0, 9.0]) == Timing(2.0, 0.0, 5)


@pytest.mark.parametrize("weights", (DType.F32, DType.INT8))
def test_products_run_on_every_device(weights: DType) -> None:
    result = product_call(device_mesh(SPLIT), 2, 16, 16, weights, 2)()
    assert len(result.sharding.device_set) == 8
    assert bool(jnp.isfinite(result.astype(jnp.float32)).all())


@pytest.mark.parametrize("op", Op)
def test_a_collective_of_that_kind_is_in_the_program(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its payload is what a ledger counts, and every one of the chain is there."""
    found: list[tuple[str, int]] = []
    mesh, shard_map = device_mesh(SPLIT), jax.shard_map

    def spied(f, **kwargs):
        mapped = shard_map(f, **kwargs)

        def run(x):
            body = jax.make_jaxpr(mapped)(x).eqns[0].params["jaxpr"]
            for eqn in body.eqns:
                if "axis_name" in eqn.params or "axes" in eqn.params:
                    payload = eqn.outvars[0] if op is Op.ALL_GATHER else eqn.invars[0]
                    found.append((eqn.primitive.name, payload.aval.size * payload.aval.dtype.itemsize))
            return mapped(x)

        return run

    monkeypatch.setattr(jax, "shard_map", spied)
    collective_call(mesh, op, ("x", "z"), 1000, jnp.dtype(jnp.float32), 3)()
    kinds = {Op.ALL_GATHER: "all_gather", Op.REDUCE_SCATTER: "reduce_scatter", Op.ALL_REDUCE: "psum", Op.ALL_TO_ALL: "all_to_all"}
    kinds[Op.PERMUTE] = "ppermute"
    assert len(found) == 3
    assert {size for _, size in found} == {1008}  # whole elements for each of 4 devices
    assert all(name.startswith(kinds[op]) for name, _ in found)


def test_a_full_step_fills_its_bucket() -> None:
    buckets = (Bucket(8, 3), Bucket(prefill_tokens=32, prefill_slots=8, prefill_pages=1))
    plan = for_buckets(SPLIT, buckets)
    limits = runner_limits(plan)
    decode, prefill = (full_step(plan, bucket, limits) for bucket in buckets)
    assert Counter(row.shard for row in decode.decode) == dict.fromkeys(range(4), 2)
    assert len({page for row in decode.decode for page in row.tables[0].ids}) == 24
    assert {len(row.tables[0].ids) for row in decode.decode} == {3}
    assert sum(len(chunk.tokens) for chunk in prefill.prefill) == 32
    assert Counter(chunk.prefill_shard for chunk in prefill.prefill) == dict.fromkeys(range(4), 2)
    assert {chunk.start for chunk in prefill.prefill} == {16}


def test_a_step_of_a_split_plan_can_be_timed() -> None:
    bucket = Bucket(8, 1, 16, 4)
    steps = Steps(for_buckets(SPLIT, (bucket,)))
    assert alternate({"step": steps.call(bucket)}, budget=0.0, least=1)["step"].seconds > 0


def test_the_fit_finds_the_rates_that_made_the_times() -> None:
    slice_ = make_slice(chips()["cpu"], (2, 2, 2))
    layout = make_layout(dict.fromkeys(AXES, "replica"), dict.fromkeys(AXES, "batch"))
    timed = []
    for model, buckets in probes(Size(devices=8)):
        plan = Plan(model, slice_, layout, weights=DType.F32, kv=DType.F32)
        for each in buckets:
            bucket = Bucket(8 * each.decode_rows, each.decode_pages, 8 * each.prefill_tokens, 8 * each.prefill_slots)
            probe = Probe(model.name, plan, bucket, Timing(0.0, 0.0, 1))
            seconds = price(probe, slice_, known_rates(TRUE), TRUE)
            timed.append(Probe(model.name, plan, bucket, Timing(seconds, 0.0, 1)))
    found, errors = fit(timed, slice_, known_rates(TRUE))
    assert max(map(abs, errors)) < 1e-6
    for name, value in vars(TRUE).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3), name


def test_local_devices_take_the_users_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert find_slice("local").chip.rates is None
    path = default_path("cpu", 8)
    path.parent.mkdir(parents=True)
    chip = make_slice(chips()["cpu"], (8,)).chip
    path.write_text(write_hardware(type(chip)(**vars(chip) | {"rates": known_rates(TRUE)})))
    assert find_slice("local").chip.rates == known_rates(TRUE)
    assert find_slice("cpu:2x2x2").chip.rates is None
    assert find_slice("cpu:2x2x2", hardware=path).chip.rates == known_rates(TRUE)
    with pytest.raises(InvalidInput, match="hardware file .* is of cpu, slice v4:4x4x4 of v4"):
        find_slice("v4:4x4x4", hardware=path)
    with pytest.raises(InvalidInput, match="the slice has 4"):
        find_slice("cpu:4", hardware=path)


def test_int8_needs_bf16() -> None:
    with pytest.raises(InvalidInput, match="measure bf16 too"):
        calibrate((DType.INT8,))


@pytest.mark.slow
def test_calibrating_these_devices() -> None:
    chip, timed = calibrate((DType.F32,), budget=1.0)
    rates = chip.rates
    assert rates is not None
    assert rates.devices == 8
    assert rates.product("f32").sizes == ROWS
    assert {(rate.op, rate.ways) for rate in rates.collectives} == {(op.value, ways) for op in Op for ways in (2, 4, 8)}
    assert all(0 < rate < math.inf for rate in rates.product("f32").rates)
    assert rates.pace is not None
    assert rates.pace.product_share == rates.pace.least_seconds == 0  # no compiler for CPUs states cycles
    assert len(timed) == sum(len(buckets) for _, buckets in probes(Size()))
    predicted = predicted_seconds(chip, timed)
    assert len(predicted) == len(timed)
    assert all(0 < seconds < math.inf for seconds in predicted)


def test_entries_of_a_ledger_are_timed_at_their_shapes() -> None:
    """One of every kind; what is neither product, core nor collective has no call of its own."""
    bucket = Bucket(8, 2)
    plan = for_buckets(SPLIT, (bucket, Bucket(prefill_tokens=8, prefill_slots=4)))
    ledger = ledger_of(plan, bucket)
    chosen = [
        next(entry for entry in ledger.entries if entry.kind is kind)
        for kind in (EntryKind.MATMUL, EntryKind.COLLECTIVE, EntryKind.ATTENTION)
    ]
    alone = Entries(plan)
    alone.add(chosen)
    timings = alternate(alone.calls, budget=0.0, least=2, most=2)
    for entry in chosen:
        way = alone.of(entry)
        assert way is not None
        assert way.seconds(timings) >= 0
        assert timings[way.more].repeats == 2
    # W_Q of 8 heads of 16 over y, d_model 64 over x; all 8 lanes over z.
    assert chosen[0].shape == (4, 32, 64)
    assert any(name.startswith("product of 4 rows, 32 → 64, f32") for name in alone.calls)
    # Lanes over y and z, heads over x.
    assert any(name.startswith("decode core: 2 sequences, 2 tokens, 4 heads, 2 kv heads, 32 in the cache") for name in alone.calls)
    assert all(alone.of(entry) is None for entry in ledger.entries if entry.kind is EntryKind.MEMORY)


def test_the_compilers_times_are_held_against_those_of_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that states no cycles leaves the shipped shares; the least operation is timed either way."""
    chains = PaceCalls(Mesh(jax.devices()[:1], ("x",)), virtual=True)
    alone = chains.rates(alternate(chains.calls, budget=0.0, least=2, most=2), clock=0.0)
    assert (alone.product_share, alone.moving_share, alone.least_seconds) == (0, 0, 0)
    assert alone.small_seconds >= 0
    stated = {name: 1600 * int(name.split()[0]) for name in chains.calls}
    monkeypatch.setattr(chains, "_cycles", stated)
    each = {"small operations": 0.4e-6, "transpositions": 0.5e-6, "products on the chip": 3e-6}
    times = {name: Timing(1e-5 + int(name.split()[0]) * each[name.partition(" ")[2]], 0.0, 1) for name in chains.calls}
    found = chains.rates(times, clock=1.6e9)  # 1 us of every link
    assert vars(found) == pytest.approx({"product_share": 1.0, "moving_share": 0.5, "least_seconds": 1e-6, "small_seconds": 0.4e-6})


def test_a_timing_alone_is_what_more_takes_beyond_less() -> None:
    timings = {"a": Timing(5.0, 0.0, 1), "b": Timing(1.0, 0.0, 1)}
    assert Alone("a", "b", 4).seconds(timings) == 1.0
    assert Alone("b", "a", 4).seconds(timings) == 0.0
