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
"""Of a model whose first layer has a feed-forward, beside `ffn_dim`."""


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
def all_mixed() -> tuple[Mixed, ...]:
    """Every assignment of both kinds of roles to the axes of small meshes, equal axes once; mixtures, what passes between sublayers and
    how rows reach their experts take turns. On three axes every ninth of 4495 is taken: what two do to each other is there on two."""
    found, mixtures = [], itertools.cycle(MIXTURES)
    for mesh, sizes in MESHES.items():
        every = itertools.product(_of_axis(), repeat=len(sizes))
        different = [one for one in every if len(set(sizes)) > 1 or list(one) == sorted(one)]
        for combination in different[:: 9 if len(sizes) == 3 else 1]:
            storage, experts = zip(*combination, strict=True)
            number = len(found)
            found.append(Mixed(mesh, storage, experts, next(mixtures), number % 3 == 0, ("gather", "exchange")[number % 2]))
    return tuple(found)


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
    model = model_of(mixed.mixture)
    plan = make_plan(mixed.mesh, mixed.layout(), model, dtype=dtype)
    weights, x = _weights(model), np.random.default_rng(5).standard_normal((64, model.embed_dim)).astype(np.float32)
    run, found = sublayer(plan), {}
    for name, each in _routings(weights).items():
        wanted = np.asarray(_reference(model, each, x))
        found[name] = float(np.abs(run(each, x) - wanted).max())
    unknown = x.copy()
    unknown[5] = np.nan
    got = run(weights, unknown)
    assert np.isnan(got[5]).all()
    assert np.array_equal(np.delete(got, 5, axis=0), np.delete(run(weights, x), 5, axis=0))
    return found


@functools.cache
def _weights(model: ModelConfig) -> dict[str, np.ndarray]:
    """Of one layer, without its attention."""
    rng, (group,) = np.random.default_rng(3), declare_layers(model)
    attention = ("wq", "wkv", "wo", "attention_norm")
    declared = {name: d for name, d in group.weights.items() if name not in attention}
    return {name: (rng.standard_normal(d.shape) * 64**-0.5 + (name == "ffn_norm")).astype(np.float32) for name, d in declared.items()}


def _routings(weights: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Weights whose routers spread tokens, send most of them to few experts, and send all to the first ones: equal scores."""
    router = weights["router"]
    zeros = {name: np.zeros_like(weights[name]) for name in ("router", "router_bias", "router_correction") if name in weights}
    return {
        "spread": {**weights, "router": 4 * router},
        "skewed": {**weights, "router": router * 8.0 ** -np.arange(len(router))[:, None]},
        "one": weights | zeros,
    }


def _reference(model: ModelConfig, weights: dict[str, np.ndarray], x: np.ndarray) -> jax.Array:
    (kind,) = model.layer_kinds
    normed = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + kind.norm_eps) * weights["ffn_norm"]
    return x + reference.feed_forward(jax.tree.map(jnp.asarray, weights), kind, jnp.asarray(normed)[None])[0]


def sublayer(plan: Plan) -> Any:
    """(weights of one layer, x [T, E]) → what the sublayer makes of them, in float32, on the plan's mesh."""
    mesh, routes, dtype = device_mesh(plan), Routes(plan, plan.buckets[0]), activation_dtype(plan)
    (group,), (kind,) = declare_layers(plan.model), plan.model.layer_kinds
    frame = routes.frame(routes.experts.rows, routes.weight_stored)
    split = Split(routes.tokens, routes.between)

    def local(weights: dict[str, Any], x: jax.Array) -> jax.Array:
        weights = {**weights, **gather_weights(weights, ENTERING + LEAVING, routes), **gather_experts(weights, routes)}
        out = feed_forward(weights, move(x.astype(dtype), frame, Split(), split), kind, routes)
        return move(out.astype(jnp.float32), frame, split, Split())

    placed = {}

    def place(weights: dict[str, np.ndarray]) -> dict[str, Any]:
        for name, leaf in weights.items():
            declared = group.weights[name]
            letters = sharding(plan, mesh, declared.letters)
            if declared.quantized(plan.weights):
                found = quantize(leaf, declared.contracted)
                scale = jax.device_put(found.scale, sharding(plan, mesh, declared.scale_letters()))
                placed[name] = dataclasses.replace(found, values=jax.device_put(found.values, letters), scale=scale)
            else:
                placed[name] = jax.device_put(leaf.astype(np.float32 if declared.wide else dtype), letters)
        return placed

    @functools.cache
    def compiled(tree: Any) -> Any:
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, placed)
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs, WHOLE), out_specs=WHOLE, check_vma=False))

    def run(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        arguments = place(weights)
        return np.asarray(compiled(jax.tree.structure(arguments))(arguments, x))

    return run
