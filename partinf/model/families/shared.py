"""What several families' declarations are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from partinf.model.config import Activation
from partinf.model.family import Naming, Pick, Size, Stored
from partinf.model.kinds import QkNorm

_ACTIVATIONS = {
    Activation.SILU: ("silu", "swish"),
    Activation.GELU: ("gelu",),
    Activation.GELU_TANH: ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    Activation.RELU: ("relu",),
    Activation.RELU2: ("relu2",),
}
ALL_BIASES = ("wq", "wkv", "wo", "w_in", "w_out")


def activation(key: str, absent: str, **other: Activation) -> Pick:
    """The activation of the feed-forward; `other` says what a name means in this family alone."""
    names = {name: one for one, names in _ACTIVATIONS.items() for name in names} | other
    return Pick(key, absent, tuple((name, {"activation": one}) for name, one in names.items()))


def sizes(defaults: Mapping[str, int | None] = {}, **keys: str) -> dict[str, Size]:
    """Sizes under the names that Llama gave them, or under others. A size without a default must be there.

    Args:
        defaults: field → what a missing key means. Key-value heads and the size of a head follow from the others without one.
        keys: field → its key where it is not Llama's.
    """
    names = {
        "num_layers": "num_hidden_layers",
        "embed_dim": "hidden_size",
        "ffn_dim": "intermediate_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "vocab_size": "vocab_size",
        "max_len": "max_position_embeddings",
    } | keys
    follows = ("num_kv_heads", "head_dim")
    return {field: Size(key, defaults.get(field), field in follows) for field, key in names.items() if key}


def without(found: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The same without some entries."""
    return {name: value for name, value in found.items() if name not in names}


# Weights of all the blocks that have Llama's names; a model has some of them.
LLAMA_LAYER: Mapping[str, Stored] = {
    "attention_norm": Stored("E", ("input_layernorm.weight",)),
    "attention_norm_bias": Stored("E", ("input_layernorm.bias",)),
    "wq": Stored("HQ E", ("self_attn.q_proj.weight",)),
    "bq": Stored("HQ", ("self_attn.q_proj.bias",)),
    "wkv": Stored("KQ E", ("self_attn.k_proj.weight", "self_attn.v_proj.weight")),
    "bkv": Stored("KQ", ("self_attn.k_proj.bias", "self_attn.v_proj.bias")),
    "q_norm": Stored("Q", ("self_attn.q_norm.weight",)),
    "k_norm": Stored("Q", ("self_attn.k_norm.weight",)),
    "wo": Stored("E (HQ)", ("self_attn.o_proj.weight",)),
    "bo": Stored("E", ("self_attn.o_proj.bias",)),
    "ffn_norm": Stored("E", ("post_attention_layernorm.weight",)),
    "ffn_norm_bias": Stored("E", ("post_attention_layernorm.bias",)),
    "w_in": Stored("F E", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "b_in": Stored("F", ("mlp.gate_proj.bias", "mlp.up_proj.bias")),
    "w_out": Stored("E F", ("mlp.down_proj.weight",)),
    "b_out": Stored("E", ("mlp.down_proj.bias",)),
}
LLAMA_MODEL: Mapping[str, Stored] = {
    "embed": Stored("V E", ("{base}embed_tokens.weight",)),
    "final_norm": Stored("E", ("{base}norm.weight",)),
    "final_norm_bias": Stored("E", ("{base}norm.bias",)),
    "unembed": Stored("V E", ("{head}lm_head.weight",)),
    "unembed_bias": Stored("V", ("{head}lm_head.bias",)),
}
# A feed-forward without a gate.
UNGATED: Mapping[str, Stored] = {
    "w_in": Stored("1F E", ("mlp.up_proj.weight",)),
    "b_in": Stored("1F", ("mlp.up_proj.bias",)),
}
# Norms of what sublayers add, and norms before them where those have other names.
AFTER: Mapping[str, Stored] = {
    "attention_post_norm": Stored("E", ("post_attention_layernorm.weight",)),
    "ffn_norm": Stored("E", ("pre_feedforward_layernorm.weight",)),
    "ffn_post_norm": Stored("E", ("post_feedforward_layernorm.weight",)),
}
GATE_UP: Mapping[str, Stored] = {"w_in": Stored("F E", ("mlp.gate_up_proj.weight",) * 2, fused=("F", "F"), part=(0, 1))}
QK_WIDTH: Mapping[str, Stored] = {
    "q_norm": Stored("HQ", ("self_attn.q_norm.weight",)),
    "k_norm": Stored("KQ", ("self_attn.k_norm.weight",)),
}
QK_HEADS: Mapping[str, Stored] = {
    "q_norm": Stored("H Q", ("self_attn.q_norm.weight",)),
    "k_norm": Stored("K Q", ("self_attn.k_norm.weight",)),
}
NEIGHBOURS = frozenset({"wq", "bq", "wkv", "bkv"})


def heads_norm(key: str) -> Pick:
    """A flag that gives every head of queries and keys a norm of its own."""
    return Pick(key, False, ((False, {"qk_norm": QkNorm.NONE}), (True, {"qk_norm": QkNorm.HEADS})))


def llama_naming(*layers: Mapping[str, Stored], **fields: Any) -> Naming:
    """Llama's names, with those of `layers` instead of or besides them."""
    named: dict[str, Stored] = {}
    for one in (LLAMA_LAYER, *layers):
        named |= one
    return Naming(
        bases=fields.pop("bases", ("model.", "")),  # models of embeddings have been published without their beginning
        layer="{base}layers.{layer}.",
        layer_weights=named,
        model_weights=LLAMA_MODEL | fields.pop("model_weights", {}),
        buffers=("rotary_emb.inv_freq",),
        **fields,
    )


def fused(weight: str, bias: str, parts: tuple[str, ...], per: str = "", transposed: bool = False) -> dict[str, Stored]:
    """Queries, keys and values in one tensor."""
    how: dict[str, Any] = {"fused": parts, "per": per, "transposed": transposed}
    plain = how | {"transposed": False}
    return {
        "wq": Stored("HQ E", (weight,), part=(0,), **how),
        "bq": Stored("HQ", (bias,), part=(0,), **plain),
        "wkv": Stored("KQ E", (weight,) * 2, part=(1, 2), **how),
        "bkv": Stored("KQ", (bias,) * 2, part=(1, 2), **plain),
    }


ONE_AFTER_THE_OTHER = ("HQ", "KQ", "KQ")
"""Queries, keys and values of all heads."""
EVERY_HEAD = ("Q", "Q", "Q")
"""Query, key and value of each head."""
EVERY_GROUP = ("GQ", "Q", "Q")
"""The queries that share a key and value, that key, and that value."""
