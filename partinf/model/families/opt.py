"""OPT and BioGPT: learned positions after two that no token has, LayerNorm before sublayers or of what they were added to, no gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from partinf.foundation.errors import InvalidInput
from partinf.model.config import ModelConfig, Norm
from partinf.model.families.gpt import LEARNED
from partinf.model.families.harmless import keys
from partinf.model.families.shared import ALL_BIASES, activation, without
from partinf.model.family import Bias, Family, Naming, Pick, Size, Stored
from partinf.model.kinds import NormPlaces

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
_OPT_MODEL = {
    "embed": Stored("V E", ("{base}embed_tokens.weight",)),
    "positions": Stored("M E", ("{base}embed_positions.weight",), skip=2),  # fairseq's padding, which no token is given
    "final_norm": Stored("E", ("{base}final_layer_norm.weight",)),
    "final_norm_bias": Stored("E", ("{base}final_layer_norm.bias",)),
    "unembed": Stored("V E", ("lm_head.weight",)),
}
_PROJECTED = {
    "embed": Stored("V P", ("{base}embed_tokens.weight",), times=("{base}project_in.weight", "E P")),
    "unembed": Stored("V P", ("lm_head.weight",), times=("{base}project_out.weight", "P E")),
}
_AFTER = {"attention_norm": "attention_post_norm", "ffn_norm": "ffn_post_norm"}


def _opt_naming(config: ModelConfig) -> Naming:
    """The norms of a layer have one name, wherever they stand; tables may be narrower than the model, with a matrix on either side."""
    layer = dict(_OPT_LAYER)
    if config.norms is NormPlaces.SUM:
        layer = {name.replace(one, _AFTER[one]) if (one := name.removesuffix("_bias")) in _AFTER else name: s for name, s in layer.items()}
    return Naming(
        bases=("model.decoder.", "decoder."),
        layer="{base}layers.{layer}.",
        layer_weights=layer,
        model_weights=_OPT_MODEL | (_PROJECTED if config.table_dim else {}),
    )


def _opt(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """What two flags say of the last norm together, and tables of another width."""
    found: dict[str, Any] = {"final_norm": False} if fields.get("_removed") or fields.get("norms") is NormPlaces.SUM else {}
    width = fields.get("table_dim", 0)
    if not width or width == fields["embed_dim"]:
        return found | {"table_dim": 0}
    if not fields["tied_embeddings"]:
        raise InvalidInput(f"config.json: word_embed_proj_dim = {width} is not supported with an output matrix of its own")
    return found | {"tied_embeddings": False}


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
        "table_dim": Size("word_embed_proj_dim", follows=True),
    },
    norm_eps=("", 1e-5),
    tied=True,
    naming=_opt_naming,
    block=without(LEARNED, "biases"),
    derived=_opt,
    loose=frozenset({"final_norm"}),
    picks=(
        activation("activation_function", "relu"),
        Pick("do_layer_norm_before", True, ((True, {"norms": NormPlaces.BEFORE}), (False, {"norms": NormPlaces.SUM}))),
        Pick("_remove_final_layer_norm", False, ((False, {"_removed": False}), (True, {"_removed": True}))),
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
    sizes={**without(_OPT.sizes, "table_dim"), "ffn_dim": Size("intermediate_size")},
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
    block=LEARNED,
    loose=frozenset({"embedding_scale"}),
    picks=(activation("hidden_act", "gelu"), Pick("scale_embedding", True, ((True, {"_scaled": True}), (False, {})))),
    biases=(),
    derived=_scaled,
    harmless=keys("layer_norm_eps hidden_dropout_prob attention_probs_dropout_prob"),  # its code does not read the first
)

FAMILIES = (_OPT, _BIOGPT)
