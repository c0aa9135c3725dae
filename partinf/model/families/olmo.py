"""Families whose norms are unlike Llama's: without weights, of what sublayers add, LayerNorm, one for two sublayers; and fused tensors."""

from __future__ import annotations

from dataclasses import replace

from partinf.model.config import Block, Norm
from partinf.model.families.harmless import keys
from partinf.model.families.llama import ATTENTION, FEED_FORWARD, LLAMA, QKV
from partinf.model.families.shared import (
    AFTER,
    ALL_BIASES,
    GATE_UP,
    NEIGHBOURS,
    ONE_AFTER_THE_OTHER,
    QK_WIDTH,
    UNGATED,
    activation,
    fused,
    llama_naming,
    sizes,
    without,
)  # fmt: skip
from partinf.model.family import Bias, Pick, Scalar, Stored, Window
from partinf.model.hf_rope import Rope
from partinf.model.kinds import NormPlaces, QkNorm

_ATTENTION_BIAS = (Bias("attention_bias", False, ATTENTION),)
_OLMO = replace(
    LLAMA,
    title="OLMo",
    architecture="OlmoForCausalLM",
    model_type="olmo",
    norm_eps=("", 1e-5),
    only={},
    block={"norm": Norm.LAYER_BARE},
    scalars=(Scalar("clip_qkv", "qkv_clip", None),),
    biases=_ATTENTION_BIAS,
    written=False,
)
_OLMO2 = replace(
    _OLMO,
    title="OLMo 2",
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    norm_eps=("rms_norm_eps", 1e-5),
    naming=llama_naming(AFTER, QK_WIDTH),
    block={"norms": NormPlaces.AFTER, "qk_norm": QkNorm.WIDTH},
    scalars=(),
)
_OLMO3 = replace(
    _OLMO2,
    title="OLMo 3",
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    window=Window(4096, typed=True, every=("", 4)),
    rope=Rope(by_type={"full_attention": ("rope_theta", 5e5), "sliding_attention": ("", 5e5)}, original=False),
)
_EXAONE4 = replace(
    _OLMO2,
    title="EXAONE 4",
    architecture="Exaone4ForCausalLM",
    model_type="exaone4",
    sizes=sizes({"num_kv_heads": 32, "max_len": 2048}),
    naming=llama_naming(AFTER),
    block={"norms": NormPlaces.AFTER, "qk_norm": QkNorm.HEAD},
    biases=(),
    window=Window(4096, typed=True, every=("sliding_window_pattern", 4), unrotated=True),
)
_COHERE = replace(
    LLAMA,
    title="Cohere",
    architecture="CohereForCausalLM",
    model_type="cohere",
    sizes=sizes({"max_len": 8192}),
    norm_eps=("layer_norm_eps", 1e-5),
    tied=True,
    naming=llama_naming(neighbours=NEIGHBOURS),
    only={"use_qk_norm": (False,)},
    block={"block": Block.PARALLEL, "norm": Norm.LAYER_NO_BIAS},
    scalars=(Scalar("logit_scale", "logit_scale", 0.0625),),
    biases=_ATTENTION_BIAS,
    rope=Rope(theta=5e5),
    written=False,
)
_COHERE2 = replace(
    _COHERE,
    title="Cohere 2",
    architecture="Cohere2ForCausalLM",
    model_type="cohere2",
    only={
        "use_qk_norm": (False,),
        "position_embedding_type": ("rope_gptj",),
        "use_embedding_sharing": (True,),
        "use_parallel_block": (True,),
    },
    equal=(("head_dim", "head_dim"),),
    window=Window(4096, typed=True, every=("sliding_window_pattern", 4), unrotated=True),
    rope=Rope(),
    harmless=keys("cache_implementation use_parallel_embedding use_gated_activation order_of_interleaved_layers rotary_pct layer_switch"),
)
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
    written=False,
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
    written=False,
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
_STABLELM = replace(
    LLAMA,
    title="StableLM",
    architecture="StableLmForCausalLM",
    model_type="stablelm",
    sizes=without(sizes({"num_kv_heads": 32, "max_len": 4096}), "head_dim"),
    norm_eps=("layer_norm_eps", 1e-5),
    only={"qk_layernorm": (False,)},
    block={"norm": Norm.LAYER},
    picks=(*LLAMA.picks, Pick("use_parallel_residual", False, ((False, {"block": Block.SERIAL}), (True, {"block": Block.PARALLEL})))),
    biases=(Bias("use_qkv_bias", False, QKV),),
    rope=Rope(partial=0.25),
    harmless=keys("rotary_scaling_factor"),
    written=False,
)
_NEMOTRON = replace(
    LLAMA,
    title="Nemotron",
    architecture="NemotronForCausalLM",
    model_type="nemotron",
    sizes=sizes({"max_len": 4096}),
    norm_eps=("norm_eps", 1e-5),
    naming=llama_naming(UNGATED),
    only={},
    block={"gated": False, "norm": Norm.LAYER_1P},
    picks=(activation("hidden_act", "relu2"),),
    biases=(Bias("attention_bias", False, ATTENTION), Bias("mlp_bias", False, FEED_FORWARD)),
    rope=Rope(partial=0.5),
    written=False,
)
_STARCODER2_FFN = {
    "w_in": Stored("1F E", ("mlp.c_fc.weight",)),
    "b_in": Stored("1F", ("mlp.c_fc.bias",)),
    "w_out": Stored("E F", ("mlp.c_proj.weight",)),
    "b_out": Stored("E", ("mlp.c_proj.bias",)),
}
_STARCODER2 = replace(
    LLAMA,
    title="StarCoder 2",
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    sizes=without(sizes({"num_kv_heads": 2, "max_len": 4096}), "head_dim"),
    norm_eps=("norm_epsilon", 1e-5),
    tied=True,
    naming=llama_naming(_STARCODER2_FFN),
    only={"mlp_type": ("default",), "norm_type": ("layer_norm",)},
    block={"gated": False, "norm": Norm.LAYER},
    picks=(activation("hidden_act", "gelu_pytorch_tanh"),),
    biases=(Bias("use_bias", True, ALL_BIASES),),
    window=Window(None),
    harmless=keys("residual_dropout embedding_dropout"),
    written=False,
)

FAMILIES = (_OLMO, _OLMO2, _OLMO3, _EXAONE4, _COHERE, _COHERE2, _PHI3, _GLM, _GLM4, _STABLELM, _NEMOTRON, _STARCODER2)
