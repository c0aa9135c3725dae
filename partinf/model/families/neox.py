"""GPT-NeoX and what is built like it: both sublayers on one input, rotations of a part of a head, tensors called dense_h_to_4h."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from partinf.model.config import Block, ModelConfig, Norm
from partinf.model.families.harmless import keys
from partinf.model.families.llama import ATTENTION, FEED_FORWARD, LLAMA
from partinf.model.families.shared import (
    ALL_BIASES,
    EVERY_GROUP,
    EVERY_HEAD,
    activation,
    fused,
    llama_naming,
    sizes,
    without,
)  # fmt: skip
from partinf.model.family import Bias, Family, Naming, Pick, Size, Stored
from partinf.model.hf_rope import Rope
from partinf.model.kinds import QkNorm

_PARALLEL = {"gated": False, "norm": Norm.LAYER, "block": Block.PARALLEL}
_NEOX_LAYER = {
    "attention_norm": Stored("E", ("input_layernorm.weight",)),
    "attention_norm_bias": Stored("E", ("input_layernorm.bias",)),
    **fused("attention.query_key_value.weight", "attention.query_key_value.bias", EVERY_HEAD, "H"),
    "wo": Stored("E (HQ)", ("attention.dense.weight",)),
    "bo": Stored("E", ("attention.dense.bias",)),
    "ffn_norm": Stored("E", ("post_attention_layernorm.weight",)),
    "ffn_norm_bias": Stored("E", ("post_attention_layernorm.bias",)),
    "w_in": Stored("1F E", ("mlp.dense_h_to_4h.weight",)),
    "b_in": Stored("1F", ("mlp.dense_h_to_4h.bias",)),
    "w_out": Stored("E F", ("mlp.dense_4h_to_h.weight",)),
    "b_out": Stored("E", ("mlp.dense_4h_to_h.bias",)),
}
_NEOX = Family(
    title="GPT-NeoX",
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    sizes=without(sizes({"max_len": 2048}), "num_kv_heads", "head_dim"),
    norm_eps=("layer_norm_eps", 1e-5),
    tied=False,
    naming=Naming(
        bases=("gpt_neox.", ""),
        layer="{base}layers.{layer}.",
        layer_weights=_NEOX_LAYER,
        model_weights={
            "embed": Stored("V E", ("{base}embed_in.weight",)),
            "final_norm": Stored("E", ("{base}final_layer_norm.weight",)),
            "final_norm_bias": Stored("E", ("{base}final_layer_norm.bias",)),
            "unembed": Stored("V E", ("embed_out.weight",)),
        },
        buffers=(".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"),
    ),
    block={"gated": False, "norm": Norm.LAYER, "biases": FEED_FORWARD},
    picks=(
        activation("hidden_act", "gelu"),
        Pick("use_parallel_residual", True, ((True, {"block": Block.PARALLEL_TWO_NORMS}), (False, {"block": Block.SERIAL}))),
    ),
    biases=(Bias("attention_bias", True, ATTENTION),),
    rope=Rope(theta_key="rotary_emb_base", partial=0.25, partial_key="rotary_pct"),
)

_PERSIMMON = replace(
    _NEOX,
    title="Persimmon",
    architecture="PersimmonForCausalLM",
    model_type="persimmon",
    sizes=without(sizes({"max_len": 16384}), "num_kv_heads", "head_dim"),
    naming=Naming(
        bases=("model.", ""),
        layer="{base}layers.{layer}.",
        layer_weights={
            **{
                name: replace(one, tensors=tuple(t.replace("attention.", "self_attn.") for t in one.tensors))
                for name, one in _NEOX_LAYER.items()
            },
            **{
                f"{one}_norm{bias}": Stored("Q", (f"self_attn.{one}_layernorm.{kind}",))
                for one in "qk"
                for bias, kind in (("", "weight"), ("_bias", "bias"))
            },
        },
        model_weights={
            "embed": Stored("V E", ("{base}embed_tokens.weight",)),
            "final_norm": Stored("E", ("{base}final_layernorm.weight",)),
            "final_norm_bias": Stored("E", ("{base}final_layernorm.bias",)),
            "unembed": Stored("V E", ("lm_head.weight",)),
        },
        buffers=(".rotary_emb.inv_freq",),
    ),
    block={"gated": False, "norm": Norm.LAYER, "biases": ALL_BIASES},
    picks=(
        activation("hidden_act", "relu2"),
        Pick(
            "qk_layernorm",
            True,
            ((True, {"qk_norm": QkNorm.HEAD, "qk_norm_bias": True}), (False, {"qk_norm": QkNorm.NONE, "qk_norm_bias": False})),
        ),
    ),
    biases=(),
    rope=Rope(partial=0.5),
)


def _falcon_naming(config: ModelConfig) -> Naming:
    """Queries, keys and values stand together for each that shares a key, or for each head; norms are called by their number."""
    if config.num_kv_heads == config.num_heads:
        parts, per = EVERY_HEAD, "H"
    else:
        parts, per = EVERY_GROUP, "K"
    two = config.block is Block.PARALLEL_TWO_NORMS
    first, second = ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
    layer = {
        name: replace(one, tensors=tuple(t.replace("attention.", "self_attention.") for t in one.tensors))
        for name, one in _NEOX_LAYER.items()
    }
    layer |= fused("self_attention.query_key_value.weight", "self_attention.query_key_value.bias", parts, per)
    for name, tensor in (("attention_norm", first), ("ffn_norm", second)):
        layer |= {name: Stored("E", (f"{tensor}.weight",)), f"{name}_bias": Stored("E", (f"{tensor}.bias",))}
    return Naming(
        bases=("transformer.", ""),
        layer="{base}h.{layer}.",
        layer_weights=layer,
        model_weights={
            "embed": Stored("V E", ("{base}word_embeddings.weight",)),
            "final_norm": Stored("E", ("{base}ln_f.weight",)),
            "final_norm_bias": Stored("E", ("{base}ln_f.bias",)),
            "unembed": Stored("V E", ("lm_head.weight",)),
        },
        buffers=(".rotary.inv_freq", "rotary_emb.inv_freq"),
    )


def _falcon(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Blocks and heads as three flags and a number decide them together."""
    if "_grouped" not in fields:
        return {}
    heads = fields["num_kv_heads"] if fields["_grouped"] or not fields["_one_key"] else 1
    heads = heads if fields["_grouped"] or heads == 1 else fields["num_heads"]
    norms = fields["_norms"] or (2 if fields["_grouped"] else 1)
    two = fields["_grouped"] and norms == 2
    block = (Block.PARALLEL_TWO_NORMS if two else Block.PARALLEL) if fields["_parallel"] else Block.SERIAL
    return {"num_kv_heads": heads, "block": block}


