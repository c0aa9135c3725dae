"""Role assignments of small meshes, one representative per class of axes that may be exchanged; and the model families."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.config import MATRICES, Activation, Block, ModelConfig, Norm, Position
from partinf.model.hf_config import config_from_hf
from partinf.model.kinds import Kind, NormPlaces, QkNorm
from partinf.model.rotation import Linear, Rotation

MESHES = {"8": (8,), "4x2": (4, 2), "2x4": (2, 4), "2x2x2": (2, 2, 2)}
_STORAGE = (("embed", False), ("embed", True), ("ffn", False), ("ffn", True), ("replica", False))  # role, gathered in this FFN phase
_ATTENTION = ("heads", "batch", "sequence", "none")
_KV_HEADS = (8, 2, 1)
_RINGS = (None, None, "one-way", "halves", "both-ways")


# What distinguishes the model families from Llama, as fields of ModelConfig.
FAMILIES: dict[str, dict[str, Any]] = {
    "palm": {"block": Block.PARALLEL, "num_kv_heads": 1},
    "gpt": {
        "gated": False,
        "activation": Activation.GELU_TANH,
        "norm": Norm.LAYER,
        "position": Position.LEARNED,
        "biases": MATRICES,
        "num_kv_heads": 8,
    },
    "opt": {
        "gated": False,
        "activation": Activation.RELU,
        "norm": Norm.LAYER,
        "position": Position.LEARNED,
        "biases": MATRICES,
        "tied_embeddings": False,
    },
    "gelu": {"gated": False, "activation": Activation.GELU, "block": Block.PARALLEL, "biases": ("wq", "wkv", "w_out")},
    "qwen3": {"qk_norm": QkNorm.HEAD, "num_kv_heads": 4},
}


# Models that combine what newer families changed, each many things at once: between them they have every feature of a layer.
LOCAL_AND_GLOBAL = {
    "norm": Norm.RMS_1P,
    "norms": NormPlaces.BOTH,
    "activation": Activation.GELU_TANH,
    "qk_norm": QkNorm.HEAD,
    "embedding_scale": 8.0,
    "attention_scale": 0.5,
    "attention_cap": 2.0,
    "logit_cap": 1.5,
    "kinds": (Kind("local", 3, Rotation(100.0)), Kind("global", 0, Rotation(1e6, scaling=Linear(8.0)))),
    "pattern": ("local", "global"),
}
BLOCKS: dict[str, dict[str, Any]] = {
    "local and global": LOCAL_AND_GLOBAL,
    "norms after, three kinds": {
        "num_layers": 6,
        "norms": NormPlaces.AFTER,
        "qk_norm": QkNorm.WIDTH,
        "biases": ("wq", "wkv"),
        "residual_scale": 0.5,
        "logit_scale": 0.25,
        "kinds": (Kind("first", 7), Kind("local", 4, Rotation()), Kind("everywhere", 0)),
        "prefix": ("first",),
        "pattern": ("local", "everywhere"),
    },
    "parallel, one norm": {
        "block": Block.PARALLEL,
        "norm": Norm.LAYER_NO_BIAS,
        "qk_norm": QkNorm.HEADS,
        "qk_norm_rotated": True,
        "rotation": Rotation(dims=4),
        "window": 5,
    },
    "parallel, two norms": {
        "block": Block.PARALLEL_TWO_NORMS,
        "norm": Norm.LAYER,
        "gated": False,
        "activation": Activation.GELU,
        "biases": MATRICES,
        "rotation": Rotation(dims=2),
        "tied_embeddings": False,
        "output_bias": True,
        "sinks": True,
        "window": 6,
    },
    "1 + w with bias": {
        "norm": Norm.LAYER_1P,
        "gated": False,
        "activation": Activation.RELU2,
        "qkv_clip": 0.5,
        "qk_norm": QkNorm.HEAD,
        "qk_norm_bias": True,
        "biases": ("wo", "w_out"),
        "sinks": True,
    },
    "norms without weights": {"norm": Norm.LAYER_BARE, "norms": NormPlaces.BOTH, "qk_norm": QkNorm.WIDTH},
    "norms of sums, growing queries": {
        "norm": Norm.LAYER,
        "norms": NormPlaces.SUM,
        "final_norm": False,
        "rotation": Rotation(query_growth=0.5, growth_every=3),
    },
}


# The three families that are least like each other, as their files describe them: every key that changes a block is here.
_LEAST_ALIKE: dict[str, dict[str, Any]] = {
    "gemma3_text": {  # windows of one kind, two rotations, four norms of 1 + w, norms of heads, both caps
        "sliding_window": 3,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gpt_neox": {"rotary_pct": 0.25},  # parallel with two LayerNorms, biases everywhere, a part of a head rotated, no gate, untied
    "olmo2": {},  # norms of what sublayers add, one norm over the width of all heads
}
LEAST_ALIKE = tuple(_LEAST_ALIKE)


def least_alike(family: str, kv_heads: int, head_dim: int) -> ModelConfig:
    """One of `LEAST_ALIKE`, with one layer of each kind, twice where it has one kind."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 250}
    model = config_from_hf({"model_type": family, "max_position_embeddings": 64} | sizes | _LEAST_ALIKE[family], family)
    return replace(model, num_kv_heads=kv_heads, head_dim=head_dim)


