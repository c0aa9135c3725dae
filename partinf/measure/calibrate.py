"""From the local devices to a chip with measured rates: products, memory, collectives, then whole steps of small models."""

from __future__ import annotations

import datetime
import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from partinf.cost.collectives import Network
from partinf.cost.ledger import Op
from partinf.foundation.errors import InvalidInput
from partinf.hardware.chips import Chip, chip_of_kind
from partinf.hardware.platform import platform_named
from partinf.hardware.rates import CollectiveRate, Curve, Rates, TypeRates
from partinf.hardware.slices import Slice
from partinf.measure.collectives import collective_call
from partinf.measure.pace import PaceCalls
from partinf.measure.probes import Probe, declared, fit, prepare, price
from partinf.measure.products import memory_call, products_call, weight_matrices
from partinf.measure.timing import Call, Timing, alternate
from partinf.partition.sharding import by_place, devices_here, local_slice, mesh_in_order
from partinf.workload import DType

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
_FEW_ROWS = 32  # so far, products are timed with weights that no cache holds; beyond, fewer matrices do
_SMALL, _CHAIN = 1024, 8
# Sizes on a CPU, and on an accelerator, which is a hundred times as fast: the matrix [outputs, inputs], bytes of weights that pass
# through no cache, and bytes of a large collective on one device.
_SIDES = {True: (2048, 1024), False: (8192, 8192)}
_STREAM = {True: 64 << 20, False: 1 << 30}
_LARGE = {True: 1 << 20, False: 64 << 20}

OnStage = Callable[[str], None]


def calibrate(
    types: Sequence[DType] = tuple(DType), budget: float = 30.0, on_stage: OnStage = lambda _: None, latest: float = math.inf
) -> tuple[Chip, list[Probe]]:
    """Measure all local devices.

    Everything is compiled first and timed together, in turn: other work on the machine then slows all of it alike, not one kind of
    figure against another.

    Args:
        types: of weights; int8 is measured with bf16 activations, so bf16 has to be among them too.
        budget: seconds of timing in all, three rounds at least; compilation is not counted.
        on_stage: called with what is done next.
        latest: by `time.perf_counter`, when timing has to be over, with fewer rounds if need be, but one.

    Returns:
        The chip, for `partinf.hardware.hardware_file.write_hardware`, and the steps that its rates were fitted to.

    Raises:
        InvalidInput: int8 without bf16.
    """
    measured = Measured(types)
    calls = measured.calls(on_stage)
    on_stage("timing all of them in turn")
    return measured.chip(alternate(calls, budget, latest=latest))


def predicted_seconds(chip: Chip, probes: Sequence[Probe]) -> list[float]:
    """What the probes would take on the devices here by the rates of a chip that `calibrate` returns."""
    rates, slice_ = chip.rates, local_slice(chip=chip)
    assert rates is not None
    return [price(probe, slice_, rates, rates.type(probe.plan.weights.value)) for probe in probes]