def _flag(key: str, absent: bool, field: str) -> Pick:
    return Pick(key, absent, ((True, {field: True}), (False, {field: False})))


_FALCON = Family(
    title="Falcon",
    architecture="FalconForCausalLM",
    model_type="falcon",
    sizes=without(sizes({"max_len": 2048}, num_kv_heads="num_kv_heads"), "head_dim") | {"ffn_dim": Size("ffn_hidden_size", follows=True)},
    norm_eps=("layer_norm_epsilon", 1e-5),
    tied=True,
    naming=_falcon_naming,
    only={"alibi": (False,)},
    equal=(("n_embed", "hidden_size"),),
    block={"gated": False, "norm": Norm.LAYER},
    picks=(
        activation("activation", "gelu"),
        _flag("new_decoder_architecture", False, "_grouped"),
        _flag("multi_query", True, "_one_key"),
        Pick(
            "parallel_attn",
            True,
            ((True, {"_parallel": True, "block": Block.PARALLEL}), (False, {"_parallel": False, "block": Block.SERIAL})),
        ),
        Pick(
            "num_ln_in_parallel_attn",
            None,
            ((None, {"_norms": 0}), (1, {"_norms": 1}), (2, {"_norms": 2, "block": Block.PARALLEL_TWO_NORMS})),
        ),
    ),
    biases=(Bias("bias", False, ALL_BIASES),),
    derived=_falcon,
)
_PHI = replace(
    LLAMA,
    title="Phi",
    architecture="PhiForCausalLM",
    model_type="phi",
    sizes=without(sizes({"max_len": 2048}), "head_dim"),
    norm_eps=("layer_norm_eps", 1e-5),
    naming=llama_naming(
        {
            "wo": Stored("E (HQ)", ("self_attn.dense.weight",)),
            "bo": Stored("E", ("self_attn.dense.bias",)),
            "w_in": Stored("1F E", ("mlp.fc1.weight",)),
            "b_in": Stored("1F", ("mlp.fc1.bias",)),
            "w_out": Stored("E F", ("mlp.fc2.weight",)),
            "b_out": Stored("E", ("mlp.fc2.bias",)),
        },
        model_weights={
            "final_norm": Stored("E", ("{base}final_layernorm.weight",)),
            "final_norm_bias": Stored("E", ("{base}final_layernorm.bias",)),
        },
    ),
    only={"qk_layernorm": (False,)},
    block=_PARALLEL | {"biases": ALL_BIASES, "output_bias": True},
    picks=(activation("hidden_act", "gelu_new"),),
    biases=(),
    rope=Rope(partial=0.5),
    harmless=keys("embd_pdrop resid_pdrop"),
)

FAMILIES = (_NEOX, _PERSIMMON, _FALCON, _PHI)