@dataclass(frozen=True)
class Assignment:
    """FFN roles with gathers, and decode's and prefill's attention roles, for the axes of a mesh.

    Attributes:
        kv_heads: of the model's eight heads. ring: how collectives are looped around an axis that splits d_ff, where there is one; None
            for plain collectives. head_dim: 16 fits the kernels that CPUs have for attention, 8 goes tile by tile as on other chips.
    """

    mesh: str
    storage: tuple[tuple[str, bool], ...]
    decode: tuple[str, ...]
    prefill: tuple[str, ...]
    kv_heads: int = 2
    ring: str | None = None
    head_dim: int = 8

    def layout(self, plain: bool = False) -> Layout:
        """`plain`: without the loop."""
        axes = "xyz"[: len(self.storage)]
        gather = [axis for axis, (_, gathered) in zip(axes, self.storage, strict=True) if gathered]
        around = next((axis for axis, kept in zip(axes, self.storage, strict=True) if kept == ("ffn", False)), None)
        loop = {"axis": around, "ring": self.ring} if self.ring and around and not plain else None
        return make_layout(
            {axis: role for axis, (role, _) in zip(axes, self.storage, strict=True)},
            dict(zip(axes, self.decode, strict=True)),
            dict(zip(axes, self.prefill, strict=True)),
            decode_gather=gather,
            prefill_gather=gather,
            decode_loop=loop,
        )

    @property
    def splits_context(self) -> bool:
        return "sequence" in self.decode + self.prefill

    def __str__(self) -> str:
        def axis(index: int) -> str:
            role, gathered = self.storage[index]
            return f"{role}{'*' if gathered else ''}:{self.decode[index]}/{self.prefill[index]}"

        how = f" kv{self.kv_heads} d{self.head_dim}" + (f" {self.ring}" if self.ring else "")
        return f"{self.mesh} " + ",".join(axis(index) for index in range(len(self.storage))) + how


def all_assignments() -> list[Assignment]:
    """Every FFN role, gather and decode attention role of every axis, equal axes once; the rest is drawn for each (seeded): prefill's
    attention roles, how many key-value heads there are (MHA, GQA, MQA), and whether collectives are looped. Every second one attends by
    the kernels of CPUs.

    On one axis prefill's roles are enumerated too. There is no order among axes of one size: exchanging them exchanges the devices. On
    three axes, which have 860 assignments that split the context in decode, every fourth of these is taken: what the role does next to one
    other axis of any role is there on two axes, in either order and size.
    """
    rng = random.Random(0)
    found = []
    for mesh, sizes in MESHES.items():
        per_axis = list(itertools.product(_STORAGE, _ATTENTION))
        split_contexts = 0
        for combination in itertools.product(per_axis, repeat=len(sizes)):
            if len(set(sizes)) == 1 and list(combination) != sorted(combination):
                continue
            storage, decode = zip(*combination, strict=True)
            if len(sizes) == 3 and "sequence" in decode:
                split_contexts += 1
                if split_contexts % 4:
                    continue
            choices = itertools.product(_ATTENTION, repeat=len(sizes)) if len(sizes) == 1 else [rng.choices(_ATTENTION, k=len(sizes))]
            for prefill in choices:
                kv_heads, ring = rng.choice(_KV_HEADS), rng.choice(_RINGS)
                found.append(Assignment(mesh, storage, decode, tuple(prefill), kv_heads, ring, (8, 16)[len(found) % 2]))
    return found


def assignments_of(family: str) -> list[Assignment]:
    """Every assignment once for one of `LEAST_ALIKE`: FFN role, gather and decode attention role of every axis.

    On one axis with every role in prefill; on two axes with every pair of assignments, the order of their sizes 4 and 2 drawn; on three
    axes of size 2, where two that are assigned alike would be the one axis of size 4 again, every three that differ in one of the
    families, which take turns. Prefill's attention roles, key-value heads and loops are drawn (seeded), the first axis aside. Every eighth
    attends tile by tile, the others by the kernels of CPUs.
    """
    number = LEAST_ALIKE.index(family)
    rng, per_axis = random.Random(number), list(itertools.product(_STORAGE, _ATTENTION))
    pairs = [tuple(rng.sample(pair, 2)) for pair in itertools.combinations_with_replacement(per_axis, 2)]
    threes = list(itertools.combinations(per_axis, 3))[number :: len(LEAST_ALIKE)]
    wanted = [("8", (one,), (prefill,)) for one in per_axis for prefill in _ATTENTION]
    wanted += [("4x2", pair, tuple(rng.choices(_ATTENTION, k=2))) for pair in pairs]
    wanted += [("2x2x2", three, tuple(rng.choices(_ATTENTION, k=3))) for three in threes]
    found = []
    for mesh, combination, prefill in wanted:
        storage, decode = zip(*combination, strict=True)
        kv_heads, ring = 8 if family == "gpt_neox" else rng.choice(_KV_HEADS), rng.choice((None, *_RINGS))
        found.append(Assignment(mesh, storage, decode, prefill, kv_heads, ring, 16 if len(found) % 8 else 8))
    return found


def sampled_assignments(count: int, seed: int) -> list[Assignment]:
    """Some of `all_assignments`, the same ones for the same seed, about equally many per mesh, every second one splitting the context."""
    rng, everything = random.Random(seed), all_assignments()
    meshes = list(MESHES)

    def one(index: int) -> Assignment:
        mesh, splits = meshes[index % len(meshes)], index // len(meshes) % 2 == 0
        return rng.choice([each for each in everything if each.mesh == mesh and each.splits_context == splits])

    return [one(index) for index in range(count)]
