"""Role assignments of small meshes, one representative per class of axes that may be exchanged; and the model families."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

from partinf.layout import Layout, make_layout
from partinf.model_config import Activation, Block, Norm, Position

MESHES = {"8": (8,), "4x2": (4, 2), "2x4": (2, 4), "2x2x2": (2, 2, 2)}
_STORAGE = (("embed", False), ("embed", True), ("ffn", False), ("ffn", True), ("replica", False))  # role, gathered in this FFN phase
_ATTENTION = ("heads", "batch", "sequence", "none")


# What distinguishes the model families from Llama, as fields of ModelConfig.
FAMILIES: dict[str, dict[str, Any]] = {
    "palm": {"block": Block.PARALLEL, "num_kv_heads": 1},
    "gpt": {
        "gated": False,
        "activation": Activation.GELU_TANH,
        "norm": Norm.LAYER,
        "position": Position.LEARNED,
        "biases": True,
        "num_kv_heads": 8,
    },
    "opt": {
        "gated": False,
        "activation": Activation.RELU,
        "norm": Norm.LAYER,
        "position": Position.LEARNED,
        "biases": True,
        "tied_embeddings": False,
    },
    "gelu": {"gated": False, "activation": Activation.GELU, "block": Block.PARALLEL, "biases": True},
    "qwen3": {"qk_norm": True, "num_kv_heads": 4},
}


@dataclass(frozen=True)
class Assignment:
    """FFN roles with gathers, and decode's and prefill's attention roles, for the axes of a mesh."""

    mesh: str
    storage: tuple[tuple[str, bool], ...]
    decode: tuple[str, ...]
    prefill: tuple[str, ...]

    def layout(self) -> Layout:
        axes = "xyz"[: len(self.storage)]
        gather = [axis for axis, (_, gathered) in zip(axes, self.storage, strict=True) if gathered]
        return make_layout(
            {axis: role for axis, (role, _) in zip(axes, self.storage, strict=True)},
            dict(zip(axes, self.decode, strict=True)),
            dict(zip(axes, self.prefill, strict=True)),
            decode_gather=gather,
            prefill_gather=gather,
        )

    def __str__(self) -> str:
        def axis(index: int) -> str:
            role, gathered = self.storage[index]
            return f"{role}{'*' if gathered else ''}:{self.decode[index]}/{self.prefill[index]}"

        return f"{self.mesh} " + ",".join(axis(index) for index in range(len(self.storage)))


def all_assignments() -> list[Assignment]:
    """Every FFN role, gather and decode attention role of every axis, equal axes once; prefill's attention roles are drawn (seeded).

    On one axis prefill's roles are enumerated too. There is no order among axes of one size: exchanging them exchanges the devices.
    """
    rng = random.Random(0)
    found = []
    for mesh, sizes in MESHES.items():
        per_axis = list(itertools.product(_STORAGE, _ATTENTION))
        for combination in itertools.product(per_axis, repeat=len(sizes)):
            if len(set(sizes)) == 1 and list(combination) != sorted(combination):
                continue
            storage, decode = zip(*combination, strict=True)
            choices = itertools.product(_ATTENTION, repeat=len(sizes)) if len(sizes) == 1 else [rng.choices(_ATTENTION, k=len(sizes))]
            found += [Assignment(mesh, storage, decode, tuple(prefill)) for prefill in choices]
    return found


def sampled_assignments(count: int, seed: int) -> list[Assignment]:
    """Some of `all_assignments`, the same ones for the same seed, about equally many per mesh."""
    rng, everything = random.Random(seed), all_assignments()
    meshes = list(MESHES)
    return [rng.choice([one for one in everything if one.mesh == meshes[index % len(meshes)]]) for index in range(count)]
