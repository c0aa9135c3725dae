"""Phi-3 and GLM: Llama's layer, with gate and input of the feed-forward in one tensor on disk."""

from __future__ import annotations

from dataclasses import replace

from partinf.model.families.harmless import keys
from partinf.model.families.llama import LLAMA, QKV
from partinf.model.families.shared import GATE_UP, NEIGHBOURS, ONE_AFTER_THE_OTHER, fused, llama_naming, sizes, without
from partinf.model.family import Bias, Stored, Window
from partinf.model.hf_rope import Rope
from partinf.model.kinds import NormPlaces

_PHI3 = replace(
    LLAMA,
    title="Phi-3",
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    sizes=without(sizes({"max_len": 4096}), "head_dim"),
    norm_eps=("rms_norm_eps", 1e-5),
    naming=llama_naming(GATE_UP, fused("self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias", ONE_AFTER_THE_OTHER)),
    only={"attention_bias": (False,)},
    biases=(),
    window=Window(None),
    rope=Rope(partial=1.0, renamed={"su": "longrope", "yarn": "longrope"}),
    harmless=keys("embd_pdrop resid_pdrop full_attn_mod interpolate_factor lm_head_bias mlp_bias"),
)
_GLM = replace(
    LLAMA,
    title="GLM",
    architecture="GlmForCausalLM",
    model_type="glm",
    sizes=sizes({"num_kv_heads": 2, "head_dim": 128, "max_len": 131072}),
    norm_eps=("rms_norm_eps", 0.00000015625),
    naming=llama_naming(GATE_UP, neighbours=NEIGHBOURS),
    only={},
    biases=(Bias("attention_bias", True, QKV),),
    rope=Rope(partial=0.5),
)
_GLM4_NORMS = {
    "attention_post_norm": Stored("E", ("post_self_attn_layernorm.weight",)),
    "ffn_post_norm": Stored("E", ("post_mlp_layernorm.weight",)),
}
_GLM4 = replace(
    _GLM,
    title="GLM-4",
    architecture="Glm4ForCausalLM",
    model_type="glm4",
    naming=llama_naming(GATE_UP, _GLM4_NORMS, neighbours=NEIGHBOURS),
    block={"norms": NormPlaces.BOTH},
)

FAMILIES = (_PHI3, _GLM, _GLM4)