class Measured:
    """What is timed on the local devices, by name, and what the times say. The calls are made apart from both."""

    def __init__(self, types: Sequence[DType]) -> None:
        if DType.INT8 in types and DType.BF16 not in types:
            raise InvalidInput("int8: its activations are bf16; measure bf16 too")
        self._devices = devices_here()
        self._types = tuple(types)
        self._virtual = platform_named(self._devices[0].platform).virtual
        self._slice = local_slice(chip=_table_chip(self._devices))
        self._products = _products(self._types, self._virtual, len(self._devices))
        self._pace: PaceCalls | None = None  # compiled with the other calls
        self._activations = [dtype for dtype in types if dtype is not DType.INT8]

    def calls(self, on_stage: OnStage = lambda _: None) -> dict[str, Call]:
        """Everything, compiled."""
        mesh = _mesh(self._slice, self._devices)
        on_stage("compiling single products and collectives")
        calls = _product_calls(mesh, self._products, self._virtual)
        if mesh.size > 1:
            calls |= _collectives(self._slice, mesh, self._virtual)
        self._pace = PaceCalls(mesh, self._virtual)
        calls |= self._pace.calls
        on_stage("compiling steps of small models")
        for dtype in self._activations:
            calls |= prepare(self._slice, dtype)
        return calls

    def chip(self, timings: Mapping[str, Timing]) -> tuple[Chip, list[Probe]]:
        """The chip with rates from the times of these calls, and the steps among them."""
        slice_, devices = self._slice, self._devices
        if len(devices) > 1:
            bandwidth, collectives = _collective_rates(slice_, self._virtual, timings)
            slice_ = replace(slice_, chip=replace(slice_.chip, switch_bandwidth=bandwidth))
        else:
            collectives = ()
        rates = Rates(
            products=tuple((dtype.value, _curve(self._products, dtype, timings)) for dtype in self._types),
            memory=max(product.num_bytes / timings[name].seconds for name, product in self._products.items()),
            types=(),
            collectives=collectives,
            devices=len(devices),
            device_kind=devices[0].device_kind,
            date=datetime.date.today().isoformat(),
            jax=jax.__version__,
            error=0.0,
            spread=tuple((name, timing.spread) for name, timing in timings.items()),
            pace=self._pace.rates(timings, slice_.chip.clock) if self._pace else None,
        )
        timed: list[Probe] = []
        fitted: list[tuple[str, TypeRates]] = []
        errors: list[float] = []
        for dtype in self._activations:
            mine = [Probe(name, plan, bucket, timings[name]) for name, plan, bucket in declared(slice_, dtype)]
            of_type, wrong = fit(mine, slice_, rates)
            fitted.append((dtype.value, of_type))
            errors += [abs(error) for error in wrong]
            timed += mine
        return _as_measured(slice_.chip, replace(rates, types=tuple(fitted), error=statistics.median(errors))), timed


def _table_chip(devices: Sequence[jax.Device]) -> Chip:
    """The hardware table's chip, or a bare one for devices that it does not know."""
    kind = devices[0].device_kind
    try:
        return chip_of_kind(kind)
    except InvalidInput:
        limit = int((devices[0].memory_stats() or {}).get("bytes_limit", 1 << 33))
        name = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
        return Chip(
            name,
            devices[0].platform,
            hbm=limit,
            usable_hbm=limit,
            hbm_bandwidth=1.0,
            peak_bf16=1.0,
            peak_int8=1.0,
            host_bandwidth=1e10,
            dcn_bandwidth=1e9,
            source="",
            device_kinds=(kind.lower(),),
            node_size=len(devices),
            switch_bandwidth=1e9,
            provisional=True,
        )


def _mesh(slice_: Slice, devices: Sequence[jax.Device]) -> Mesh:
    placed = by_place(slice_, devices) if platform_named(devices[0].platform).coordinates else list(devices)
    return mesh_in_order(slice_, placed)


@dataclass(frozen=True)
class _Product:
    """Products to be timed: their rows, how many matrices they meet, and what one device computes and reads in a call."""

    weights: DType
    rows: int
    matrices: int
    flops: float
    num_bytes: float


