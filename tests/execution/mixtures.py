"""Routers and role assignments for experts' matrices, and one sublayer of a mixture run under them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.config import Activation, ModelConfig
from partinf.model.kinds import Experts, FeedForward, Kind
from partinf.model.weights import declare_layers
from partinf.partition.collectives import Split, move
from partinf.partition.quantize import quantize
from partinf.partition.sharding import WHOLE, device_mesh, sharding
from partinf.plans import Plan
from partinf.transformer import reference
from partinf.transformer.block import feed_forward
from partinf.transformer.experts import gather_experts
from partinf.transformer.linear import ENTERING, LEAVING, gather_weights
from partinf.transformer.params import activation_dtype
from partinf.transformer.routes import Routes
from partinf.workload import DType
from tests.core.test_experts import ROUTERS
from tests.execution.assignments import MESHES
from tests.execution.harness import MODEL, make_plan

_STORAGE = (("embed", False), ("embed", True), ("ffn", False), ("ffn", True), ("replica", False))  # role, gathered
_EXPERTS = ("expert", "ffn", "embed")
EACH = FeedForward(16, True, Activation.SILU, ())
CLAMPED = FeedForward(16, True, Activation.GELU_SIGMOID, ("w_in", "w_out"), clamp=0.5, up_offset=1.0)
MIXTURES = {
    "plain": Experts(8, 2, EACH, ROUTERS["plain"]),
    "not renormalised, shared with a gate": Experts(8, 3, EACH, ROUTERS["not renormalised"], shared=32, shared_gate=True),
    "of the chosen, with biases": Experts(8, 2, CLAMPED, ROUTERS["of the chosen"]),
    "in groups, shared": Experts(16, 4, EACH, ROUTERS["in groups"], shared=16),
    "by the greatest": Experts(8, 2, EACH, ROUTERS["by the greatest"]),
}
DENSE_FIRST: dict[str, Any] = {"kinds": (Kind("dense", experts=False), Kind("mixed")), "prefix": ("dense",), "pattern": ("mixed",)}
"""Of a model whose first layer has a feed-forward, next to `ffn_dim`."""
_UNKNOWN = 5  # the row that is no numbers


@dataclass(frozen=True)
class Mixed:
    """The roles of a mesh's axes, for dense matrices and for those of experts.

    Attributes:
        storage: (role, gathered) of dense matrices. experts: (role, gathered) of experts' matrices. mixture: of `MIXTURES`.
        whole: what passes between sublayers is whole, as far as it can be.
    """

    mesh: str
    storage: tuple[tuple[str, bool], ...]
    experts: tuple[tuple[str, bool], ...]
    mixture: str
    whole: bool
    dispatch: str = "gather"

    def layout(self) -> Layout:
        axes = "xyz"[: len(self.storage)]
        gather, gather_experts = (
            [axis for axis, (_, gathered) in zip(axes, roles, strict=True) if gathered] for roles in (self.storage, self.experts)
        )
        attention = {axis: "batch" if role == "replica" else "heads" for axis, (role, _) in zip(axes, self.storage, strict=True)}
        return make_layout(
            {axis: role for axis, (role, _) in zip(axes, self.storage, strict=True)},
            attention,
            decode_gather=gather,
            prefill_gather=gather,
            decode_gather_experts=gather_experts,
            prefill_gather_experts=gather_experts,
            decode_whole=self.whole,
            prefill_whole=self.whole,
            decode_dispatch=self.dispatch,
            prefill_dispatch=self.dispatch,
            experts={axis: role for axis, (role, _) in zip(axes, self.experts, strict=True)},
        )

    def __str__(self) -> str:
        pairs = zip(self.storage, self.experts, strict=True)
        roles = ",".join(f"{a}{'*' if b else ''}:{c}{'*' if d else ''}" for (a, b), (c, d) in pairs)
        return f"{self.mesh} {roles} {self.mixture} {self.dispatch}" + (" whole" if self.whole else "")


def _of_axis() -> list[tuple[tuple[str, bool], tuple[str, bool]]]:
    """Every pair of roles of an axis. Experts are gathered over axes alone that split tokens and experts."""
    found = []
    for role, gathered in _STORAGE:
        splits_tokens = gathered or role == "replica"
        found.append(((role, gathered), ("replica", False)))
        found += [((role, gathered), (each, brought)) for each in _EXPERTS for brought in ((False, True) if splits_tokens else (False,))]
    return found


@functools.cache
def all_mixed(three_axes: int = 1) -> tuple[Mixed, ...]:
    """Every assignment of both kinds of roles to the axes of small meshes, equal axes once, with both dispatches where they differ;
    mixtures and what passes between sublayers take turns.

    Args:
        three_axes: of the assignments to three axes every how many-th is taken; what two axes do to each other is there on two.
    """
    found: list[Mixed] = []
    for mesh, sizes in MESHES.items():
        every = itertools.product(_of_axis(), repeat=len(sizes))
        different = [one for one in every if len(set(sizes)) > 1 or list(one) == sorted(one)]
        for combination in different[:: three_axes if len(sizes) == 3 else 1]:
            storage, experts = zip(*combination, strict=True)
            for dispatch in ("gather", "exchange") if _exchanges(combination) else ("gather",):
                number = len(found)
                mixture = list(MIXTURES)[number % len(MIXTURES)]
                found.append(Mixed(mesh, storage, experts, mixture, number % 3 == 0, dispatch))
    return tuple(found)


def _exchanges(combination: tuple[tuple[tuple[str, bool], tuple[str, bool]], ...]) -> bool:
    """Whether an axis splits tokens and, when they are used, experts."""
    return any((role == "replica" or gathered) and of == ("expert", False) for (role, gathered), of in combination)


def sampled_mixed(count: int, seed: int) -> list[Mixed]:
    """Some of `all_mixed`, about as many per mesh and per mixture."""
    rng, everything = random.Random(seed), all_mixed()
    meshes, mixtures = list(MESHES), list(MIXTURES)

    def one(index: int) -> Mixed:
        mesh = meshes[index % len(meshes)]
        found = rng.choice([each for each in everything if each.mesh == mesh])
        return dataclasses.replace(found, mixture=mixtures[index % len(mixtures)])

    return [one(index) for index in range(count)]


def model_of(mixture: str, **other: Any) -> ModelConfig:
    return dataclasses.replace(MODEL, name=f"mixed {mixture}", ffn_dim=other.pop("ffn_dim", 0), experts=MIXTURES[mixture], **other)


def largest_errors(mixed: Mixed, dtype: DType = DType.F32) -> dict[str, float]:
    """One sublayer of 64 tokens, partitioned and by the reference: the largest difference of any output, by how tokens are routed."""
    model, (x, unknown) = model_of(mixed.mixture), _rows()
    plan = make_plan(mixed.mesh, mixed.layout(), model, dtype=dtype)
    routings = _routings(model)
    outputs = sublayer(plan)(_weights(model), [*routings.values(), routings["spread"]], np.stack([x] * len(routings) + [unknown]))
    found = dict(zip(routings, outputs, strict=False))
    assert np.isnan(outputs[-1][_UNKNOWN]).all()
    assert np.array_equal(np.delete(outputs[-1], _UNKNOWN, axis=0), np.delete(found["spread"], _UNKNOWN, axis=0))
    return {name: float(np.abs(out - wanted).max()) for (name, out), wanted in zip(found.items(), _wanted(model), strict=True)}


@functools.cache
def _weights(model: ModelConfig) -> dict[str, np.ndarray]:
    """Of one layer, without its attention."""
    rng, (group,) = np.random.default_rng(3), declare_layers(model)
    attention = ("wq", "wkv", "wo", "attention_norm")
    declared = {name: d for name, d in group.weights.items() if name not in attention}
    return {name: (rng.standard_normal(d.shape) * 64**-0.5 + (name == "ffn_norm")).astype(np.float32) for name, d in declared.items()}


def _rows() -> tuple[np.ndarray, np.ndarray]:
    """64 rows, and the same of which one is no numbers."""
    x = np.random.default_rng(5).standard_normal((64, MODEL.embed_dim)).astype(np.float32)
    unknown = x.copy()
    unknown[_UNKNOWN] = np.nan
    return x, unknown


@functools.cache
def _routings(model: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """What routes: it spreads tokens, sends most of them to few experts, and sends all to the first ones: equal scores."""
    weights = _weights(model)
    usual = {name: weights[name] for name in ("router", "router_bias", "router_correction") if name in weights}
    router = usual["router"]
    return {
        "spread": usual | {"router": 4 * router},
        "skewed": usual | {"router": (router * 8.0 ** -np.arange(len(router))[:, None]).astype(np.float32)},
        "one": {name: np.zeros_like(leaf) for name, leaf in usual.items()},
    }


@functools.cache
def _wanted(model: ModelConfig) -> list[np.ndarray]:
    """What the reference makes of the rows under each routing."""
    return [np.asarray(_reference(model, _weights(model) | routing, _rows()[0])) for routing in _routings(model).values()]


def _reference(model: ModelConfig, weights: dict[str, np.ndarray], x: np.ndarray) -> jax.Array:
    (kind,) = model.layer_kinds
    normed = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + kind.norm_eps) * weights["ffn_norm"]
    return x + reference.feed_forward(jax.tree.map(jnp.asarray, weights), kind, jnp.asarray(normed)[None])[0]


def sublayer(plan: Plan) -> Any:
    """(weights of one layer, what routes in each case, x [case, T, E]) → what the sublayer makes of them, in float32, on the plan's mesh;
    one program runs all cases."""
    mesh, routes, dtype = device_mesh(plan), Routes(plan, plan.buckets[0]), activation_dtype(plan)
    (group,), (kind,) = declare_layers(plan.model), plan.model.layer_kinds
    frame = routes.frame(routes.experts.rows, routes.weight_stored)
    split = Split(routes.tokens, routes.between)

    def local(weights: dict[str, Any], routing: dict[str, Any], x: jax.Array) -> jax.Array:
        weights = {**weights, **gather_weights(weights, ENTERING + LEAVING, routes), **gather_experts(weights, routes)}

        def case(of: tuple[dict[str, Any], jax.Array]) -> jax.Array:
            out = feed_forward({**weights, **of[0]}, move(of[1].astype(dtype), frame, Split(), split), kind, routes)
            return move(out.astype(jnp.float32), frame, split, Split())

        return lax.map(case, (routing, x))

    def place(name: str, leaf: np.ndarray) -> Any:
        declared = group.weights[name]
        letters = sharding(plan, mesh, declared.letters)
        if not declared.quantized(plan.weights):
            return jax.device_put(leaf.astype(np.float32 if declared.wide else dtype), letters)
        found = quantize(leaf, declared.contracted)
        scale = jax.device_put(found.scale, sharding(plan, mesh, declared.scale_letters()))
        return dataclasses.replace(found, values=jax.device_put(found.values, letters), scale=scale)

    def run(weights: dict[str, np.ndarray], routings: list[dict[str, np.ndarray]], x: np.ndarray) -> np.ndarray:
        placed = {name: place(name, leaf) for name, leaf in weights.items() if name not in routings[0]}
        routing = {name: np.stack([each[name] for each in routings]) for name in routings[0]}
        routing = {name: leaf.astype(np.float32 if group.weights[name].wide else dtype) for name, leaf in routing.items()}
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, placed)
        program = jax.shard_map(local, mesh=mesh, in_specs=(specs, WHOLE, WHOLE), out_specs=WHOLE, check_vma=False)
        return np.asarray(jax.jit(program)(placed, routing, x))

    return run
