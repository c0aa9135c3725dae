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
_MORE: dict[str, dict[str, Any]] = {"gptj": {"rotary_dim": 4}}


def small_file(family: Family) -> dict[str, Any]:
    data = {"model_type": family.model_type} | {size.key: _SIZES[field] for field, size in family.sizes.items()}
    return data | _MORE.get(family.model_type, {})
