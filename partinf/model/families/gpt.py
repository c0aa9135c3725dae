"""GPT-2 and what followed it before Llama: LayerNorm, feed-forwards without a gate, learned positions or rotations of a part of a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from partinf.model.config import Block, ModelConfig, Norm, Position
from partinf.model.families.harmless import keys
from partinf.model.families.llama import ATTENTION, FEED_FORWARD, LLAMA
from partinf.model.families.shared import (
    ALL_BIASES,
    EVERY_GROUP,
    EVERY_HEAD,
    NEIGHBOURS,
    ONE_AFTER_THE_OTHER,
    activation,
    fused,
    llama_naming,
    sizes,
    without,
)  # fmt: skip
from partinf.model.family import Bias, Family, Naming, Pick, Size, Stored, Window
from partinf.model.hf_rope import Rope

_LEARNED = {"gated": False, "norm": Norm.LAYER, "position": Position.LEARNED, "biases": ALL_BIASES}
_PARALLEL = {"gated": False, "norm": Norm.LAYER, "block": Block.PARALLEL}
_GPT2_LAYER = {
    "attention_norm": Stored("E", ("ln_1.weight",)),
    "attention_norm_bias": Stored("E", ("ln_1.bias",)),
    **fused("attn.c_attn.weight", "attn.c_attn.bias", ONE_AFTER_THE_OTHER, transposed=True),
    "wo": Stored("E (HQ)", ("attn.c_proj.weight",), transposed=True),
    "bo": Stored("E", ("attn.c_proj.bias",)),
    "ffn_norm": Stored("E", ("ln_2.weight",)),
    "ffn_norm_bias": Stored("E", ("ln_2.bias",)),
    "w_in": Stored("1F E", ("mlp.c_fc.weight",), transposed=True),
    "b_in": Stored("1F", ("mlp.c_fc.bias",)),
    "w_out": Stored("E F", ("mlp.c_proj.weight",), transposed=True),
    "b_out": Stored("E", ("mlp.c_proj.bias",)),
}
_GPT2_NAMING = Naming(
    bases=("transformer.", ""),  # the published gpt2 has none
    layer="{base}h.{layer}.",
    layer_weights=_GPT2_LAYER,
    model_weights={
        "embed": Stored("V E", ("{base}wte.weight",)),
        "positions": Stored("M E", ("{base}wpe.weight",)),
        "final_norm": Stored("E", ("{base}ln_f.weight",)),
        "final_norm_bias": Stored("E", ("{base}ln_f.bias",)),
        "unembed": Stored("V E", ("lm_head.weight",)),
        "unembed_bias": Stored("V", ("lm_head.bias",)),
    },
    buffers=(".attn.bias", ".attn.masked_bias"),
)
# Names that other families have for the same sizes.
_OTHER_NAMES = (
    ("hidden_size", "n_embd"),
    ("num_attention_heads", "n_head"),
    ("num_hidden_layers", "n_layer"),
    ("max_position_embeddings", "n_positions"),
)
# The head of a classifier, an older name of n_positions, and the order in which float32 scores are made.
_GPT_HARMLESS = keys("""
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj n_ctx reorder_and_upcast_attn
    predict_special_tokens
