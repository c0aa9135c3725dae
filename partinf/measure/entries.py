"""The entries of a step's ledger timed alone, at the very shapes that the plan gives them on one device.

Products and collectives run by themselves, one after another of their kind. A core of attention has a form of its own on every platform,
so it is timed as what it adds to a step: a model of nothing but such cores, with more layers and with fewer. What is neither (the passes
over memory between products, and dispatch) has no call of its own, and is what the step takes beyond the sum.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh

from partinf.cost.items import DECODE, What
from partinf.cost.ledger import Entry, EntryKind
from partinf.foundation.rounding import ceil_div
from partinf.layout.files import make_layout
from partinf.measure.collectives import collective_call
from partinf.measure.products import product_call
from partinf.measure.steps import Steps, for_buckets
from partinf.measure.timing import Call, Timing
from partinf.model.config import ModelConfig
from partinf.partition.sharding import device_mesh
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.workload import DType

_CHAIN = 4  # of one entry in a call
_LAYERS = (1, 3)
_TYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "int32": jnp.int32, "int8": jnp.int8}


@dataclass(frozen=True)
class Alone:
    """How an entry is timed: it takes what `more` takes beyond `less`, over `count`."""

    more: str
    less: str
    count: int

    def seconds(self, timings: dict[str, Timing]) -> float:
        """Time of one occurrence, at least 0."""
        return max(timings[self.more].seconds - timings[self.less].seconds, 0.0) / self.count


class Entries:
    """Calls that time the entries of several ledgers of one plan; entries of equal shape share theirs.

    Attributes:
        calls: for `partinf.measure.timing.alternate`.
    """

    def __init__(self, plan: Plan) -> None:
        self.calls: dict[str, Call] = {}
        self._plan = plan
        self._mesh: Mesh = device_mesh(plan)
        self._found: dict[Hashable, Alone] = {}

    def add(self, entries: Iterable[Entry]) -> None:
        """Prepare (compile) what these entries need."""
        for entry in entries:
            key = _key(entry)
            if key is not None and key not in self._found:
                self._found[key] = self._prepare(entry)

    def of(self, entry: Entry) -> Alone | None:
        """How this entry is timed; None for one that has no call of its own."""
        key = _key(entry)
        return None if key is None else self._found[key]

    def _prepare(self, entry: Entry) -> Alone:
        if entry.kind is EntryKind.COLLECTIVE:
            return self._collective(entry)
        return self._core(entry) if entry.kind is EntryKind.ATTENTION else self._product(entry)

    def _collective(self, entry: Entry) -> Alone:
        assert entry.op is not None
        name = f"{entry.op} over {'·'.join(entry.axes)}, {entry.bytes} bytes, {entry.dtype}"
        nothing = f"no {entry.op} of {entry.bytes} bytes, {entry.dtype}"
        for label, count in ((name, _CHAIN), (nothing, 0)):
            self.calls[label] = collective_call(self._mesh, entry.op, entry.axes, entry.bytes, _TYPES[entry.dtype], count)
        return Alone(name, nothing, _CHAIN)

    def _product(self, entry: Entry) -> Alone:
        rows, inputs, outputs = entry.shape
        # Tables (of logits) are never quantised.
        quantised = entry.item.what is What.PRODUCT
        weights = self._plan.weights if quantised or self._plan.weights is not DType.INT8 else DType.BF16
        name = f"product of {rows} rows, {inputs} → {outputs}, {weights}"
        one = f"{name}, once"
        for label, count in ((name, _CHAIN + 1), (one, 1)):
            self.calls[label] = product_call(self._mesh, rows, inputs, outputs, weights, count)
        return Alone(name, one, _CHAIN)

    def _core(self, entry: Entry) -> Alone:
        sequences, tokens, heads, kv_heads, cached = entry.shape
        plan, size, devices = self._plan, self._plan.cache.page_size, self._mesh.size
        pages = ceil_div(cached, size)
        decode, prefill = Bucket(devices, 1), Bucket(prefill_tokens=devices, prefill_slots=devices)
        if entry.item == DECODE.core:
            bucket = decode = Bucket(devices * sequences, pages)
        else:
            bucket = prefill = Bucket(prefill_tokens=devices * tokens, prefill_slots=devices * sequences, prefill_pages=pages)
        axes = tuple(plan.axis_sizes)
        layout = make_layout(dict.fromkeys(axes, "replica"), dict.fromkeys(axes, "batch"))
        weights = plan.weights.activations
        name = f"{entry.name}: {sequences} sequences, {tokens} tokens, {heads} heads, {kv_heads} kv heads, {cached} in the cache"
        for layers in _LAYERS:
            model = ModelConfig("cores", layers, 64, 64, heads, kv_heads, plan.model.head_dim, 256, tied_embeddings=True, max_len=1 << 20)
            cores = Plan(model, plan.slice, layout, weights=weights, kv=plan.kv, cache=CacheConfig(size))
            self.calls[f"{name}, {layers} layers"] = Steps(for_buckets(cores, (decode, prefill))).call(bucket)
        return Alone(f"{name}, {_LAYERS[1]} layers", f"{name}, {_LAYERS[0]} layers", _LAYERS[1] - _LAYERS[0])


def _key(entry: Entry) -> Hashable | None:
    if entry.kind is EntryKind.COLLECTIVE:
        return (entry.op, entry.axes, entry.bytes, entry.dtype)
    if entry.kind is EntryKind.MEMORY or not entry.shape:
        return None
    return (entry.kind, entry.item.what is What.PRODUCT, entry.item if entry.kind is EntryKind.ATTENTION else None, entry.shape)
