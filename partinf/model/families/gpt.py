"""GPT-2 and what followed it before Llama: LayerNorm, feed-forwards without a gate, learned positions or rotations of a part of a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from partinf.model.config import Activation, Block, ModelConfig, Norm, Position
from partinf.model.families.harmless import keys
from partinf.model.families.llama import FEED_FORWARD
from partinf.model.families.shared import (
    ALL_BIASES,
    EVERY_HEAD,
    NEIGHBOURS,
    ONE_AFTER_THE_OTHER,
    activation,
    fused,
    sizes,
    without,
)  # fmt: skip
from partinf.model.family import Family, Naming, Pick, Size, Stored, Window
from partinf.model.hf_rope import Rope
from partinf.model.kinds import NormPlaces

LEARNED = {"gated": False, "norm": Norm.LAYER, "position": Position.LEARNED, "biases": ALL_BIASES}
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
    block=LEARNED,
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
_GPT1 = replace(
    _GPT2,
    title="GPT",
    architecture="OpenAIGPTLMHeadModel",
    model_type="openai-gpt",
    naming=replace(
        _GPT2_NAMING,
        layer_weights={
            **without(_GPT2_LAYER, "attention_norm", "attention_norm_bias", "ffn_norm", "ffn_norm_bias"),
            "attention_post_norm": Stored("E", ("ln_1.weight",)),
            "attention_post_norm_bias": Stored("E", ("ln_1.bias",)),
            "ffn_post_norm": Stored("E", ("ln_2.weight",)),
            "ffn_post_norm_bias": Stored("E", ("ln_2.bias",)),
        },
        model_weights={
            "embed": Stored("V E", ("{base}tokens_embed.weight",)),
            "positions": Stored("M E", ("{base}positions_embed.weight",)),
            "unembed": Stored("V E", ("lm_head.weight",)),
        },
        buffers=(".attn.bias", "position_ids"),
    ),
    sizes={field: size for field, size in _GPT2.sizes.items() if field != "ffn_dim"},
    only={"n_special": (0,)},
    block=LEARNED | {"norms": NormPlaces.SUM, "final_norm": False},
    picks=(activation("afn", "gelu", gelu=Activation.GELU_TANH),),
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
    block=LEARNED | {"biases": ("wo", "w_in", "w_out"), "attention_scale": 1.0},
    window=Window(256, key="window_size", listed=("attention_layers", "attention_types")),
    harmless=_GPT_HARMLESS | keys("resid_dropout embed_dropout"),
)

FAMILIES = (_GPT2, _GPT1, _BIGCODE, _GPTJ, _CODEGEN, _GPT_NEO)