""")
_GPT2 = Family(
    title="GPT-2",
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    sizes={
        "num_layers": Size("n_layer"),
        "embed_dim": Size("n_embd"),
        "num_heads": Size("n_head"),
        "vocab_size": Size("vocab_size"),
        "max_len": Size("n_positions"),
        "ffn_dim": Size("n_inner", follows=True),
    },
    norm_eps=("layer_norm_epsilon", 1e-5),
    tied=True,
    naming=_GPT2_NAMING,
    only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "n_special": (0,)},
    equal=_OTHER_NAMES,
    block=_LEARNED,
    picks=(activation("activation_function", "gelu_new"),),
    harmless=_GPT_HARMLESS,
)


def _bigcode_naming(config: ModelConfig) -> Naming:
    """One key and value for all heads stand after the queries; where each has its own, the three of a head stand together."""
    parts, per = (EVERY_HEAD, "H") if config.num_kv_heads == config.num_heads else (ONE_AFTER_THE_OTHER, "")
    plain = {name: replace(stored, transposed=False) for name, stored in _GPT2_LAYER.items()}
    return replace(_GPT2_NAMING, layer_weights=plain | fused("attn.c_attn.weight", "attn.c_attn.bias", parts, per))


def _heads(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"num_kv_heads": fields["_kv_heads"]} if fields.get("_kv_heads") else {}


_BIGCODE = replace(
    _GPT2,
    title="GPT-BigCode",
    architecture="GPTBigCodeForCausalLM",
    model_type="gpt_bigcode",
    naming=_bigcode_naming,
    only={"scale_attn_weights": (True,), "add_cross_attention": (False,)},
    equal=tuple(pair for pair in _OTHER_NAMES),
    picks=(activation("activation_function", "gelu_pytorch_tanh"), Pick("multi_query", True, ((True, {"_kv_heads": 1}), (False, {})))),
    derived=_heads,
    harmless=_GPT_HARMLESS
    | keys("""
        attention_softmax_in_fp32 scale_attention_softmax_in_fp32 num_key_value_heads inference_runner validate_runner_input
        max_batch_size max_sequence_length pad_key_length pre_allocate_kv_cache
    """),
)
_GPTJ_NAMING = replace(
    _GPT2_NAMING,
    layer_weights={
        "attention_norm": Stored("E", ("ln_1.weight",)),
        "attention_norm_bias": Stored("E", ("ln_1.bias",)),
        "wq": Stored("HQ E", ("attn.q_proj.weight",)),
        "wkv": Stored("KQ E", ("attn.k_proj.weight", "attn.v_proj.weight")),
        "wo": Stored("E (HQ)", ("attn.out_proj.weight",)),
        "w_in": Stored("1F E", ("mlp.fc_in.weight",)),
        "b_in": Stored("1F", ("mlp.fc_in.bias",)),
        "w_out": Stored("E F", ("mlp.fc_out.weight",)),
        "b_out": Stored("E", ("mlp.fc_out.bias",)),
    },
    neighbours=NEIGHBOURS,
)
_GPTJ = replace(
    _GPT2,
    title="GPT-J",
    architecture="GPTJForCausalLM",
    model_type="gptj",
    tied=False,
    naming=_GPTJ_NAMING,
    only={"scale_attn_weights": (True,), "rotary": (True,)},
    block=_PARALLEL | {"biases": FEED_FORWARD, "output_bias": True},
    rope=Rope(dims_key=("rotary_dim", 64)),
    harmless=_GPT_HARMLESS,
)
# Rows are cut for the devices of its training: of each, the queries of its heads, then values, then keys.
_BY_DEVICE = ("SQ", "SQ", "SQ")
_CODEGEN = replace(
    _GPTJ,
    title="CodeGen",
    architecture="CodeGenForCausalLM",
    model_type="codegen",
    naming=replace(
        _GPTJ_NAMING,
        layer_weights={
            **_GPTJ_NAMING.layer_weights,
            "wq": Stored("HQ E", ("attn.qkv_proj.weight",), fused=_BY_DEVICE, part=(0,), per="T"),
            "wkv": Stored("KQ E", ("attn.qkv_proj.weight",) * 2, fused=_BY_DEVICE, part=(2, 1), per="T"),
        },
        buffers=(".attn.causal_mask",),
    ),
    only={},
)
_GPT_NEO = replace(
    _GPT2,
    title="GPT-Neo",
    architecture="GPTNeoForCausalLM",
    model_type="gpt_neo",
    sizes=sizes(num_layers="num_layers", num_heads="num_heads", ffn_dim="intermediate_size", num_kv_heads="", head_dim="")
    | {"ffn_dim": Size("intermediate_size", follows=True)},
    naming=replace(
        _GPT2_NAMING,
        layer_weights={name: replace(stored, transposed=False) for name, stored in _GPT2_LAYER.items()}
        | {
            "wq": Stored("HQ E", ("attn.attention.q_proj.weight",)),
            "wkv": Stored("KQ E", ("attn.attention.k_proj.weight", "attn.attention.v_proj.weight")),
            "wo": Stored("E (HQ)", ("attn.attention.out_proj.weight",)),
            "bo": Stored("E", ("attn.attention.out_proj.bias",)),
        },
        buffers=(".attn.attention.bias", ".attn.attention.masked_bias"),
    ),
    only={},
    equal=(),
    block=_LEARNED | {"biases": ("wo", "w_in", "w_out"), "attention_scale": 1.0},
    window=Window(256, key="window_size", listed=("attention_layers", "attention_types")),
    harmless=_GPT_HARMLESS | keys("resid_dropout embed_dropout"),
)
_OPT_LAYER = {
    "attention_norm": Stored("E", ("self_attn_layer_norm.weight",)),
    "attention_norm_bias": Stored("E", ("self_attn_layer_norm.bias",)),
    "wq": Stored("HQ E", ("self_attn.q_proj.weight",)),
    "bq": Stored("HQ", ("self_attn.q_proj.bias",)),
    "wkv": Stored("KQ E", ("self_attn.k_proj.weight", "self_attn.v_proj.weight")),
    "bkv": Stored("KQ", ("self_attn.k_proj.bias", "self_attn.v_proj.bias")),
    "wo": Stored("E (HQ)", ("self_attn.out_proj.weight",)),
    "bo": Stored("E", ("self_attn.out_proj.bias",)),
    "ffn_norm": Stored("E", ("final_layer_norm.weight",)),
    "ffn_norm_bias": Stored("E", ("final_layer_norm.bias",)),
    "w_in": Stored("1F E", ("fc1.weight",)),
    "b_in": Stored("1F", ("fc1.bias",)),
    "w_out": Stored("E F", ("fc2.weight",)),
    "b_out": Stored("E", ("fc2.bias",)),
}
_OPT = Family(
    title="OPT",
    architecture="OPTForCausalLM",
    model_type="opt",
    sizes={
        "num_layers": Size("num_hidden_layers"),
        "embed_dim": Size("hidden_size"),
        "ffn_dim": Size("ffn_dim"),
        "num_heads": Size("num_attention_heads"),
        "vocab_size": Size("vocab_size"),
        "max_len": Size("max_position_embeddings"),
    },
    norm_eps=("", 1e-5),
    tied=True,
    naming=Naming(
        bases=("model.decoder.", "decoder."),
        layer="{base}layers.{layer}.",
        layer_weights=_OPT_LAYER,
        model_weights={
            "embed": Stored("V E", ("{base}embed_tokens.weight",)),
            "positions": Stored("M E", ("{base}embed_positions.weight",), skip=2),  # fairseq's padding, which no token is given
            "final_norm": Stored("E", ("{base}final_layer_norm.weight",)),
            "final_norm_bias": Stored("E", ("{base}final_layer_norm.bias",)),
            "unembed": Stored("V E", ("lm_head.weight",)),
        },
    ),
    only={"do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,)},
    equal=(("word_embed_proj_dim", "hidden_size"),),
    block=without(_LEARNED, "biases"),
    picks=(
        activation("activation_function", "relu"),
        Pick("layer_norm_elementwise_affine", True, ((True, {"norm": Norm.LAYER}), (False, {"norm": Norm.LAYER_BARE}))),
    ),
    biases=(Bias("enable_bias", True, ALL_BIASES),),
    harmless=keys("output_projection"),  # whether a file has an output matrix of its own, which the file says itself
)


def _scaled(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"embedding_scale": fields["embed_dim"] ** 0.5} if fields.get("_scaled") else {}


_BIOGPT = replace(
    _OPT,
    title="BioGPT",
    architecture="BioGptForCausalLM",
    model_type="biogpt",
    sizes={**_OPT.sizes} | {"ffn_dim": Size("intermediate_size")},
    naming=Naming(
        bases=("biogpt.", ""),
        layer="{base}layers.{layer}.",
        layer_weights=_OPT_LAYER,
        model_weights={
            "embed": Stored("V E", ("{base}embed_tokens.weight",)),
            "positions": Stored("M E", ("{base}embed_positions.weight",), skip=2),
            "final_norm": Stored("E", ("{base}layer_norm.weight",)),
            "final_norm_bias": Stored("E", ("{base}layer_norm.bias",)),
            "unembed": Stored("V E", ("output_projection.weight",)),
        },
    ),
    only={},
    equal=(),
    block=_LEARNED,
    picks=(activation("hidden_act", "gelu"), Pick("scale_embedding", True, ((True, {"_scaled": True}), (False, {})))),
    biases=(),
    derived=_scaled,
    loose=frozenset({"embedding_scale"}),
    harmless=keys("layer_norm_eps hidden_dropout_prob attention_probs_dropout_prob"),  # its code does not read the first
)
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

FAMILIES = (_GPT2, _OPT, _BIGCODE, _GPTJ, _CODEGEN, _GPT_NEO, _BIOGPT, _NEOX, _FALCON, _PHI)