def _products(types: Sequence[DType], virtual: bool, devices: int) -> dict[str, _Product]:
    outputs, inputs = _SIDES[virtual]
    found = {"reading memory": _Product(types[0], 0, 0, 0.0, float(_STREAM[virtual]))}
    for dtype in types:
        # Devices of a CPU share its caches.
        share = _STREAM[virtual] // (devices if virtual else 1)
        most = max(2, min(16, share // (inputs * outputs * dtype.num_bytes)))
        for rows in ROWS:
            count = most if rows <= _FEW_ROWS else 2
            size = count * inputs * outputs
            found[f"product of {rows} rows, {dtype}"] = _Product(dtype, rows, count, 2.0 * rows * size, float(size * dtype.num_bytes))
    return found


def _product_calls(mesh: Mesh, products: Mapping[str, _Product], virtual: bool) -> dict[str, Call]:
    outputs, inputs = _SIDES[virtual]
    most = {product.weights: max(p.matrices for p in products.values() if p.weights is product.weights) for product in products.values()}
    matrices = {dtype: weight_matrices(mesh, inputs, outputs, dtype, count) for dtype, count in most.items()}
    return {
        name: products_call(mesh, product.rows, inputs, matrices[product.weights][: product.matrices], product.weights)
        if product.rows
        else memory_call(mesh, int(product.num_bytes))
        for name, product in products.items()
    }


def _curve(products: Mapping[str, _Product], dtype: DType, timings: Mapping[str, Timing]) -> Curve:
    """FLOP/s of one device by rows."""
    mine = {name: product for name, product in products.items() if product.weights is dtype and product.rows}
    rates = tuple(product.flops / timings[name].seconds for name, product in mine.items())
    return Curve(tuple(float(product.rows) for product in mine.values()), rates)


def _groups(slice_: Slice) -> list[tuple[str, ...]]:
    """Axes that collectives are timed over: all, all but the first, and so on."""
    axes = [axis for axis, size in slice_.axis_sizes.items() if size > 1]
    return [tuple(axes[first:]) for first in range(len(axes))]


def _collectives(slice_: Slice, mesh: Mesh, virtual: bool) -> dict[str, Call]:
    groups = _groups(slice_)
    calls = {"no collective": collective_call(mesh, Op.ALL_REDUCE, groups[0], _SMALL, jnp.float32, 0)}
    for op, group, size in itertools.product(Op, groups, (_SMALL, _LARGE[virtual])):
        calls[_name(op, group, size)] = collective_call(mesh, op, group, size, jnp.float32, _CHAIN)
    return calls


def _collective_rates(slice_: Slice, virtual: bool, timings: Mapping[str, Timing]) -> tuple[float, tuple[CollectiveRate, ...]]:
    """Seconds and factors by kind and number of devices, and the bandwidth of a switch of which they are factors: that of an all-gather
    among all (or as it was, where there is none)."""
    network, found = Network(slice_), []
    low, high = _SMALL, _LARGE[virtual]
    for op, group in itertools.product(Op, _groups(slice_)):
        small, large = (
            max(timings[_name(op, group, size)].seconds - timings["no collective"].seconds, 0.0) / _CHAIN for size in (low, high)
        )
        moved = [network.transfer_seconds(op, group, size) for size in (low, high)]
        factor = max(large - small, 0.0) / (moved[1] - moved[0])
        ways = math.prod(slice_.axis_sizes[axis] for axis in group)
        found.append(CollectiveRate(op.value, ways, max(small - factor * moved[0], 0.0), factor))
    whole = next(rate.factor for rate in found if rate.op == Op.ALL_GATHER.value)
    if slice_.chip.torus_dims or not whole:
        return slice_.chip.switch_bandwidth, tuple(found)
    return slice_.chip.switch_bandwidth / whole, tuple(replace(rate, factor=rate.factor / whole) for rate in found)


def _name(op: Op, group: tuple[str, ...], size: int) -> str:
    return f"{op} over {'·'.join(group)}, {size} bytes"


def _as_measured(chip: Chip, rates: Rates) -> Chip:
    """The chip with its rates; a chip of which no maker states figures gets them from what was measured."""
    if not chip.provisional:
        return replace(chip, rates=rates)
    peaks = {name: max(curve.rates) * chip.devices_per_chip for name, curve in rates.products}
    wide = max(peak for name, peak in peaks.items() if name != DType.INT8)
    return replace(
        chip,
        hbm_bandwidth=rates.memory * chip.devices_per_chip,
        peak_bf16=wide,
        peak_int8=peaks.get(DType.INT8.value, wide),
        provisional=False,
        source=f"partinf calibrate, {rates.date}",
        rates=rates,
    )
