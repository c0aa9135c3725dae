"""A small `config.json` of every family, in the keys that its declaration names."""

from __future__ import annotations

from typing import Any

from partinf.model.family import Family

_SIZES = {
    "num_layers": 4,
    "embed_dim": 64,
    "ffn_dim": 96,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 8,
    "vocab_size": 96,
    "max_len": 64,
}
_MORE: dict[str, dict[str, Any]] = {"gptj": {"rotary_dim": 4}, "codegen": {"rotary_dim": 4}}


def small_file(family: Family) -> dict[str, Any]:
    data = {"model_type": family.model_type} | {size.key: _SIZES[field] for field, size in family.sizes.items() if field in _SIZES}
    if family.mixture is not None:
        of = family.mixture
        data |= {of.count[0][0]: 4, of.per_token[0]: 2, of.width[0]: 24}
        data |= {of.shared[0]: 1 if of.shared_experts else 40} if of.shared[0] else {}
        data |= {of.groups[0]: 2} if of.groups[0] else {}
    return data | _MORE.get(family.model_type, {})
